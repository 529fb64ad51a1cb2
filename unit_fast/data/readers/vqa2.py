"""VQA v2 (SPEC 4.1, 4.5): the official question and annotation files, or MMF's imdb arrays.

Splits. With imdb files (``vqa2.train_imdb`` and so on) they are the splits. With the official files the idea is that
of the authors: an answered question belongs to val when its image is one of COCO val2017, and to train otherwise,
whether it stands in the train2014 or val2014 files. Where no answered question has an image of COCO val2017 (no list at
hand, or a small sample) the files' own names decide: train2014 is train, val2014 is val. All images of COCO val2017 are
in val2014, so neither way trains on them. Questions without an answer can only be predicted: they are counted, and are
the test split when there is no test file.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from unit_fast.data.images.geometry import Geometry
from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.sources import existing, read_through
from unit_fast.data.readers.visual_genome import coco_image_ids
from unit_fast.data.store import files
from unit_fast.data.store.content import Content, hash_of
from unit_fast.data.store.pickles import read_records
from unit_fast.errors import UserError, printable

ANNOTATORS = 10
PARTS = ("train2014", "val2014", "test2015")
"""The releases of COCO images that questions are about."""
OFFICIAL = (*(f"vqa2.{part}_questions" for part in PARTS), "vqa2.train2014_annotations", "vqa2.val2014_annotations")
"""Layout keys of the official files."""
_PART = re.compile(rf"COCO_({'|'.join(PARTS)})_(\d{{12}})(?:\.jpg)?")


def normalise_answer(answer: str) -> str:
    """Lower case, no commas and question marks, a space before ``'s`` (SPEC 4.5)."""
    return answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def indices(answers: list[str]) -> dict[str, int]:
    """Spelling of an answer -> its index in the list: as it stands there, and normalised as the annotators' are.

    The authors' reader normalises the annotators' answers alone, so that the 12 entries with ``'s`` of the published
    list are never matched. Of two entries with one normal form the first gets what is spelt like neither.
    """
    found: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if index and (form := normalise_answer(answer)):
            found.setdefault(form, index)
    return found | {answer: index for index, answer in enumerate(answers) if index}


def soft_scores(answers: list[str], index_of: dict[str, int]) -> dict[int, float]:
    """Answer index -> score of one question (SPEC 4.5).

    Args:
        answers: what the annotators said; fewer than ten are repeated from the start until there are ten.
        index_of: from ``indices``. Answers outside it, and index 0 (``<unk>``), get no score.
    """
    if not answers:
        return {}
    ten = [answers[i % len(answers)] for i in range(max(ANNOTATORS, len(answers)))]
    counts = Counter(index_of.get(answer, index_of.get(normalise_answer(answer), 0)) for answer in ten)
    # the mean over annotators i of min(1, matches among the others / 3): an annotator who gave the answer has one
    # match less among the others. Indices are compared, so two spellings of one index agree.
    total = len(ten)
    return {
        index: (c * min(1.0, (c - 1) / 3) + (total - c) * min(1.0, c / 3)) / total
        for index, c in counts.items()
        if index != 0
    }


