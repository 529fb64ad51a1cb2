"""Small data roots written by tests, and the sample of real data beside the repository."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unit_fast.config import DataConfig, TaskConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.tasks import TASKS

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "realdata"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the sample of real data is not beside the repository")

REAL_DATA = DataConfig(root=str(REAL), short_side=96, max_side=160)

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,?'"]
VOCABULARY += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]


def task_config(name: str, **changes) -> TaskConfig:
    """The published numbers of a task, with changes."""
    return next(iter(default_tasks(name, **changes).values()))


def data(root, **changes) -> DataConfig:
    return DataConfig(root=str(root), **changes)


def opened(task: str, root, split="train", config=None, *, augment=False, **changes):
    """A split of a small data set; ``changes`` are of ``DataConfig`` or arguments of ``open_dataset``."""
    config = config or task_config(task, **({"outputs": 4} if task == "vqa2" else {}))
    more = {name: changes.pop(name) for name in ("vocab_size", "attribute_outputs", "findings") if name in changes}
    settings = data(root, **{"short_side": 40, "max_side": 100, **changes})
    return open_dataset(task, split, settings, config, augment=augment, **more)


def write(path: Path, content) -> Path:
    """Text, bytes or JSON to a file whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def no_plain_file(kind: str, path: Path) -> Path:
    """A FIFO, a device, a folder or ("sparse") a file of 10 GiB in the place of a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"{")
        os.truncate(path, 10 * 2**30)  # sparse
    return path


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def box(image_id, number, category, bbox, **more) -> dict:
    made = {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, "iscrowd": 0}
    return made | {"area": bbox[2] * bbox[3]} | more


def coco_file() -> dict:
    """Two images: one with two objects and a crowd, one without any."""
    return {
        "images": [
            {"id": 9, "file_name": "000000000009.jpg", "width": 60, "height": 40},
            {"id": 25, "file_name": "000000000025.jpg", "width": 30, "height": 50},
        ],
        "annotations": [
            box(9, 1, 1, [0, 0, 30, 20], segmentation=[[0, 0, 1, 1]]),
            box(9, 2, 90, [40.5, 10, 40, 40]),
            box(9, 3, 2, [0, 0, 60, 40], iscrowd=1),
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}, {"id": 90, "name": "toothbrush"}],
    }


def coco_root(root: Path, content=None, split: str = "train") -> Path:
    """A root with COCO only."""
    write(root / f"coco/annotations/instances_{split}2017.json", content or coco_file())
    picture(root / f"coco/images/{split}2017/000000000009.jpg", 60, 40)
    picture(root / f"coco/images/{split}2017/000000000025.jpg", 30, 50)
    return root


def whole_root(root: Path) -> Path:
    """All eight data sets, train and val, two or three samples each."""
    write(root / "bert/vocab.txt", "\n".join(VOCABULARY) + "\n")
    coco_root(root)
    val = coco_file()
    for image, number in zip(val["images"], (100, 101)):
        image.update(id=number, file_name=f"{number:012d}.jpg")
    for annotation in val["annotations"]:
        annotation["image_id"] = 100
    write(root / "coco/annotations/instances_val2017.json", val)
    picture(root / "coco/images/val2017/000000000100.jpg", 60, 40)
    picture(root / "coco/images/val2017/000000000101.jpg", 30, 50)

    vg = "visual_genome"
    write(root / vg / "1600-400-20/objects_vocab.txt", "yolk\ncar,automobile\ntree,trees")
    write(root / vg / "1600-400-20/attributes_vocab.txt", "gray,grey\ngreen\ntall")
    graphs = []
    for image_id in (1, 2):
        thing = {"object_id": image_id * 10, "names": ["Trees"], "attributes": ["Grey", "tall", "odd", "gray"]}
        odd = {"object_id": image_id * 10 + 1, "names": ["dragon"], "x": 0, "y": 0, "w": 5, "h": 5}
        graphs.append({"image_id": image_id, "objects": [{**thing, "x": 5, "y": 5, "w": 20, "h": 10}, odd]})
        picture(root / vg / f"images/VG_100K/{image_id}.jpg", 60, 40)
    write(root / vg / "scene_graphs.json", graphs)
    url = "https://example.org/VG_100K_2/{}.jpg"
    write(
        root / vg / "image_data.json",
        [
            {"image_id": i, "url": url.format(i), "width": 60, "height": 40, "coco_id": coco_id}
            for i, coco_id in ((1, None), (2, 100))
        ],
    )

    write(root / "vqa2/trainval_label2ans.json", ["", "yes", "no", "2"])
    for part, image_id in (("train2014", 9), ("val2014", 100)):
        picture(root / f"coco/images/{part}/COCO_{part}_{image_id:012d}.jpg", 60, 40)
        key = {"image_id": image_id, "question_id": image_id * 1000}
        said = [{"answer": a, "answer_id": i} for i, a in enumerate(["yes"] * 8 + ["No", "dunno"], 1)]
        write(root / f"vqa2/v2_OpenEnded_mscoco_{part}_questions.json", {"questions": [{**key, "question": "is it?"}]})
        write(root / f"vqa2/v2_mscoco_{part}_annotations.json", {"annotations": [{**key, "answers": said}]})

    picture(root / "snli_ve/flickr30k_images/77.jpg", 60, 40)
    for name, image in (("train", {"Flickr30K_ID": "77"}), ("dev", {"Flikr30kID": "77.jpg"})):
        rows = [
            {**image, "pairID": f"77.jpg#{i}", "sentence2": f"a cat {i}", "gold_label": gold}
            for i, gold in enumerate(("entailment", "-", "contradiction"))
        ]
        write(root / f"snli_ve/snli_ve_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    for train, dev, folder, header, row in (
        ("train", "dev", "SST-2", "sentence\tlabel", 'a "fine film\t1'),
        ("train", "dev", "QNLI", "index\tquestion\tsentence\tlabel", "0\twho?\thim.\tnot_entailment"),
        ("train", "dev", "QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\twho?\twhat?\t0"),
    ):
        for name in (train, dev):
            write(root / f"glue/{folder}/{name}.tsv", f"{header}\n{row}\n{row}\n")
    head = ["index", "promptID", "pairID", "genre", "p1", "p2", "q1", "q2", "sentence1", "sentence2"]
    for name, labels in (("train", 1), ("dev_mismatched", 5)):
        columns = [*head, *(f"label{i + 1}" for i in range(labels)), "gold_label"]
        rows = [["x"] * 8 + ["premise", "hypothesis"] + ["neutral"] * labels + [gold] for gold in ("neutral", "-")]
        write(root / f"glue/MNLI/{name}.tsv", "".join("\t".join(cells) + "\n" for cells in (columns, *rows)))
    return root


ALL = tuple(TASKS)
