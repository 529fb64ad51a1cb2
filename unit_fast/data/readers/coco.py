"""Detection data in COCO's JSON format (SPEC 4.1), and COCO itself."""

import sys
from pathlib import Path

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.layout import Layout
from unit_fast.data.readers.categories import Outputs, classes_of, read_categories, whole
from unit_fast.data.readers.detection import Detection
from unit_fast.data.readers.objects import ATTRIBUTES
from unit_fast.data.store import files
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError, printable
from unit_fast.tasks import Task


class Coco(Detection):
    """COCO 2017. A class is its category id, as published, where the ids of the file fit the model's outputs; classes
    of other files are numbered by their order."""

    @classmethod
    def outputs_of(cls, task: Task, data: DataConfig, config: TaskConfig) -> Outputs | None:
        if config.outputs == 0:
            return classes_of(_annotations(data), data, config)
        try:
            paths = _annotations(data)
            ids = [category.id for path in paths[:1] for category in read_categories(path, data)]
            if all(1 <= i <= config.outputs - 2 for i in ids):
                return None
            found = classes_of(paths, data, config)
        except UserError:  # the reader says what is wrong
            return None
        if len(found.classes) > config.outputs - 1:
            return None
        line = f"category ids {min(ids)} to {max(ids)} are not within 1..{config.outputs - 2}: numbered by their order"
        return Outputs(found.classes, found.class_ids, [*found.lines, line])

    def _read(self) -> None:
        path = self._file(f"coco.{self.split}_annotations")
        self.has_targets = self.split != "test"
        self._fill({"file": [path]}, lambda: read_instances(self, path), f"coco.{self.split}_images")

    def image_path(self, index: int) -> Path:
        return self._inside(self.folder, self.objects.file_names[index])


def _annotations(data: DataConfig) -> list[Path]:
    layout = Layout(data)
    return [path for s in ("train", "val") if (path := layout.find(f"coco.{s}_annotations")) is not None]


