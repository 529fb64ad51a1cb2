"""The generated world: all eight data sets, in their real file formats and layout, from one set of drawn scenes.

``generate`` is the only entry. COCO, Visual Genome and VQA share scenes as the real sets share photographs (Visual
Genome's validation images are COCO val2017's, half of its training images are COCO train2017's); SNLI-VE has scenes of
its own. Every file is a pure function of (seed, scale): same arguments, same bytes.
"""

import json
import math
import os
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from unit_fast.data.generated import glue, text
from unit_fast.data.generated.scene import COLORS, Scene, crowd_region, draw_scene, render
from unit_fast.errors import UserError, printable

MARKER = ".generated_world.json"
_FORMAT = 1
_PARTS = ("coco", "visual_genome", "vqa2", "snli_ve", "glue", "bert")

COCO_CATEGORIES = {"red": 1, "green": 18, "blue": 37, "yellow": 44, "white": 90}
"""Category -> id, with gaps as in COCO. COCO's categories are the colours here, Visual Genome's the shapes."""

_VG_OBJECTS = (
    ("brick", "block"),
    ("ladder", "rungs"),
    ("ring", "hoop"),
)
_VG_ATTRIBUTES = (*((color,) for color in COLORS), ("small", "little"), ("large", "big"))
VG_OBJECT_IDS = {names[0]: i + 1 for i, names in enumerate(_VG_OBJECTS)}
"""Kind -> category id: the line in ``objects_vocab.txt``, from 1."""
VG_ATTRIBUTE_IDS = {names[0]: i + 1 for i, names in enumerate(_VG_ATTRIBUTES)}
"""Colour or size -> attribute id: the line in ``attributes_vocab.txt``, from 1."""

_SIZES = {  # at scale 1: train, val
    "coco": (4000, 300),
    "vg": (3000, None),  # validation: COCO's
    "flickr": (2000, 300),
    "glue": (4000, 500),
}


def generate(folder: str | Path, seed: int = 0, scale: float = 1.0, progress=None, *, imdb: bool = False) -> dict:
    """Write the world into ``folder`` (created; a world generated earlier is replaced) and describe it.

    ``scale`` multiplies the number of scenes and sentences (1: 4000 training scenes of COCO, 3000 of Visual Genome,
    2000 of SNLI-VE, 4000 pairs of each GLUE task; about ten seconds). ``progress(done, total)`` is called with images
    drawn. ``imdb`` writes VQA as MMF's arrays instead of the official files.

    Returns ``{"folder", "seed", "scale", "counts": {task: {split: samples}}, "blind": {"vqa2", "snli_ve"}}``; ``blind``
    is the validation score of the best answer to each text alone, learned from the training split.

    ``UserError`` when ``folder`` is a file or holds anything that was not generated.
    """
    if not (isinstance(scale, (int, float)) and 0 < scale <= 1000):
        raise UserError(f"scale must be a number above 0 and at most 1000, found {scale!r}; 1 gives the demo's size")
    target = Path(folder).resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        described = _World(partial, seed, scale, progress, imdb).write()
        summary = {"folder": str(folder), "seed": seed, "scale": scale, **described}
        _write_json(partial / MARKER, {"format": _FORMAT, "seed": seed, "scale": scale, "counts": summary["counts"]})
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give a folder for the generated world")
    entries = sorted(p.name for p in target.iterdir())
    foreign = [e for e in entries if e not in (*_PARTS, MARKER)] if MARKER in entries else entries
    if foreign:
        raise UserError(
            f"{target} holds {printable(foreign[0])}, which unit-fast did not generate, and would be replaced; "
            "give a new or empty folder"
        )


