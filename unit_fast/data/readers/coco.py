"""Detection data in COCO's JSON format (SPEC 4.1, 4.2): COCO itself, and what Visual Genome shares with it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from unit_fast.data.errors import BadImage
from unit_fast.data.images.geometry import TrainTransform
from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.sources import read_through
from unit_fast.data.store import files
from unit_fast.data.store.cache import Content, hash_of
from unit_fast.errors import UserError, printable

ATTRIBUTES = 16
"""Attribute slots of an object (``attribute_ids_max16``)."""


class Objects:
    """Images and boxes of one split in flat arrays: image i has the rows ``starts[i] : starts[i + 1]``.

    Attributes:
        ids, sizes, file_names: int64 [n], int32 [n,2] height and width, n texts.
        starts: int64 [n + 1].
        labels, xywh, area, crowd, attributes: int32 [m], float64 [m,4] and [m] pixels, bool [m], int16 [m,16] with
            -1 in empty places.
        left: what is no target but counts when boxes are scored, objects without area inside the image: ``at`` int64,
            the row of ``labels`` before which one stands in the file, and ``images`` int64 ids, ``labels``, ``xywh``,
            ``area`` and ``crowd`` as above.
        names: class -> name.
    """

    def __init__(self, content: Content):
        """content: from ``pack``, or the same from the cache."""
        arrays = content.arrays
        self.ids, self.sizes, self.file_names = arrays["ids"], arrays["sizes"], content.strings("files")
        self.starts, self.labels, self.xywh = arrays["starts"], arrays["labels"], arrays["xywh"]
        self.area, self.crowd = arrays["area"], arrays["crowd"]
        none = np.broadcast_to(np.int16(-1), (len(self.labels), ATTRIBUTES))
        self.attributes = arrays.get("attributes", none)
        self.left = {name: arrays[f"left.{name}"] for name in ("at", "images", "labels", "xywh", "area", "crowd")}
        self.names = {int(label): name for label, name in content.values["names"]}
        self.content = content

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self) -> int:
        """Number of boxes that a model can be trained on: no crowd regions, with area inside their images."""
        height, width = np.repeat(self.sizes, np.diff(self.starts), axis=0).T
        x, y, w, h = self.xywh.T
        with np.errstate(over="ignore"):  # a box may reach as far as numbers go
            inside = (np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0))
        return int((inside & ~self.crowd).sum())

    def rows(self, index: int) -> slice:
        """The objects of image ``index``."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


def pack(
    images: list[tuple[int, str, int, int]],
    rows: dict[int, list[tuple]],
    names: dict[int, str],
    left: dict[int, list[tuple[int, tuple]]] | None = None,
) -> Content:
    """The arrays of ``Objects``; ``attributes`` only where an object has one.

    Args:
        images: (id, file name, height, width) of each image.
        rows: image id -> (class, x, y, w, h, area, iscrowd, attributes) of its objects.
        names: class -> name.
        left: image id -> (how many of its ``rows`` stand before it in the file, a row as above) of ``Objects.left``.
    """
    ids = [i for i, *_ in images]
    flat = [row for i in ids for row in rows.get(i, ())]
    starts = np.concatenate([[0], np.cumsum([len(rows.get(i, ())) for i in ids])]).astype(np.int64)
    aside = [(int(start) + n, i, row) for start, i in zip(starts, ids) for n, row in (left or {}).get(i, ())]
    content = Content(values={"names": list(names.items())})
    content.put_strings("files", [name for _, name, *_ in images])
    content.arrays |= {
        "ids": np.array(ids, dtype=np.int64),
        "sizes": np.array([(h, w) for *_, h, w in images], dtype=np.int32).reshape(-1, 2),
        "starts": starts,
        **_columns(flat),
        "left.at": np.array([at for at, *_ in aside], dtype=np.int64),
        "left.images": np.array([i for _, i, _ in aside], dtype=np.int64),
        **{f"left.{name}": array for name, array in _columns([row for *_, row in aside]).items()},
    }
    if any(row[7] for row in flat):
        attributes = np.full((len(flat), ATTRIBUTES), -1, dtype=np.int16)
        for i, row in enumerate(flat):
            attributes[i, : len(row[7])] = row[7]
        content.arrays["attributes"] = attributes
    return content


