"""Folders in YOLO's format: a text file an image, a line an object, numbers relative to the image.

A line is ``class cx cy w h`` (a fifth number, the confidence of a prediction, is left out) or ``class x1 y1 x2 y2 x3
y3 ...``, a polygon, whose box is taken. With ``kpt_shape`` in ``data.yaml`` the numbers after the box are key points.
"""

import math
import re
from pathlib import Path

from unit_fast.data.prepare.labelled import SPLITS, Box, Labelled, LabelledImage, images_below, size_of
from unit_fast.data.store import files
from unit_fast.errors import UserError, printable

_LISTS = ("classes.txt", "labels/classes.txt", "obj.names", "classes.names", "data/obj.names")
_YAML_LIMIT = 2**20
_SLACK = 1e-3
"""How far beyond the image rounding may bring a box."""


def read_yolo(source: Path) -> Labelled:
    """Images and boxes of the folder ``source``. ``UserError`` naming file and line of what is wrong."""
    yamls = [p for p in sorted(source.glob("*.y*ml")) if p.suffix in (".yaml", ".yml")]
    described = next((p for p in yamls if p.stem in ("data", "dataset")), yamls[0] if len(yamls) == 1 else None)
    facts = _yaml(described) if described else {}
    classes = _names(facts, described) if "names" in facts else _list(source)
    keypoints = "kpt_shape" in facts
    lines, splits, seen = [], {}, set()
    for split, images in _images(source, facts, described).items():
        new = [(path, name) for path, name in images if path not in seen]
        if images and not new:
            lines.append(f"{split}: has no images of its own, left out")
        elif new:
            splits[split] = [_labelled(path, name, classes, keypoints) for path, name in new]
            seen.update(path for path, _ in new)
    if not splits:
        raise UserError(f"{printable(source, 400)}: no images (.jpg, .jpeg, .png) found in YOLO's folders")
    if not any(image.boxes for images in splits.values() for image in images):
        raise UserError(f"{printable(source, 400)}: no label file with a box; they are looked for in labels/ beside "
                        "images/, and beside the images")  # fmt: skip
    empty = sum(not image.boxes for images in splits.values() for image in images)
    if empty:
        lines.append(f"{empty:,} images have no label file or an empty one: images without objects")
    return Labelled(classes, splits, lines)


