"""Folders in Pascal VOC's format: an XML file an image, boxes as corners in pixels counted from 1, the last included.

Either ``Annotations``, ``JPEGImages`` and lists in ``ImageSets/Main``, or the XML files beside their images, in a
folder a split or in one. Objects marked ``difficult`` are neither trained on nor scored, as in VOC's own evaluation.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from unit_fast.data.prepare.labelled import SPLITS, SUFFIXES, Box, Labelled, LabelledImage, size_of
from unit_fast.data.store import files
from unit_fast.errors import UserError, printable

_XML_LIMIT = 16 * 2**20


def read_voc(source: Path) -> Labelled:
    """Images and boxes of the folder ``source``. ``UserError`` naming the file of what is wrong."""
    found = _files(source)
    if not any(found.values()):
        raise UserError(f"{printable(source, 400)}: no XML file of annotations; they are looked for in Annotations/, "
                        "in train/, valid/ and test/, and in the folder itself")  # fmt: skip
    read = {split: [_parsed(path) for path in paths] for split, paths in found.items() if paths}
    names = sorted({name for images in read.values() for _, _, boxes in images for name, *_ in boxes})
    if not names:
        raise UserError(f"{printable(source, 400)}: no object in {sum(map(len, read.values())):,} XML files")
    number = {name: n for n, name in enumerate(names)}
    lines = [f"classes in alphabetical order: VOC has no list of them ({printable(', '.join(names), 200)})"]
    splits, difficult = {}, 0
    for split, images in read.items():
        splits[split] = []
        for path, stated, boxes in images:
            image = _image_of(path, source)
            height, width = size_of(image)
            if stated is not None and stated != (height, width):
                raise UserError(
                    f"{printable(path, 400)}: says {stated[1]} x {stated[0]} pixels, {printable(image, 400)} has "
                    f"{width} x {height}: its boxes are of another picture"
                )
            rows = [Box(number[name], x, y, w, h, hard) for name, x, y, w, h, hard in boxes]
            difficult += sum(row.crowd for row in rows)
            splits[split].append(LabelledImage(image, image.name, height, width, rows))
    if difficult:
        lines.append(f"{difficult:,} objects are marked difficult: neither trained on nor scored (iscrowd 1)")
    return Labelled(names, splits, lines)


def _files(source: Path) -> dict[str, list[Path]]:
    """Split -> its XML files."""
    lists = source / "ImageSets" / "Main"
    folder = source / "Annotations"
    found: dict[str, list[Path]] = {}
    if folder.is_dir():
        for split in SPLITS:
            if (lists / f"{split}.txt").is_file():
                found[split] = [folder / f"{name}.xml" for name in _listed(lists / f"{split}.txt")]
        if "train" not in found and (lists / "trainval.txt").is_file():
            found["train"] = [folder / f"{name}.xml" for name in _listed(lists / "trainval.txt")]
        return found or {"train": sorted(folder.rglob("*.xml"))}
    for split, words in SPLITS.items():
        place = next((source / word for word in words if (source / word).is_dir()), None)
        if place is not None and (paths := sorted(place.rglob("*.xml"))):
            found[split] = paths
    return found or {"train": sorted(source.rglob("*.xml"))}


def _listed(path: Path) -> Iterable[str]:
    """The names in a list; what may stand after one, as in the lists of a class, is of no interest."""
    return [line.split()[0] for _, line in files.read_lines(path) if line.strip()]


def _parsed(path: Path) -> tuple[Path, tuple[int, int] | None, list[tuple]]:
    """(file, stated (height, width) or None, (name, x, y, w, h, difficult) of each object)."""
    where = printable(path, 400)
    with files.open_file(path, _XML_LIMIT) as file:
        raw = file.read()
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise UserError(f"{where}: has a document type; VOC's files have none")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{where}: not XML ({printable(error)})") from None
    sides = [_number(root.find(f"size/{side}"), where, f"size/{side}", 0.0) for side in ("height", "width")]
    boxes = []
    for n, thing in enumerate(root.iter("object")):
        place = f"{where}: object {n}"
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{place}: has no name")
        corners = [_number(thing.find(f"bndbox/{key}"), place, key) for key in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = corners
        if x2 < x1 or y2 < y1:
            raise UserError(f"{place}: bndbox {corners}: xmax and ymax must not be below xmin and ymin")
        x, y = max(x1 - 1, 0.0), max(y1 - 1, 0.0)  # some tools count from 0
        hard = (thing.findtext("difficult") or "0").strip() == "1"
        boxes.append((name, x, y, x2 - x, y2 - y, hard))
    return path, (int(sides[0]), int(sides[1])) if all(sides) else None, boxes


def _number(element, where: str, key: str, missing: float | None = None) -> float:
    text = (element.text or "").strip() if element is not None else ""
    if not text and missing is not None:
        return missing
    try:
        return files.number({key: float(text)}, key, where)
    except ValueError:
        raise UserError(f"{where}: {key} must be a number, found {printable(text or 'nothing', 40)!r}") from None


def _image_of(path: Path, source: Path) -> Path:
    """The image of an XML file: of its name, in ``JPEGImages``, beside it, or in ``images``."""
    folders = [source / "JPEGImages", path.parent, path.parent.parent / "images", source / "images"]
    for folder in folders:
        for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)):
            if os.path.isfile(image := folder / f"{path.stem}{suffix}"):
                return image
    raise UserError(
        f"{printable(path, 400)}: its image {printable(path.stem, 100)}.jpg (.jpeg, .png) is not in "
        f"{printable(', '.join(str(f) for f in folders if f.is_dir()), 400)}"
    )
