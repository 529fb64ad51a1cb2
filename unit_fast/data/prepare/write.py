"""A folder in COCO's format: ``annotations/instances_SPLIT.json`` and ``images/SPLIT``."""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.data.prepare.labelled import Labelled, LabelledImage
from unit_fast.errors import UserError, printable


@dataclass
class Written:
    """What was written."""

    folder: Path
    classes: list[str]
    images: dict[str, int]
    """Split -> images."""
    boxes: dict[str, int]
    """Split -> boxes."""
    lines: list[str] = field(default_factory=list)
    """What to tell about it."""


def write(found: Labelled, target: Path, *, copy: bool) -> Written:
    """Write ``found`` into ``target``, which appears when it is whole. ``UserError`` where it cannot be."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{printable(target, 400)}: is there and not an empty folder; give another one")
    partial = target.absolute().parent / f".{target.absolute().name}.partial-{os.getpid()}"
    written = Written(target, found.classes, {}, {}, list(found.lines))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "annotations").mkdir(parents=True)
        linked = not copy
        for split, images in found.splits.items():
            images = _distinct(images)
            linked &= _place(images, partial / "images" / split, copy)
            content = _content(images, found.classes)
            path = partial / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            written.images[split], written.boxes[split] = len(images), len(content["annotations"])
        if not copy:
            written.lines.append("the images are hard links" if linked else "the images are copies: no links there")
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        path = error.filename or target
        raise UserError(
            f"{printable(path, 400)}: cannot be written ({error.strerror or error}); make room or give another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def _place(images: list[LabelledImage], folder: Path, copy: bool) -> bool:
    """The image files under ``folder``; whether all are links."""
    linked = True
    folder.mkdir(parents=True)
    for image in images:
        path = folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        source = image.path.resolve()  # a hard link to a symbolic link would be one
        if copy or not _linked(source, path):
            shutil.copyfile(source, path)
            linked = False
    return linked


def _linked(source: Path, path: Path) -> bool:
    """Whether ``path`` is a hard link to ``source`` now; not every file system has them."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def _distinct(images: list[LabelledImage]) -> list[LabelledImage]:
    """The images with names of their own: several folders may have come together."""
    taken: set[str] = set()
    out = []
    for image in images:
        name, number = Path(image.name), 1
        while name.as_posix() in taken:
            number += 1
            name = Path(image.name).with_stem(f"{Path(image.name).stem}_{number}")
        taken.add(name.as_posix())
        out.append(image._replace(name=name.as_posix()))
    return out


def _content(images: list[LabelledImage], classes: list[str]) -> dict:
    annotations = []
    for number, image in enumerate(images, 1):
        for box in image.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": box.label + 1,
                    "bbox": [box.x, box.y, box.w, box.h], "area": box.w * box.h, "iscrowd": int(box.crowd),
                }
            )  # fmt: skip
    return {
        "images": [
            {"id": n, "file_name": image.name, "height": image.height, "width": image.width}
            for n, image in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, 1)],
    }