def read_instances(dataset: Detection, path: Path, wanted=None) -> Content:
    """The content of ``Objects`` from a file in COCO's format, checked record by record.

    Args:
        wanted: (image record, image id) -> bool: whether an image belongs to the split; None takes all.
    """
    error, note, parsed = dataset.findings.error, dataset.findings.note, dataset.findings.parsed
    content = files.read_json(path, drop=("segmentation",))
    name = printable(path, 400)
    if not isinstance(content, dict):
        raise UserError(f"{name}: not a COCO file (expected an object with images, annotations and categories)")

    images: dict[int | str, tuple[int | str, str, int, int]] = {}
    elsewhere = set()
    for where, (record, image) in parsed("malformed image record", files.records(content, "images", name), _image):
        image_id = image[0]
        if image_id in images or image_id in elsewhere:
            error("image id twice", f"{where}: id {image_id} was used before; ids must be unique")
        elif wanted is None or wanted(record, image_id):
            images[image_id] = image
        else:
            elsewhere.add(image_id)

    listed: list[tuple[int, str]] = []
    records = files.records(content, "categories", name) if "categories" in content else ()
    for where, (label, title) in parsed("malformed category", records, _category):
        listed.append((label, title))
        if not dataset.by_order:
            dataset.check_class(label, where)
    names = dict(listed)
    if dataset.by_order:
        class_of = dataset.number(listed or [(i, str(i)) for i in sorted(_ids_of_boxes(content))])

    def annotation(record, where):
        number = record.get("id") if isinstance(record, dict) else None  # nothing goes by it
        if number is not None and type(number) is not str:
            number = files.integer(record, "id", where)
        image_id = _image_id(record, "image_id", where)
        label = files.integer(record, "category_id", where)
        box = files.sequence(record, "bbox", where)
        if len(box) != 4:
            raise UserError(f"{where}: bbox must have 4 numbers (x, y, w, h), found {len(box)}")
        box = tuple(files.number({"bbox": value}, "bbox", where) for value in box)
        area = files.number(record, "area", where) if record.get("area") is not None else 0.0
        crowd = record.get("iscrowd") or 0  # null, and false, as pycocotools takes them
        if crowd is not True:
            crowd = files.integer({"iscrowd": crowd}, "iscrowd", where)
        return number, image_id, label, box, area, crowd, _attributes(dataset, record, where)

    rows: dict[int | str, list[tuple]] = {}
    left: dict[int | str, list[tuple[int, tuple]]] = {}
    seen = set()
    records = files.records(content, "annotations", name) if "annotations" in content else ()
    for where, found in parsed("malformed annotation", records, annotation):
        number, image_id, label, box, area, crowd, attributes = found
        if number is not None and number in seen:
            note("annotation id twice", f"{where}: id {number} was used before")
        seen.add(number)
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
        if dataset.by_order:
            if label not in class_of:
                _of_no_class(dataset, label, names, where)
                continue
            label = class_of[label]
        elif not dataset.check_class(label, where):
            continue
        row = (label, *box, area, crowd != 0, attributes)
        if dataset.check_box(box, height, width, where):
            rows.setdefault(image_id, []).append(row)
        elif min(box[2:]) >= 0:  # no target, but an object to be found for whoever scores
            left.setdefault(image_id, []).append((len(rows.get(image_id, ())), row))
    if rows and not names:
        note("no categories", f"{name}: has no categories; its classes are called by their numbers")
        names = {label: str(label) for label in sorted({row[0] for of_image in rows.values() for row in of_image})}
    if dataset.by_order:
        names = dict(enumerate(dataset.config.classes))
    texts = list(images) if any(type(i) is str for i in images) else []
    if texts:  # they are numbered, and kept for whoever asks
        number = {i: n for n, i in enumerate(images, 1)}
        images = {number[i]: (number[i], *image[1:]) for i, image in images.items()}
        rows, left = ({number[i]: found for i, found in of.items()} for of in (rows, left))
    packed = dataset.packed(list(images.values()), rows, names, name, left)
    packed.values["image_ids"] = texts
    if dataset.by_order:
        packed.values["category_ids"] = dataset.ids_of(class_of)
    return packed


def _ids_of_boxes(content: dict) -> set[int]:
    rows = content.get("annotations")
    found = (whole(r.get("category_id")) for r in rows if isinstance(r, dict)) if isinstance(rows, list) else ()
    return {i for i in found if type(i) is int}


def _of_no_class(dataset: Detection, label: int, names: dict[int, str], where: str) -> None:
    """What becomes of a box whose category is not a class: pycocotools does not score one that is not listed."""
    if label not in names:
        dataset.findings.note(
            "category not listed, left out", f"{where}: category_id {label} is not in categories, as pycocotools has it"
        )
        return
    classes = dataset.config.classes
    dataset.findings.error(
        "category that is not a class",
        f"{where}: category {label} ({printable(names[label], 60)}) is not one of the {len(classes)} classes of the "
        f"model ({printable(', '.join(classes), 200)}); rename it, or start a new run with these data",
    )


def _image(record, where):
    """The record itself, and (id, file name, height, width)."""
    image_id = _image_id(record, "id", where)
    file_name = files.string(record, "file_name", where)
    return record, (image_id, file_name, files.side(record, "height", where), files.side(record, "width", where))


def _image_id(record, key: str, where: str) -> int | str:
    value = record.get(key) if isinstance(record, dict) else None
    return value if type(value) is str else files.integer(record, key, where)


def _category(record, where):
    return files.integer(record, "id", where), files.string(record, "name", where)


def _attributes(dataset, record, where) -> tuple[int, ...]:
    """Valid entries of ``attribute_ids_max16``: the rest of the 16 slots is -1."""
    if not dataset.task.attributes or "attribute_ids_max16" not in record:
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