def read_answers(path: Path, outputs: int | None) -> list[str]:
    """The answer list: JSON (a list, or answer -> index) or text with one answer a line; index 0 is ``<unk>``, however
    it is written there.

    Raises:
        UserError: the list has not ``outputs`` entries, or has an entry twice.
    """
    where = printable(path, 400)
    if path.suffix == ".json":
        content = files.read_json(path)
        if isinstance(content, dict):
            if sorted(map(repr, content.values())) != sorted(map(repr, range(len(content)))):
                raise UserError(f"{where}: the indices are not 0..{len(content) - 1}, each once")
            content = sorted(content, key=content.get)
        if not isinstance(content, list) or not all(isinstance(answer, str) for answer in content):
            raise UserError(f"{where}: expected a list of answers")
        answers = content
    else:
        answers = [line for _, line in files.read_lines(path)]
    if outputs is not None and len(answers) != outputs:
        hint = "; its first line should be <unk>" if len(answers) == outputs - 1 else ""
        raise UserError(
            f"{where}: {len(answers)} answers, but the model has {outputs} outputs for vqa2{hint}; give the list the "
            f"model was trained with, or set the task's outputs to {len(answers)}"
        )
    if not answers:
        raise UserError(f"{where}: no answers")
    if answers[0] not in ("", "<unk>"):
        raise UserError(f"{where}: the first answer is {printable(repr(answers[0]), 60)}; index 0 must be <unk>")
    repeated = [answer for answer, count in Counter(answers).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: {printable(repr(repeated[0]), 60)} stands twice; remove one")
    return answers


class Vqa2(Dataset):
    """VQA v2. ``answers`` is the list of answers by index."""

    answers: list[str]

    def _read(self) -> None:
        sources = [f"vqa2.{self.split}_imdb", "vqa2.train2014_questions", "vqa2.val2014_questions"]
        sources += ["vqa2.test2015_questions"] if self.split == "test" else []
        if not any(self.layout.files(key) for key in sources):
            raise self._missing(*sources)
        path = self.layout.find("vqa2.answers")
        if path is None:
            raise UserError(f"vqa2: answer list not found: {self.layout.where('vqa2.answers')}")
        self.answers = read_answers(path, self.config.outputs)
        sources = existing(self.layout, f"vqa2.{self.split}_imdb", *OFFICIAL, "coco.val_annotations")
        self.rows = read_through(self, sources, {"answers": self.answers}, self._content)
        self.labelled = self.rows.values["labelled"]
        arrays = self.rows.arrays
        self.question_ids, self.part, self.image_ids = arrays["question_ids"], arrays["part"], arrays["image_ids"]
        self.starts, self.score_index, self.score_value = (
            arrays[name] for name in ("starts", "score_index", "score_value")
        )
        self.questions = self.rows.strings("questions")
        self.columns = (self.questions,)
        parts = [PARTS[part] for part in np.unique(self.part)]
        parts += ["train", "val"] if set(parts) - {"test2015"} else []
        found = {f"coco.{part}_images": self.layout.find(f"coco.{part}_images") for part in parts}
        # opened here and not when an image is wanted: forked workers share the indices of shards
        self._folders = {key: path and self._opened(path) for key, path in found.items()}

    def _content(self) -> Content:
        index_of = indices(self.answers)
        ids, images, scores, questions = [], [], [], []
        seen = set()
        out_of_list = 0
        for where, question_id, image, question, answers in self._rows():
            if question_id in seen:
                self.findings.note("question id twice", f"{where}: question_id {question_id} was used before")
            seen.add(question_id)
            ids.append(question_id)
            images.append(image)
            questions.append(question)
            if answers is not None:
                scores.append(soft_scores(answers, index_of))
                if not scores[-1]:
                    out_of_list += 1
                    self.findings.note(
                        "question whose answers are all outside the list",
                        f"{where}: question_id {question_id}: {printable(', '.join(sorted(set(answers))), 80)}",
                    )
        content = Content(values={"labelled": len(scores) > 0})
        content.put_strings("questions", questions)
        content.arrays |= {
            "question_ids": np.array(ids, dtype=np.int64),
            "part": np.array([PARTS.index(part) for part, _ in images], dtype=np.uint8),
            "image_ids": np.array([image_id for _, image_id in images], dtype=np.int64),
            "starts": np.concatenate([[0], np.cumsum([len(s) for s in scores])]).astype(np.int64),
            "score_index": np.array([i for s in scores for i in s], dtype=np.int32),
            "score_value": np.array([v for s in scores for v in s.values()], dtype=np.float32),
        }
        self.facts.update(
            questions=len(ids),
            images=len(set(images)),
            answers=len(self.answers),
        )
        if scores:
            self.facts["with an answer in the list"] = len(ids) - out_of_list
        return content

    def __len__(self) -> int:
        return len(self.question_ids)

    def meaning(self) -> dict[str, str]:
        return super().meaning() | {"answers": hash_of(self.answers)}

    def sample_id(self, index: int) -> int:
        return int(self.question_ids[index])

    def _fields(self, index: int, geometry: Geometry) -> dict:
        """``input_ids`` and so on, and ``answer_scores`` float32 [answers] where the split has answers."""
        sample = {
            **self._encode(index),
            "image_id": int(self.image_ids[index]),
            "sample_id": self.sample_id(index),
        }
        if self.labelled:
            rows = slice(self.starts[index], self.starts[index + 1])
            scores = torch.zeros(len(self.answers))
            # copies: torch takes no arrays that are mapped read-only
            index = torch.from_numpy(self.score_index[rows].astype(np.int64))
            scores[index] = torch.from_numpy(self.score_value[rows].copy())
            sample["answer_scores"] = scores
        return sample

    def image_path(self, index: int) -> Path:
        """COCO 2014 / 2015 image of a question; the 2017 folders hold the same images and serve where it is absent."""
        part, image_id = PARTS[self.part[index]], int(self.image_ids[index])
        places = [(f"coco.{part}_images", f"COCO_{part}_{image_id:012d}.jpg")]
        if part != "test2015":
            places += [("coco.train_images", f"{image_id:012d}.jpg"), ("coco.val_images", f"{image_id:012d}.jpg")]
        first = None
        for key, name in places:
            if self._folders[key] is not None:
                path = self._inside(self._folders[key], name)
                if path.exists():
                    return path
                first = first or path
        return first or self.layout.root / "coco" / "images" / part / f"COCO_{part}_{image_id:012d}.jpg"

    def image_paths(self):
        parts = (PARTS[part] for part in self.part.tolist())
        row_of = {image: index for index, image in enumerate(zip(parts, self.image_ids.tolist()))}
        return ((self.image_path(row_of[image]), None) for image in sorted(row_of))

    def _rows(self):
        """(where, question id, (part, image id), question, answers or None) of every question of the split."""
        imdb = self.layout.files(f"vqa2.{self.split}_imdb")
        if imdb:
            self.facts["files"] = [str(path) for path in imdb]
            for path in imdb:
                yield from self._imdb(path)
            return
        if self.split == "test" and (path := self.layout.find("vqa2.test2015_questions")) is not None:
            self.facts["files"] = [str(path)]
            yield from self._questions(path, "test2015", {})
            return
        yield from self._official()

    def _imdb(self, path):
        def question(record, where):
            question_id = files.integer(record, "question_id", where)
            text = files.string(record, "question_str" if "question_str" in record else "question", where)
            image_name = files.string(record, "image_name", where)
            matched = _PART.fullmatch(image_name)
            if matched is None:
                raise UserError(
                    f"{where}: image_name {printable(image_name)!r} is not like COCO_train2014_000000000009"
                )
            return question_id, (matched[1], int(matched[2])), text, self._imdb_answers(record, where)

        name = printable(path, 400)
        records = ((f"{name}: record {n}", record) for n, record in enumerate(read_records(path)))
        for where, (question_id, image, text, answers) in self.findings.parsed("malformed question", records, question):
            if self.split == "test":
                answers = None
            elif answers is None:
                self.findings.note("question without answers", f"{where}: question_id {question_id}")
                continue
            yield where, question_id, image, text, answers

    @staticmethod
    def _imdb_answers(record, where):
        """The answers of an imdb record: the first of three keys that is there, without a trailing ``<copy>``."""
        for key in ("answers", "valid_answers", "all_answers"):
            if key in record and record[key] is not None:
                answers = files.sequence(record, key, where)
                if not all(isinstance(answer, str) for answer in answers):
                    raise UserError(f"{where}: {key} must be a list of texts")
                return [answer.removesuffix("<copy>") for answer in answers] or None
        return None

    def _official(self):
        parts = {}
        for part in ("train2014", "val2014"):
            questions = self.layout.find(f"vqa2.{part}_questions")
            if questions is not None:
                annotations = self.layout.find(f"vqa2.{part}_annotations")
                parts[part] = (questions, self._annotations(annotations) if annotations is not None else {})
        self.facts["files"] = [str(path) for path, _ in parts.values()]
        rows = [row for part, (path, answers) in parts.items() for row in self._questions(path, part, answers)]
        unanswered = [row for row in rows if row[4] is None]
        answered = [row for row in rows if row[4] is not None]
        self.facts["questions without answers"] = len(unanswered)
        if self.split == "test":
            self.facts["split by"] = "questions without answers"
            yield from unanswered
            return
        val_list = self.layout.find("coco.val_annotations")
        val_ids = coco_image_ids(val_list) if val_list is not None else set()
        if any(row[2][1] in val_ids for row in answered):
            self.facts["split by"] = str(val_list)
            in_val = [row[2][1] in val_ids for row in answered]
        else:
            self.facts["split by"] = "the files' names (no answered question on a COCO val2017 image)"
            in_val = [row[2][0] == "val2014" for row in answered]
        yield from (row for row, val in zip(answered, in_val) if val == (self.split == "val"))

    def _questions(self, path, part, answers):
        def question(record, where):
            question_id = files.integer(record, "question_id", where)
            image_id = files.integer(record, "image_id", where)
            text = files.string(record, "question", where)
            if not 0 <= image_id < 10**12:
                raise UserError(f"{where}: image_id {image_id} is not a COCO image id")
            said = answers.get(question_id)
            if said is not None and said[0] != image_id:
                raise UserError(f"{where}: image_id {image_id}, but its annotation says {said[0]}")
            return question_id, (part, image_id), text, said and said[1]

        name = printable(path, 400)
        asked = set()
        records = files.records(files.read_json(path), "questions", name)
        for where, found in self.findings.parsed("malformed question", records, question):
            asked.add(found[0])
            yield where, *found
        for question_id in answers.keys() - asked:
            self.findings.note("annotation without its question", f"{name}: question_id {question_id} is missing")

    def _annotations(self, path) -> dict[int, tuple[int, list[str]]]:
        """Question id -> (image id, answers)."""

        def annotation(record, where):
            question_id = files.integer(record, "question_id", where)
            answers = files.sequence(record, "answers", where)
            said = [files.string(answer, "answer", f"{where}.answers[{m}]") for m, answer in enumerate(answers)]
            if not said:
                raise UserError(f"{where}: answers is empty")
            return question_id, files.integer(record, "image_id", where), said

        out = {}
        content = files.read_json(path, drop=("question_type", "answer_type", "answer_confidence", "answer_id"))
        records = files.records(content, "annotations", printable(path, 400))
        for where, (question_id, image_id, said) in self.findings.parsed("malformed annotation", records, annotation):
            if question_id in out:
                self.findings.note("annotation id twice", f"{where}: question_id {question_id} was used before")
            out[question_id] = (image_id, said)
        return out