def _columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    return {
        "labels": np.array([row[0] for row in rows], dtype=np.int32),
        "xywh": np.array([row[1:5] for row in rows], dtype=np.float64).reshape(-1, 4),
        "area": np.array([row[5] for row in rows], dtype=np.float64),
        "crowd": np.array([row[6] for row in rows], dtype=bool),
    }


def corners(xywh: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[n,4] x1 y1 x2 y2 clamped to the image, and [n] bool: which have any area left (SPEC 4.2)."""
    with np.errstate(over="ignore"):
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


class Detection(Dataset):
    """A detection data set. Subclasses say in ``_read`` where ``objects`` and the images come from."""

    objects: Objects
    has_targets = True
    """False for images that were published without annotations."""

    def __len__(self) -> int:
        return len(self.objects)

    def sample_id(self, index: int) -> int:
        return int(self.objects.ids[index])

    def meaning(self) -> dict[str, str]:
        return super().meaning() | {"categories": hash_of(sorted(self.class_names.items()))}

    @property
    def class_names(self) -> dict[int, str]:
        """Class -> name."""
        return self.objects.names

    def image_paths(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for index in range(len(self)):
            try:
                yield self.image_path(index), tuple(self.objects.sizes[index].tolist())
            except BadImage as error:
                self.findings.error("file name outside the data root", str(error))

    def _stored_size(self, index: int) -> tuple[int, int]:
        return tuple(self.objects.sizes[index].tolist())

    def _sample(self, index: int, key: int | None, image) -> dict:
        """``image`` [3,H,W] float32, ``labels`` int64 [n], ``boxes`` float32 [n,4] cx cy w h of the image as given,
        ``attributes`` int64 [n,16] (Visual Genome), ids and the stored size."""
        stated = self._stored_size(index)
        sample, geometry = self._image(index, key, image, stated)
        sample["image_id"] = sample["sample_id"] = self.sample_id(index)
        if self.has_targets:
            rows = self.objects.rows(index)
            boxes, keep = corners(self.objects.xywh[rows], *stated)
            keep &= ~self.objects.crowd[rows]
            chosen = np.flatnonzero(keep)
            boxes, inside = geometry.apply_boxes(boxes[chosen])
            chosen = chosen[inside] + rows.start
            sample["boxes"] = torch.from_numpy(boxes)
            sample["labels"] = torch.from_numpy(self.objects.labels[chosen].astype(np.int64))
            if self.task.attributes:
                sample["attributes"] = torch.from_numpy(self.objects.attributes[chosen].astype(np.int64))
        return sample

    def coco_ground_truth(self) -> dict:
        """The split in COCO's JSON format for ``pycocotools.coco.COCO``: all images and all annotations as they are.

        Crowd regions are included, and objects without area inside their image: no targets, but the official tool
        counts them as missed. Annotation ids are numbered anew from 1: COCOeval takes an id of 0 for "not matched", and
        ids must be unique.
        """
        o = self.objects
        if not self.has_targets:
            raise UserError(f"{self.task.short} {self.split}: has no annotations to evaluate against")
        targets = {
            "images": np.repeat(o.ids, np.diff(o.starts)), "labels": o.labels, "xywh": o.xywh, "area": o.area,
            "crowd": o.crowd,
        }  # fmt: skip
        merged = [np.insert(array, o.left["at"], o.left[name], axis=0) for name, array in targets.items()]
        rows = zip(*(array.tolist() for array in merged))
        return {
            "info": {"description": f"{self.task.title} {self.split}"},
            "images": [
                {"id": i, "file_name": name, "height": h, "width": w}
                for i, name, (h, w) in zip(o.ids.tolist(), o.file_names, o.sizes.tolist())
            ],
            "annotations": [
                {"id": n, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for n, (i, label, box, area, crowd) in enumerate(rows, 1)
            ],
            "categories": [{"id": i, "name": name} for i, name in sorted(o.names.items())],
        }

    # ------------------------------------------------------------------------------------------------- reading

    def _read_objects(self, sources: dict[str, list[Path]], build: Callable[[], Content]) -> Objects:
        """The objects that ``build`` makes of the files ``sources``, through the cache."""
        depends = {"classes": self._class_limit(), "attributes": self.attribute_limit if self.task.attributes else 0}
        return Objects(read_through(self, sources, depends, build))

    def _set_up(self, objects: Objects) -> None:
        """Keep ``objects``; choose the transform; count what the training targets leave out."""
        self.objects = objects
        # not ``rows`` of ``columns``: nothing here is tokenised
        self.rows = objects.content
        if self.augment:
            self.transform = TrainTransform(self.data)
        self.facts.update(images=len(objects), boxes=len(objects.labels), crowd=int(objects.crowd.sum()))
        self.facts["images without objects"] = int((np.diff(objects.starts) == 0).sum())
        if len(objects) and self.has_targets and not objects.targets():
            file = printable(self.facts.get("file", self.task.title), 400)
            why = f"{len(objects.labels):,} boxes, {int(objects.crowd.sum()):,} of them crowd regions"
            why += "".join(f", {f.count:,} x {f.kind}" for f in self.findings.found.values())
            if self.split == "train":
                self.findings.error(
                    "no box to train on",
                    f"{file}: no box is left to train on in {len(objects):,} images ({why}); a model would learn to "
                    "find nothing: correct the annotations",
                )
            else:
                self.findings.note("no box to score", f"{file}: {len(objects):,} images ({why})")
        if objects.attributes.size and self.task.attributes:
            self.facts["attributes"] = int((objects.attributes >= 0).sum())

    def _packed(
        self, images: list[tuple], rows: dict[int, list[tuple]], names: dict[int, str], where: str, left=None
    ) -> Content:
        """``pack``, and a look at all boxes together."""
        content = pack(images, rows, names, left)
        boxes = content.arrays["xywh"]
        if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1:
            self.findings.error(
                "boxes relative to the image",
                f"{where}: all {len(boxes):,} boxes lie within 0..1 (first: bbox {boxes[0].tolist()}), as if relative "
                "to the image; COCO's are in pixels: multiply them with its width and height",
            )
        return content

    def _class_limit(self) -> int:
        """Largest class id: the last output is the no-object class."""
        return self.config.outputs - 2

    def _check_class(self, label: int, where: str) -> bool:
        if 1 <= label <= self._class_limit():
            return True
        self.findings.error(
            "class id out of range",
            f"{where}: category_id {label} is outside 1..{self._class_limit()} ({self.task.short} has "
            f"{self.config.outputs} outputs, the last is no-object); correct the file or set the task's outputs",
        )
        return False

    def _check_box(self, box, height: int, width: int, where: str) -> bool:
        """True for a box that is a target or a crowd region; boxes without area inside are noted and left out."""
        x, y, w, h = box
        if w < 0 or h < 0:
            self.findings.error(
                "negative box", f"{where}: bbox {list(box)} has a negative width or height; boxes are x, y, w, h"
            )
            return False
        # as in ``corners``, without arrays: COCO has 860,000 boxes
        if min(max(x + w, 0), width) <= min(max(x, 0), width) or min(max(y + h, 0), height) <= min(max(y, 0), height):
            self.findings.note("box without area inside the image", f"{where}: bbox {list(box)} in {width} x {height}")
            return False
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            self.findings.note("box beyond the border, clipped", f"{where}: bbox {list(box)} in {width} x {height}")
        return True


def read_instances(dataset: Detection, path: Path, wanted=None) -> Content:
    """The content of ``Objects`` from a file in COCO's format, checked record by record.

    Args:
        wanted: (image record, image id) -> bool: whether an image belongs to the split; None takes all.
    """
    error, note = dataset.findings.error, dataset.findings.note
    content = files.read_json(path, drop=("segmentation",))
    name = printable(path, 400)
    if not isinstance(content, dict):
        raise UserError(f"{name}: not a COCO file (expected an object with images, annotations and categories)")

    images: dict[int, tuple[int, str, int, int]] = {}
    elsewhere = set()
    for n, record in enumerate(files.sequence(content, "images", name)):
        where = f"{name}: images[{n}]"
        try:
            image_id = files.integer(record, "id", where)
            file_name = files.string(record, "file_name", where)
            height, width = files.side(record, "height", where), files.side(record, "width", where)
        except UserError as problem:
            error("malformed image record", str(problem))
            continue
        if image_id in images or image_id in elsewhere:
            error("image id twice", f"{where}: id {image_id} was used before; ids must be unique")
        elif wanted is None or wanted(record, image_id):
            images[image_id] = (image_id, file_name, height, width)
        else:
            elsewhere.add(image_id)

    names = {}
    for n, record in enumerate(files.sequence(content, "categories", name) if "categories" in content else []):
        where = f"{name}: categories[{n}]"
        try:
            names[files.integer(record, "id", where)] = files.string(record, "name", where)
        except UserError as problem:
            error("malformed category", str(problem))
            continue
        dataset._check_class(record["id"], where)

    rows: dict[int, list[tuple]] = {}
    left: dict[int, list[tuple[int, tuple]]] = {}
    seen = set()
    for n, record in enumerate(files.sequence(content, "annotations", name) if "annotations" in content else []):
        where = f"{name}: annotations[{n}]"
        try:
            annotation = files.integer(record, "id", where)
            image_id = files.integer(record, "image_id", where)
            label = files.integer(record, "category_id", where)
            box = files.sequence(record, "bbox", where)
            if len(box) != 4:
                raise UserError(f"{where}: bbox must have 4 numbers (x, y, w, h), found {len(box)}")
            box = tuple(files.number({"bbox": value}, "bbox", where) for value in box)
            area = files.number(record, "area", where) if record.get("area") is not None else 0.0
            crowd = files.integer(record, "iscrowd", where) if "iscrowd" in record else 0
            attributes = _attributes(dataset, record, where) if dataset.task.attributes else ()
        except UserError as problem:
            error("malformed annotation", str(problem))
            continue
        if annotation in seen:
            note("annotation id twice", f"{where}: id {annotation} was used before")
        seen.add(annotation)
        if image_id in elsewhere:
            continue
        if image_id not in images:
            error("annotation of an unknown image", f"{where}: image_id {image_id} is not in images; remove the row")
            continue
        if names and label not in names:
            note("category without a name", f"{where}: category_id {label} is not in categories")
        if area <= 0 and box[2] > 0 and box[3] > 0:
            # exporters that know boxes alone write no area, or 0; AP by size goes by it
            note("no area given, that of the box is taken", f"{where}: area {area:g}, bbox {list(box)}")
            area = min(box[2] * box[3], sys.float_info.max)
        _, _, height, width = images[image_id]
        if not dataset._check_class(label, where):
            continue
        row = (label, *box, area, crowd != 0, attributes)
        if dataset._check_box(box, height, width, where):
            rows.setdefault(image_id, []).append(row)
        elif min(box[2:]) >= 0:  # no target, but an object to be found for whoever scores
            left.setdefault(image_id, []).append((len(rows.get(image_id, ())), row))
    if rows and not names:
        note("no categories", f"{name}: has no categories; its classes are called by their numbers")
        names = {label: str(label) for label in sorted({row[0] for of_image in rows.values() for row in of_image})}
    return dataset._packed(list(images.values()), rows, names, name, left)


def _attributes(dataset, record, where) -> tuple[int, ...]:
    """Valid entries of ``attribute_ids_max16``: the rest of the 16 slots is -1."""
    if "attribute_ids_max16" not in record:
        return ()
    values = files.sequence(record, "attribute_ids_max16", where)
    if len(values) != ATTRIBUTES:
        raise UserError(f"{where}: attribute_ids_max16 must have {ATTRIBUTES} numbers, found {len(values)}")
    kept = []
    for value in values:
        value = files.integer({"attribute_ids_max16": value}, "attribute_ids_max16", where)
        if 0 <= value <= dataset.attribute_limit:
            kept.append(value)
        elif value != -1:
            dataset.findings.error(
                "attribute id out of range",
                f"{where}: attribute_ids_max16 has {value}, outside 0..{dataset.attribute_limit} (-1 = empty)",
            )
    return tuple(kept)


class Coco(Detection):
    """COCO 2017."""

    def _read(self) -> None:
        path = self.layout.find(f"coco.{self.split}_annotations")
        if path is None:
            raise self._missing(f"coco.{self.split}_annotations")
        self.has_targets = self.split != "test"
        self.facts["file"] = str(path)
        objects = self._read_objects({"file": [path]}, lambda: read_instances(self, path))
        self.folder = self._folder(f"coco.{self.split}_images")
        self._set_up(objects)

    def image_path(self, index: int) -> Path:
        return self._inside(self.folder, self.objects.file_names[index])
