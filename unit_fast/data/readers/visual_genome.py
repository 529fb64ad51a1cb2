"""Visual Genome (SPEC 4.1, 4.2): the authors' COCO-style files, or the published scene graphs with vocabularies.

Where the annotations come from, in this order:

1. ``instances_{train,val}_split_by_coco_2017.json``, the authors' files. The test split is the val file.
2. One COCO-style file for all images (``vg.annotations``).
3. ``scene_graphs.json``, or ``objects.json`` with ``attributes.json``, turned into boxes with the 1600 object and 400
   attribute names of the vocabularies.

For 2 and 3 an image belongs to val when its ``coco_id`` (in its own record or in ``image_data.json``) is one of COCO
val2017, and to train otherwise; without a known ``coco_id`` (null, or no list of val2017) it belongs to train. So no
training image is an image of COCO's val, as far as the ids are known.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from unit_fast.data.readers.coco import read_instances
from unit_fast.data.readers.detection import Detection
from unit_fast.data.readers.objects import ATTRIBUTES
from unit_fast.data.readers.sources import existing
from unit_fast.data.store import files
from unit_fast.data.store.content import Content, hash_of
from unit_fast.errors import UserError, printable

VOCABULARIES = ("vg.object_vocab", "vg.attribute_vocab")
SPLIT_BY = ("vg.image_data", "coco.val_annotations")
"""Layout keys of the files that say which split an image belongs to."""


def read_vocabulary(path: Path, first: int = 1) -> tuple[dict[str, int], dict[int, str]]:
    """A vocabulary file: one entry a line, commas between synonyms, ids are line numbers from ``first``.

    Returns:
        name -> id, all synonyms included (the first line with a name wins), and id -> first name of the line.
    """
    ids, names = {}, {}
    for number, line in files.read_lines(path):
        synonyms = [name.strip().lower() for name in line.split(",")]
        if not any(synonyms):
            raise UserError(f"{printable(path, 400)}:{number}: empty line; a vocabulary has one entry a line")
        names[number - 1 + first] = next(name for name in synonyms if name)
        for name in synonyms:
            if name:
                ids.setdefault(name, number - 1 + first)
    if not names:
        raise UserError(f"{printable(path, 400)}: empty; a vocabulary has one entry a line")
    return ids, names


class VisualGenome(Detection):
    """Visual Genome with 1600 object classes and up to 16 of 400 attributes an object."""

    def _read(self) -> None:
        split = "val" if self.split == "test" else self.split
        if (path := self.layout.find(f"vg.{split}_annotations")) is not None:
            self.facts["file"] = str(path)
            sources, build = {"file": [path]}, partial(read_instances, self, path)
        elif (path := self.layout.find("vg.annotations")) is not None:
            self.facts["file"] = str(path)
            sources, build = existing(self.layout, "vg.annotations", *SPLIT_BY), partial(self._from_annotations, path)
        else:
            sources = existing(self.layout, "vg.scene_graphs", "vg.objects", "vg.attributes", *VOCABULARIES, *SPLIT_BY)
            build = partial(self._from_scene_graphs, split)
        self._fill(sources, build, "vg.images")

    def meaning(self) -> dict[str, str]:
        path = self.layout.find("vg.attribute_vocab")
        names = {} if path is None else {"attributes": hash_of(sorted(read_vocabulary(path)[1].items()))}
        return super().meaning() | names

    def image_path(self, index: int) -> Path:
        """The images lie in one folder or in the two of the download; ``file_name`` may name one of the two."""
        name = self.objects.file_names[index]
        path = self._inside(self.folder, name)
        if not path.exists():
            for part in ("VG_100K", "VG_100K_2"):
                other = self._inside(self.folder, f"{part}/{Path(name).name}")
                if other.exists():
                    return other
        return path

    def _from_annotations(self, path) -> Content:
        coco_ids = self._coco_ids()
        self._val_images()
        return read_instances(self, path, lambda record, i: self._belongs(record.get("coco_id", coco_ids.get(i))))

    def _coco_ids(self) -> dict[int, int | None]:
        """Visual Genome image id -> COCO image id, from ``image_data.json``."""
        path = self.layout.find("vg.image_data")
        return {} if path is None else {i: record[3] for i, record in self._image_records(path).items()}

    def _belongs(self, coco_id) -> bool:
        """Whether an image with this ``coco_id`` is in the split (module docstring)."""
        in_val = type(coco_id) is int and coco_id in self._val_images()
        return in_val == (self.split != "train")

    def _val_images(self) -> set[int]:
        if not hasattr(self, "_val_ids"):
            path = self.layout.find("coco.val_annotations")
            self._val_ids = coco_image_ids(path) if path is not None else set()
            self.facts["split by"] = str(path) if path is not None else "no list of COCO val2017: all images are train"
        return self._val_ids

    def _image_records(self, path):
        """image id -> (file name, height, width, coco_id) from ``image_data.json``."""
        out = {}
        for where, record in _listed(path):
            try:
                # the first releases say "id" where the later ones say "image_id"
                image_id = files.integer(record, "image_id" if "image_id" in record else "id", where)
                url = files.string(record, "url", where)
                coco_id = record.get("coco_id")
                if coco_id is not None:
                    coco_id = files.integer(record, "coco_id", where)
                entry = (
                    "/".join(url.split("/")[-2:]),
                    files.side(record, "height", where),
                    files.side(record, "width", where),
                    coco_id,
                )
            except (UserError, TypeError) as problem:
                self.findings.error("malformed image record", str(problem))
                continue
            if image_id in out:
                self.findings.error("image id twice", f"{where}: image_id {image_id} was used before")
            out[image_id] = entry
        return out

    def _from_scene_graphs(self, split) -> Content:
        graphs = self.layout.find("vg.scene_graphs")
        plain = self.layout.find("vg.objects")
        image_data = self.layout.find("vg.image_data")
        vocabularies = [self.layout.find(key) for key in VOCABULARIES]
        if graphs is None and plain is None:
            raise self._missing(f"vg.{split}_annotations", "vg.annotations", "vg.scene_graphs")
        for key, found in zip(("vg.image_data", *VOCABULARIES), (image_data, *vocabularies)):
            if found is None:
                raise UserError(f"vg: scene graphs need also {self.layout.where(key)}")
        class_ids, names = read_vocabulary(vocabularies[0])
        attribute_ids, _ = read_vocabulary(vocabularies[1])
        if len(names) > self.class_limit():
            raise UserError(
                f"{printable(vocabularies[0], 400)}: {len(names)} classes, but the task's {self.config.outputs} "
                f"outputs allow {self.class_limit()}; set the task's outputs to {len(names) + 2}"
            )
        if max(attribute_ids.values()) > self.attribute_limit:
            raise UserError(
                f"{printable(vocabularies[1], 400)}: {max(attribute_ids.values())} attributes, but the model has "
                f"{self.attribute_limit + 1} attribute outputs"
            )
        records = {i: r for i, r in self._image_records(image_data).items() if self._belongs(r[3])}
        path = graphs or plain
        self.facts["file"] = str(path)
        self._val_images()
        described = self._attributes_of_objects() if graphs is None else {}

        self._described = self._named = self._attributes = self._known_attributes = 0
        rows: dict[int, list[tuple]] = {}
        for where, (image_id, graph) in self._graphs(path):
            if image_id not in records:
                continue
            _, height, width, _ = records[image_id]
            for m, record in enumerate(files.sequence(graph, "objects", where)):
                self._object(
                    record, f"{where}.objects[{m}]", (height, width), class_ids, attribute_ids, described,
                    rows.setdefault(image_id, []),
                )  # fmt: skip
        images = [(i, name, height, width) for i, (name, height, width, _) in records.items() if i in rows]
        self.facts["images without scene graph"] = len(records) - len(images)
        if self._named == 0 < self._described:
            self.findings.error(
                "no object in the vocabulary",
                f"{printable(path, 400)}: none of {self._described} objects has a name in "
                f"{printable(vocabularies[0], 400)}; give the vocabulary of these scene graphs",
            )
        if self._known_attributes == 0 < self._attributes:
            self.findings.error(
                "no attribute in the vocabulary",
                f"{printable(path, 400)}: none of {self._attributes} attributes is in "
                f"{printable(vocabularies[1], 400)}; give the vocabulary of these scene graphs",
            )
        return self.packed(images, rows, names, printable(path, 400))

    def _graphs(self, path):
        """(where, (image id, record)) of each image of a file of scene graphs, of objects or of attributes."""
        listed = _listed(path, drop=("relationships", "synsets", "merged_object_ids"))
        return self.findings.parsed(
            "malformed image record", listed, lambda graph, where: (files.integer(graph, "image_id", where), graph)
        )

    def _attributes_of_objects(self) -> dict[int, list]:
        """Object id -> attribute names, from ``attributes.json``."""
        path = self.layout.find("vg.attributes")
        if path is None:
            self.findings.note("no attributes", f"{self.layout.where('vg.attributes')} is missing")
            return {}
        out = {}
        for where, (_, graph) in self._graphs(path):
            for m, record in enumerate(files.sequence(graph, "attributes", where)):
                if isinstance(record, dict) and record.get("attributes"):
                    out[files.integer(record, "object_id", f"{where}.attributes[{m}]")] = record["attributes"]
        return out

    def _object(self, record, where, size, class_ids, attribute_ids, described, rows):
        """Add one object to ``rows`` if a name of it is in the vocabulary and its box has area in the image."""
        try:
            object_id = files.integer(record, "object_id", where)
            names = files.sequence(record, "names", where) if "names" in record else [record.get("name")]
            box = tuple(files.number(record, key, where) for key in "xywh")
        except UserError as problem:
            self.findings.error("malformed annotation", str(problem))
            return
        self._described += 1
        label = next((class_ids[n] for n in map(_normal, names) if n in class_ids), None)
        if label is None:
            self.findings.note("object outside the vocabulary", f"{where}: {printable(repr(names), 80)}")
            return
        self._named += 1
        if box[2] < 0 or box[3] < 0:
            # raw crowd-sourced boxes, not somebody's training file: left out like the other boxes without area
            self.findings.note("negative box", f"{where}: w {box[2]:g}, h {box[3]:g}")
            return
        if not self.check_box(box, *size, where):
            return
        wanted = record.get("attributes") or described.get(object_id) or []
        if not isinstance(wanted, list):
            self.findings.error("malformed annotation", f"{where}: attributes must be a list of names")
            return
        known = dict.fromkeys(attribute_ids[a] for a in map(_normal, wanted) if a in attribute_ids)
        self._attributes += len(wanted)
        self._known_attributes += len(known)
        rows.append((label, *box, box[2] * box[3], False, tuple(known)[:ATTRIBUTES]))


def _listed(path, drop=()) -> Iterator[tuple[str, object]]:
    """(where it stands, the record) of each image of a file that is a list of them."""
    name = printable(path, 400)
    content = files.read_json(path, drop=drop)
    if not isinstance(content, list) or not content:
        raise UserError(f"{name}: expected a list of images")
    for n, record in enumerate(content):
        yield f"{name}: [{n}]", record


def _normal(name) -> str:
    return " ".join(name.lower().split()) if isinstance(name, str) else ""


def coco_image_ids(path: Path) -> set[int]:
    """Ids of all images in a COCO file."""
    name = printable(path, 400)
    content = files.read_json(path, drop=("segmentation", "annotations"))
    return {files.integer(record, "id", where) for where, record in files.records(content, "images", name)}
