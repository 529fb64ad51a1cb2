"""One's own questions about images, image and text pairs, and texts: a table a split, classes found in it."""

from pathlib import Path

import numpy as np
import torch

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.images.geometry import Geometry
from unit_fast.data.layout import Layout
from unit_fast.data.readers.categories import Outputs
from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.own_images import ImageFinder
from unit_fast.data.readers.own_outputs import find_outputs
from unit_fast.data.readers.own_rows import Row, find_tables, has_tables, read_rows
from unit_fast.data.readers.sources import read_through
from unit_fast.data.readers.tables import annotations_of
from unit_fast.data.readers.vqa2 import indices, soft_scores
from unit_fast.data.shards.member import Member, NoMember
from unit_fast.data.store.content import Content, hash_of
from unit_fast.errors import UserError, nearest, printable
from unit_fast.tasks import ANSWER, CLASSIFY, ENTAIL, Task


class Own(Dataset):
    """A split of one's own data set. The names of its outputs are ``config.classes``."""

    of: Task

    @classmethod
    def present(cls, layout: Layout) -> bool:
        """Whether the data root has tables of this kind."""
        return has_tables(layout, cls.of)

    @classmethod
    def outputs_of(cls, task: Task, data: DataConfig, config: TaskConfig) -> Outputs:
        """The answers or classes of the training and validation tables, in a fixed order."""
        classes, lines = find_outputs(task, data)
        if config.outputs not in (0, len(classes)):
            raise UserError(
                f"model.tasks.{task.name}.outputs: is {config.outputs}, but the tables have {len(classes)}; give 0, "
                "which takes what they have"
            )
        return Outputs(classes=classes, lines=lines)

    def _read(self) -> None:
        tables = find_tables(self.layout, self.task)
        paths = tables.of(self.split)
        if not paths:
            raise self._missing(f"{self.task.short}.{self.split}")
        self.facts["files"] = [str(path) for path in paths]
        if tables.one_for_all and self.split != "test":
            self.facts["held out"] = f"a tenth, by a hash of the {'image' if self.task.has_image else 'text'}"
        depends = {
            "classes": list(self.config.classes), "columns": self.data.columns, "one for all": tables.one_for_all,
        }  # fmt: skip
        sources = {"files": paths, "annotations": [found for path in paths if (found := annotations_of(path))]}
        self.rows = read_through(self, sources, depends, self._content)
        self.labelled = self.rows.values["labelled"]
        self.answers = list(self.config.classes) if self.task.loss == "bce" else []
        self.columns = tuple(self.rows.strings(f"text{i}") for i in range(self.rows.values["texts"]))
        self.ids = self.rows.strings("ids")
        if self.task.has_image:
            self.images = self.rows.strings("images")
            self._find_images([path.parent for path in paths])

    def _content(self) -> Content:
        rows = read_rows(self.layout, self.task, self.split, self.data, self.findings)
        content = self._scores(rows) if self.task.loss == "bce" else self._labels(rows)
        texts = max((len(row.texts) for row in rows), default=1)
        content.values = {"labelled": any(row.said for row in rows), "texts": texts}
        for i in range(texts):
            content.put_strings(f"text{i}", [row.texts[i] if i < len(row.texts) else "" for row in rows])
        seen = set()
        for row in rows:
            if row.id in seen:
                self.findings.note("id twice", f"{row.where}: id {printable(row.id)} was used before")
            seen.add(row.id)
        content.put_strings("ids", [row.id for row in rows])
        if self.task.has_image:
            content.put_strings("images", [row.image for row in rows])
            self.facts["images"] = len({row.image for row in rows})
        return content

    def _labels(self, rows: list[Row]) -> Content:
        index_of = {name: index for index, name in enumerate(self.config.classes)}
        labels = []
        for row in rows:
            labels.append(index_of.get(row.said[0], -1) if row.said else -1)
            if row.said and labels[-1] < 0:
                self.findings.error(
                    "unknown label",
                    f"{row.where}: label {printable(row.said[0], 60)!r} is none of the {len(index_of)} classes; "
                    f"{nearest(row.said[0], list(index_of)[:20])}",
                )
        self.facts["rows"] = len(rows)
        self.facts["rows by class"] = {name: labels.count(i) for i, name in enumerate(self.config.classes)}
        return Content({"labels": np.array(labels, dtype=np.int32)})

    def _scores(self, rows: list[Row]) -> Content:
        index_of = indices(list(self.config.classes))
        scores = [soft_scores(list(row.said), index_of) for row in rows]
        for row, score in zip(rows, scores):
            if row.said and not score:
                self.findings.note(
                    "question whose answers are all outside the list",
                    f"{row.where}: {printable(', '.join(sorted(set(row.said))), 80)}",
                )
        self.facts.update(questions=len(rows), answers=len(self.config.classes) - 1)
        return Content(
            {
                "starts": np.concatenate([[0], np.cumsum([len(s) for s in scores])]).astype(np.int64),
                "score_index": np.array([i for s in scores for i in s], dtype=np.int32),
                "score_value": np.array([v for s in scores for v in s.values()], dtype=np.float32),
                "answered": np.array([bool(row.said) for row in rows]),
            }
        )

    def _word_pieces(self, vocab_size):
        if not self.findings.strict and self.layout.find("bert.vocab") is None:
            return None  # a check of the files: training makes a vocabulary of them
        return super()._word_pieces(vocab_size)

    def __len__(self) -> int:
        return len(self.ids)

    def meaning(self) -> dict[str, str]:
        name = "answers" if self.task.loss == "bce" else "classes"
        return super().meaning() | {name: hash_of(self.config.classes)}

    def sample_id(self, index: int) -> int | str:
        """What the table calls the row, else its number in the table, from 0."""
        name = self.ids[index]
        return int(name) if name.isdecimal() and str(int(name)) == name and len(name) < 19 else name

    def _fields(self, index: int, geometry: Geometry | None) -> dict:
        """``input_ids`` and so on, and ``label``, or ``answer_scores`` float32 [answers], where the row has one."""
        sample = {**self._encode(index), "sample_id": self.sample_id(index)}
        arrays = self.rows.arrays
        if self.task.has_image:
            sample["image_id"] = self.images[index]
        if self.task.loss == "ce":
            return sample | ({"label": int(arrays["labels"][index])} if arrays["labels"][index] >= 0 else {})
        if arrays["answered"][index]:
            part = slice(arrays["starts"][index], arrays["starts"][index + 1])
            scores = torch.zeros(len(self.answers))
            # copies: torch takes no arrays that are mapped read-only
            at = torch.from_numpy(arrays["score_index"][part].astype(np.int64))
            scores[at] = torch.from_numpy(arrays["score_value"][part].copy())
            sample["answer_scores"] = scores
        return sample

    def image_path(self, index: int) -> Path | Member | NoMember:
        """The image of a row; ``BadImage`` when its name leads out of the data root."""
        name = self.images[index]
        if name not in self._places:
            self._places[name] = self.finder.find(name)
        return self._places[name]

    def _images(self) -> list[int]:
        row_of = {name: index for index, name in enumerate(self.images)}
        return [row_of[name] for name in sorted(row_of)]

    def _find_images(self, beside: list[Path]) -> None:
        """Open the folders of the images. More missing ones than a run bears are an error at once."""
        key = f"{self.task.short}.images"
        folder = self.layout.find(key)
        places = [*([] if folder is None else [folder]), *beside, self.layout.root]
        places = [folder] if key in self.layout.overrides else list(dict.fromkeys(places))
        self.finder = ImageFinder([self._opened(place) for place in places], self._inside)
        self._places: dict[str, Path | Member | NoMember] = {}
        if not self.findings.strict:  # the check looks at every one, and says which
            return
        names = sorted(set(self.images))
        missing = [name for name in names if self.finder.missing(name)]
        if len(missing) > self.data.max_bad_share * len(names):
            raise UserError(
                f"{self.task.short} {self.split}: {len(missing):,} of {len(names):,} images are missing, the first is "
                f"{printable(missing[0])!r} ({self.finder.missing(missing[0])}); looked in "
                f"{' and '.join(printable(place, 200) for place in places)}; correct the names, or give "
                f"--data.paths {key}=FOLDER"
            )


class Answer(Own):
    """Questions about images, with answers."""

    of = ANSWER


class Entail(Own):
    """Images with a text, and a label for both."""

    of = ENTAIL


class Classify(Own):
    """Texts or pairs of texts, with a label."""

    of = CLASSIFY