class _World:
    """One generation: draws scenes, writes files, counts."""

    def __init__(self, root: Path, seed: int, scale: float, progress, imdb: bool):
        self.root, self.seed, self.imdb = root, seed, imdb
        self.progress = progress or (lambda done, total: None)
        self.sizes = {
            name: (max(8, round(train * scale)), None if val is None else max(8, round(val * scale)))
            for name, (train, val) in _SIZES.items()
        }
        self.counts: dict[str, dict[str, int]] = defaultdict(dict)
        self.blind: dict[str, float] = {}
        self.done, self.total = 0, sum(n or 0 for name in ("coco", "flickr") for n in self.sizes[name])
        self.total += self.sizes["vg"][0] // 2

    def write(self) -> dict:
        coco = {split: self._coco(split) for split in ("train", "val")}
        self._visual_genome(coco)
        self._vqa(coco)
        self._snli_ve()
        self._glue()
        vocabulary = self.root / "bert" / "vocab.txt"
        vocabulary.parent.mkdir()
        vocabulary.write_text("".join(token + "\n" for token in text.VOCABULARY), encoding="utf-8")
        return {"counts": dict(self.counts), "blind": self.blind}

    def rng(self, *key) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *key))))

    def scene(self, path: Path, *key, crowds=False) -> Scene:
        """Draw the scene named by ``key`` and write its image to ``path``."""
        scene = draw_scene(self.rng("scene", *key), crowds=crowds)
        path.write_bytes(render(scene))
        self.done += 1
        self.progress(self.done, self.total)
        return scene

    def folder(self, *parts) -> Path:
        path = self.root.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _coco(self, split: str) -> dict[int, Scene]:
        """COCO 2017 ``split``; returns image id -> scene."""
        year = f"{split}2017"
        images, older = self.folder("coco", "images", year), self.folder("coco", "images", f"{split}2014")
        scenes, records, annotations = {}, [], []
        for i in range(self.sizes["coco"][split == "val"]):
            image_id = 7 * i + (139 if split == "val" else 9)  # never equal modulo 7
            name = f"{image_id:012}.jpg"
            scene = scenes[image_id] = self.scene(images / name, "coco", split, i, crowds=True)
            _link(images / name, older / f"COCO_{split}2014_{name}")
            records.append(
                {
                    "license": 1, "file_name": name, "coco_url": f"http://images.cocodataset.org/{year}/{name}",
                    "height": scene.height, "width": scene.width, "date_captured": "2017-09-01 00:00:00",
                    "flickr_url": "", "id": image_id,
                }
            )  # fmt: skip
            for thing in scene.things:
                category = COCO_CATEGORIES[thing.color]
                outline = [v for point in thing.polygon for v in point]
                record = {"segmentation": [outline], "area": thing.area, "iscrowd": 0, "bbox": list(thing.box)}
                annotations.append({**record, "image_id": image_id, "category_id": category})
            if scene.crowd:
                segmentation, area, box = crowd_region(scene)
                category = COCO_CATEGORIES[scene.crowd[0].color]
                record = {"segmentation": segmentation, "area": area, "iscrowd": 1, "bbox": box}
                annotations.append({**record, "image_id": image_id, "category_id": category})
        first = 1 if split == "train" else 1_000_001
        annotations = [{**a, "id": first + i} for i, a in enumerate(annotations)]
        _write_json(
            self.folder("coco", "annotations") / f"instances_{year}.json",
            {
                "info": {"description": "Generated world of unit_fast", "version": "1.0", "year": 2017},
                "licenses": [{"url": "", "id": 1, "name": "No known copyright restrictions"}],
                "images": records,
                "annotations": annotations,
                "categories": [
                    {"supercategory": "shape", "id": i, "name": name} for name, i in COCO_CATEGORIES.items()
                ],
            },
        )
        self.counts["detection_coco"][split] = len(records)
        return scenes

    def _visual_genome(self, coco: dict[str, dict[int, Scene]]) -> None:
        """Both forms: scene graphs with vocabularies, and the COCO-style files made from them."""
        graphs, image_data, coco_style = [], [], {"train": [], "val": []}
        plain = {split: [i for i, scene in scenes.items() if not scene.crowd] for split, scenes in coco.items()}
        shared = {"val": plain["val"], "train": plain["train"][: (self.sizes["vg"][0] + 1) // 2]}
        own = self.sizes["vg"][0] - len(shared["train"])
        plan = [("train", coco_id) for coco_id in shared["train"]] + [("train", None)] * own
        plan += [("val", coco_id) for coco_id in shared["val"]]
        object_id = 1_058_000
        for i, (split, coco_id) in enumerate(plan):
            image_id = i + 1
            directory = ("VG_100K", "VG_100K_2")[image_id % 2]
            path = self.folder("visual_genome", "images", directory) / f"{image_id}.jpg"
            if coco_id is None:
                scene = self.scene(path, "vg", i)
            else:
                scene = coco[split][coco_id]
                _link(self.root / "coco" / "images" / f"{split}2017" / f"{coco_id:012}.jpg", path)
            graph = self._graph(scene, image_id, object_id)
            object_id += len(graph["objects"])
            graphs.append(graph)
            size = {"width": scene.width, "height": scene.height}
            url = f"https://cs.stanford.edu/people/rak248/{directory}/{image_id}.jpg"
            image_data.append({**size, "url": url, "image_id": image_id, "coco_id": coco_id, "flickr_id": None})
            record = {"id": image_id, "file_name": f"{directory}/{image_id}.jpg", **size}
            coco_style[split].append((record, scene, graph["objects"]))
        base = self.folder("visual_genome")
        _write_json(base / "scene_graphs.json", graphs)
        _write_json(base / "image_data.json", image_data)
        vocabularies = self.folder("visual_genome", "1600-400-20")
        for name, lines in (("objects", _VG_OBJECTS), ("attributes", _VG_ATTRIBUTES)):
            content = "".join(",".join(names) + "\n" for names in lines)
            (vocabularies / f"{name}_vocab.txt").write_text(content, encoding="utf-8")
        for split, entries in coco_style.items():
            _write_json(
                self.folder("visual_genome", "annotations") / f"instances_{split}_split_by_coco_2017.json",
                {
                    "images": [record for record, _, _ in entries],
                    "annotations": [
                        _vg_annotation(record["id"], thing, item)
                        for record, scene, items in entries
                        for thing, item in zip(scene.things, items)
                    ],
                    "categories": [{"id": i, "name": name} for name, i in VG_OBJECT_IDS.items()],
                },
            )
            self.counts["detection_visual_genome"][split] = len(entries)

    def _graph(self, scene: Scene, image_id: int, object_id: int) -> dict:
        """The scene graph of ``scene``: names and attributes in any of their spellings, boxes in whole pixels."""
        rng = self.rng("graph", image_id)
        objects, relationships = [], []
        for i, thing in enumerate(scene.things):
            x, y, w, h = thing.box
            left, top = math.floor(x), math.floor(y)
            objects.append(
                {
                    "synsets": [f"{thing.kind}.n.01"], "object_id": object_id + i,
                    "names": [rng.choice(_VG_OBJECTS[VG_OBJECT_IDS[thing.kind] - 1])],
                    "attributes": [rng.choice(_VG_ATTRIBUTES[VG_ATTRIBUTE_IDS[a] - 1]) for a in thing.attributes],
                    "x": left, "y": top, "w": math.ceil(x + w) - left, "h": math.ceil(y + h) - top,
                }
            )  # fmt: skip
            for j, other in enumerate(scene.things):
                if i != j and text.is_beside(thing, "left of", other):
                    pair = {"object_id": object_id + j, "subject_id": object_id + i}
                    number = 10 * (object_id + i) + j
                    relationships.append({"synsets": [], "predicate": "left of", "relationship_id": number, **pair})
        return {"relationships": relationships, "image_id": image_id, "objects": objects}

    def _vqa(self, coco: dict[str, dict[int, Scene]]) -> None:
        asked = {split: self._questions(split, scenes) for split, scenes in coco.items()}
        for split, (questions, annotations) in asked.items():
            (self._imdb if self.imdb else self._official)(split, questions, annotations)
            self.counts["vqa2"][split] = len(questions)
        _write_json(self.folder("vqa2") / "trainval_label2ans.json", list(text.ANSWERS))
        _write_json(self.folder("vqa2") / "trainval_ans2label.json", {a: i for i, a in enumerate(text.ANSWERS)})
        self.blind["vqa2"] = _blind(*([
            (question["question"], [a["answer"] for a in annotation["answers"]])
            for question, annotation in zip(*asked[split])
        ] for split in ("train", "val")))  # fmt: skip

    def _official(self, split: str, questions: list[dict], annotations: list[dict]) -> None:
        common = {
            "info": {"description": "Generated world of unit_fast", "version": "2.0", "year": 2017},
            "license": {"url": "", "name": "none"}, "data_type": "mscoco", "data_subtype": f"{split}2014",
        }  # fmt: skip
        folder, name = self.folder("vqa2"), f"mscoco_{split}2014"
        questions_file = {**common, "task_type": "Open-Ended", "questions": questions}
        _write_json(folder / f"v2_OpenEnded_{name}_questions.json", questions_file)
        _write_json(folder / f"v2_{name}_annotations.json", {**common, "annotations": annotations})

    def _imdb(self, split: str, questions: list[dict], annotations: list[dict]) -> None:
        """MMF's array: a header, then a dict a question."""
        rows: list[dict] = [{"version": 1, "dataset_name": "vqa2", "has_answer": True}]
        for question, annotation in zip(questions, annotations):
            name = f"COCO_{split}2014_{question['image_id']:012}"
            answers = [a["answer"] for a in annotation["answers"]]
            extra = {"image_name": name, "question_str": question["question"], "answers": answers}
            rows.append({"image_id": question["image_id"], "question_id": question["question_id"], **extra})
        np.save(self.folder("vqa2") / f"imdb_{split}2017.npy", np.array(rows, dtype=object), allow_pickle=True)

    def _questions(self, split: str, scenes: dict[int, Scene]) -> tuple[list[dict], list[dict]]:
        """Two different questions about each scene without a crowd."""
        questions, annotations = [], []
        for image_id, scene in scenes.items():
            if scene.crowd:
                continue
            rng = self.rng("vqa", split, image_id)
            seen: set[str] = set()
            while len(seen) < 2:
                asked = text.ask(rng, scene, rng.choices(list(text.QUESTION_KINDS), text.QUESTION_KINDS.values())[0])
                if asked is None or asked[0] in seen:
                    continue
                question, answer, question_type, answer_type = asked
                key = {"image_id": image_id, "question_id": 1000 * image_id + len(seen)}
                seen.add(question)
                questions.append({**key, "question": question})
                annotations.append(
                    {
                        "question_type": question_type, "multiple_choice_answer": answer,
                        "answers": text.annotators(rng, answer, answer_type), **key, "answer_type": answer_type,
                    }
                )  # fmt: skip
        return questions, annotations

    def _snli_ve(self) -> None:
        images = self.folder("snli_ve", "flickr30k_images")
        rows = {"train": [], "dev": []}
        for split, number in zip(rows, self.sizes["flickr"]):
            for i in range(number):
                photo = 1_000_000_007 + 9_973 * (2 * i + (split == "dev"))
                scene = self.scene(images / f"{photo}.jpg", "flickr", split, i)
                rng = self.rng("snli_ve", split, i)
                premise = text.caption(scene)
                for k, label in enumerate(rng.sample(("entailment", "neutral", "contradiction"), 2)):
                    said = text.hypothesis(rng, scene, label)
                    # The data set was released with both spellings of the image key; each split has one here.
                    image = {"Flickr30K_ID": str(photo)} if split == "train" else {"Flikr30kID": f"{photo}.jpg"}
                    row = {**image, "annotator_labels": [label], "captionID": f"{photo}.jpg#0", "gold_label": label}
                    row["pairID"] = f"{photo}.jpg#0r{k + 1}{label[0]}"
                    for name, sentence in (("sentence1", premise), ("sentence2", said)):
                        binary, parse = glue.parses(sentence)
                        row |= {name: sentence, f"{name}_binary_parse": binary, f"{name}_parse": parse}
                    rows[split].append(row)
            content = "".join(json.dumps(row) + "\n" for row in rows[split])
            (self.folder("snli_ve") / f"snli_ve_{split}.jsonl").write_text(content, encoding="utf-8")
            self.counts["visual_entailment"]["val" if split == "dev" else split] = len(rows[split])
        self.blind["snli_ve"] = _blind(*([(r["sentence2"], [r["gold_label"]]) for r in rows[s]] for s in rows))

    def _glue(self) -> None:
        train, val = self.sizes["glue"]
        glue.write_tables(self.root / "glue", self.rng, train, val)
        for task in ("glue_sst2", "glue_qnli", "glue_qqp", "glue_mnli_mismatched"):
            self.counts[task] = {"train": train, "val": val}


def _vg_annotation(image_id: int, thing, item: dict) -> dict:
    """The COCO-style annotation of one object of a scene graph."""
    attributes = [VG_ATTRIBUTE_IDS[a] for a in thing.attributes]
    return {
        "id": item["object_id"], "image_id": image_id, "category_id": VG_OBJECT_IDS[thing.kind],
        "bbox": [item[k] for k in "xywh"], "area": item["w"] * item["h"], "iscrowd": 0,
        "attribute_ids_max16": attributes + [-1] * (16 - len(attributes)),
    }  # fmt: skip


def _blind(train: list[tuple[str, list[str]]], val: list[tuple[str, list[str]]]) -> float:
    """Validation score without the image: to each text its most frequent training answer (unseen texts: of all).

    An answer scores ``min(1, votes / 3)`` among ten voters as in VQA, and right or wrong for a single label.
    """
    by_text, overall = defaultdict(Counter), Counter()
    for said, answers in train:
        by_text[said].update(answers)
        overall.update(answers)
    score = 0.0
    for said, answers in val:
        best = (by_text.get(said) or overall).most_common(1)[0][0]
        score += min(1.0, answers.count(best) / min(3, len(answers)))
    return round(score / len(val), 4)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