def _yaml(path: Path) -> dict:
    import yaml

    with files.open_file(path, _YAML_LIMIT) as file:
        raw = file.read()
    try:
        found = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{printable(path, 400)}: not YAML ({printable(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{printable(path, 400)}: expected keys (train, val, names), found {type(found).__name__}")
    return found


def _names(facts: dict, path: Path) -> list[str]:
    """The classes that ``data.yaml`` names: a list, or number -> name."""
    names = facts["names"]
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise UserError(f"{printable(path, 400)}: names: the numbers must go from 0 to {len(names) - 1}")
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names or not all(isinstance(n, (str, int, float)) for n in names):
        raise UserError(f"{printable(path, 400)}: names must be a list of names, or numbers with names")
    return [str(name) for name in names]


def _list(source: Path) -> list[str]:
    path = next((source / name for name in _LISTS if (source / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{printable(source, 400)}: no data.yaml with names and no classes.txt; write one name a line into "
            "classes.txt, in the order of the class numbers"
        )
    names = [line.strip() for _, line in files.read_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"{printable(path, 400)}: must have one name a line, without empty lines")
    return names


def _images(source: Path, facts: dict, described: Path | None) -> dict[str, list[tuple[Path, str]]]:
    """Split -> (image, name to write it under) of all its images."""
    found = {}
    for split, words in SPLITS.items():
        given = next((facts[w] for w in words if facts.get(w)), None)
        if given is not None:
            images = []
            for place in given if isinstance(given, list) else [given]:
                images += _of_place(source, facts, described, split, place)
            found[split] = images
    if found:
        return found
    for split, words in SPLITS.items():
        for folder in (source / form.format(w) for w in words for form in ("images/{}", "{}/images", "{}")):
            if folder.is_dir():
                found[split] = _named(images_below(folder), folder)
                break
    whole = source / "images" if (source / "images").is_dir() else source
    return {split: images for split, images in found.items() if images} or {"train": _named(images_below(whole), whole)}


def _of_place(source: Path, facts: dict, described: Path, split: str, place) -> list[tuple[Path, str]]:
    """The images of what ``data.yaml`` says of a split: a folder, or a text file with an image a line."""
    if not isinstance(place, str):
        raise UserError(f"{printable(described, 400)}: {split}: expected a path, found {printable(repr(place), 60)}")
    base = facts.get("path")
    bases = [source / base] if isinstance(base, str) and (source / base).is_dir() else []
    bases.append(source)
    inner = re.sub(r"^(\.\./)+", "", place)  # Roboflow writes ../train/images of a folder that lies here
    candidates = [folder / p for folder in bases for p in (place, inner)]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        if split == "test":
            return []  # often named and not there
        raise UserError(
            f"{printable(described, 400)}: {split}: {printable(place, 200)} is not there; looked for "
            f"{printable(', '.join(map(str, dict.fromkeys(candidates))), 600)}"
        )
    if path.is_dir():
        return _named(images_below(path), path)
    out = []
    for number, line in files.read_lines(path):
        if line.strip():
            options = [folder / line.strip() for folder in (path.parent, *bases)]
            image = next((p for p in options if p.is_file()), None)
            if image is None:
                raise UserError(f"{printable(path, 400)}:{number}: {printable(line, 200)}: no such image")
            out.append(image)
    return _named(out, Path(*_common(out)))


def _common(paths: list[Path]) -> tuple[str, ...]:
    parts = [path.parent.parts for path in paths]
    count = 0
    while parts and all(len(p) > count and p[count] == parts[0][count] for p in parts):
        count += 1
    return parts[0][:count] if parts else ()


def _named(paths: list[Path], folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.relative_to(folder).as_posix()) for path in paths]


def _labels_of(image: Path) -> Path | None:
    """The label file of an image: in ``labels`` in the place of the last ``images`` of its path, or beside it."""
    parts = list(image.parts)
    places = [image.with_suffix(".txt")]
    if "images" in parts[:-1]:
        at = len(parts) - 2 - parts[:-1][::-1].index("images")
        places.insert(0, Path(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt"))
    else:
        places.append(image.parent / "labels" / f"{image.stem}.txt")
        places.append(image.parent.parent / "labels" / f"{image.stem}.txt")
    return next((place for place in places if place.is_file()), None)


def _labelled(path: Path, name: str, classes: list[str], keypoints: bool) -> LabelledImage:
    height, width = size_of(path)
    boxes, labels = [], _labels_of(path)
    for number, line in files.read_lines(labels) if labels is not None else ():
        if line.strip():
            boxes.append(_box(line, f"{printable(labels, 400)}:{number}", classes, keypoints, height, width))
    return LabelledImage(path, name, height, width, boxes)


def _box(line: str, where: str, classes: list[str], keypoints: bool, height: int, width: int) -> Box:
    words = line.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise UserError(f"{where}: {printable(line, 80)!r}: expected numbers: class cx cy w h") from None
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: {printable(line, 80)!r}: has a number that is not finite")
    label, rest = values[0], values[1:]
    if not label.is_integer() or not 0 <= label < len(classes):
        raise UserError(f"{where}: class {printable(words[0], 20)}: there are {len(classes)}, from 0 to "
                        f"{len(classes) - 1}; correct the file, or name the class")  # fmt: skip
    if len(rest) in (4, 5) or (keypoints and len(rest) > 4):
        cx, cy, w, h = rest[:4]
        if w < 0 or h < 0:
            raise UserError(f"{where}: {printable(line, 80)!r}: a width or height below 0")
        corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        given = rest[:4]
    elif len(rest) >= 6 and len(rest) % 2 == 0:
        corners = [min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2])]
        given = rest
    else:
        raise UserError(f"{where}: has {len(rest)} numbers after the class; a box has 4, a polygon 6, 8, ...")
    if min(given) < -_SLACK or max(given) > 1 + _SLACK:
        raise UserError(f"{where}: {printable(line, 80)!r}: numbers must lie within 0..1, relative to the image")
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in corners)
    return Box(int(label), x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height)
