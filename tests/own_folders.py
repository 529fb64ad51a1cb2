"""One's own detection data as people have them: the same images and boxes in the forms of several tools."""

import json
import os
from pathlib import Path

from tests.data_roots import write
from unit_fast.data.generated.world import generate

NAMES, IDS = ("bolt", "nut", "washer"), (5, 17, 900)
IMAGES = 30


def scenes(folder: Path) -> dict[str, list[dict]]:
    """Split -> images of the generated world: path, width, height, and (class index, x, y, w, h) of objects of three
    classes; every tenth image without any."""
    if not folder.is_dir():
        generate(folder, seed=0, scale=0.01)
    out = {}
    for split, count in (("train", IMAGES - 8), ("val", 8)):
        content = json.loads((folder / f"coco/annotations/instances_{split}2017.json").read_text())
        out[split] = []
        for n, image in enumerate(content["images"][:count]):
            rows = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
            boxes = [(a["category_id"] % 3, *a["bbox"]) for a in rows if n % 10]
            path = folder / f"coco/images/{split}2017" / image["file_name"]
            out[split].append({"path": path, "width": image["width"], "height": image["height"], "boxes": boxes})
    return out


def content(images: list[dict], ids=IDS, names=NAMES, *, extra=(), first=1, **changes) -> dict:
    """A file in COCO's format. extra: categories before the classes; changes: of every annotation, None leaves out."""
    rows = []
    for n, image in enumerate(images, first):
        for label, x, y, w, h in image["boxes"]:
            row = {"id": len(rows) + 1, "image_id": n, "category_id": ids[label], "bbox": [x, y, w, h], "area": w * h}
            row |= {"iscrowd": 0} | {k: v(len(rows)) if callable(v) else v for k, v in changes.items()}
            rows.append({k: v for k, v in row.items() if v != "absent"})
    return {
        "images": [
            {"id": n, "file_name": i["path"].name, "width": i["width"], "height": i["height"]}
            for n, i in enumerate(images, first)
        ],
        "annotations": rows,
        "categories": [*extra, *({"id": i, "name": name} for i, name in zip(ids, names))],
    }


def place(images: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        os.link(image["path"], folder / image["path"].name)


def plain(root: Path, found: dict) -> Path:
    """``annotations/instances_train2017.json`` and ``train2017``, ids with gaps."""
    for split, images in found.items():
        write(root / f"annotations/instances_{split}2017.json", content(images))
        place(images, root / f"{split}2017")
    return root


def roboflow(root: Path, found: dict) -> Path:
    """Annotations beside the images, ids from 0, of which 0 is the super-category."""
    top = {"id": 0, "name": "hardware", "supercategory": "none"}
    for split, folder in (("train", "train"), ("val", "valid")):
        made = content(found[split], (1, 2, 3), extra=[top], first=0)
        for category in made["categories"][1:]:
            category["supercategory"] = "hardware"
        write(root / folder / "_annotations.coco.json", made)
        place(found[split], root / folder)
    return root


def cvat(root: Path, found: dict) -> Path:
    """One file for all, ``images/``; no validation split."""
    images = found["train"] + found["val"]
    write(root / "annotations/instances_default.json", content(images, (1, 2, 3)))
    place(images, root / "images")
    return root


def yolo(root: Path, found: dict) -> Path:
    """``data.yaml``, ``train/images``, ``train/labels``; every other object as a polygon of its corners."""
    for split, folder in (("train", "train"), ("val", "valid")):
        place(found[split], root / folder / "images")
        for image in found[split]:
            lines = []
            for n, (label, x, y, w, h) in enumerate(image["boxes"]):
                x, w, y, h = x / image["width"], w / image["width"], y / image["height"], h / image["height"]
                points = (x, y, x + w, y, x + w, y + h, x, y + h)
                numbers = points if n % 2 else (x + w / 2, y + h / 2, w, h)
                lines.append(" ".join([str(label), *(f"{v:.9f}" for v in numbers)]))
            if lines or image is found[split][0]:  # of the others without objects there is no file
                name = image["path"].with_suffix(".txt").name
                write(root / folder / "labels" / name, "".join(f"{line}\n" for line in lines))
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 3\n"
          f"names: {list(NAMES)}\n")  # fmt: skip
    return root


def voc(root: Path, found: dict) -> Path:
    """``Annotations``, ``JPEGImages``, ``ImageSets/Main``."""
    for split, images in found.items():
        place(images, root / "JPEGImages")
        write(root / f"ImageSets/Main/{split}.txt", "".join(f"{i['path'].stem}\n" for i in images))
        for image in images:
            things = "".join(
                f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for label, x, y, w, h in image["boxes"]
            )
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            write(root / f"Annotations/{image['path'].stem}.xml", f"<annotation>{size}{things}</annotation>")
    return root


FORMS = {"plain": plain, "roboflow": roboflow, "cvat": cvat}
