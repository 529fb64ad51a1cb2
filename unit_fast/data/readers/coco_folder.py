"""Detection on one's own classes: a folder in COCO's format, as labelling tools export it.

Annotations are looked for at the places of ``layout.PLACES`` (``detect.*``): a file a split, or one for all. Without a
validation file a tenth of the training images, chosen by a hash of their file names, is for validation. The images lie
where the names in the annotations are found: beside them, in ``images``, in a folder named after the split.
"""

from functools import partial
from pathlib import Path, PureWindowsPath

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.errors import MissingSplit
from unit_fast.data.layout import Layout
from unit_fast.data.readers.by_hash import SHARE, held_out
from unit_fast.data.readers.categories import Outputs, classes_of
from unit_fast.data.readers.coco import Coco, read_instances
from unit_fast.data.shards.index import Shards
from unit_fast.data.store import files
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError, printable
from unit_fast.tasks import Task

_LOOKED_AT = 16
"""File names that must be found in a folder for it to be the images'."""
_BEGINNING = 2**20
"""Bytes that are looked at to know a file in COCO's format."""


class CocoFolder(Coco):
    """A user's images and boxes."""

    last_part = False
    """Whether images are found by the last part of their file names alone."""

    @classmethod
    def present(cls, layout: Layout) -> bool:
        try:
            return any(annotations(layout, split) is not None for split in ("train", "val", "test"))
        except UserError:  # several: to be told
            return True

    @classmethod
    def outputs_of(cls, task: Task, data: DataConfig, config: TaskConfig) -> Outputs:
        layout = Layout(data)
        found = {split: path for split in ("train", "val") if (path := annotations(layout, split)) is not None}
        if not found:
            raise MissingSplit(nothing_found(layout))
        outputs = classes_of(dict.fromkeys(found.values()), data, config)
        if "train" in found and found["train"] == found.get("val"):
            line = f"no validation file: one image in {SHARE}, by a hash of its file name, is kept for validation"
            outputs.lines.append(line)
        return outputs

    def _read(self) -> None:
        path = annotations(self.layout, self.split)
        if path is None:
            raise MissingSplit(f"{self.task.short}: no annotations of split {self.split}; {nothing_found(self.layout)}")
        self.facts["file"] = str(path)
        self.annotations, build = path, partial(read_instances, self, path)
        if self.split != "test" and path == annotations(self.layout, "val" if self.split == "train" else "train"):
            self.facts["split by"] = "hash of the file names: there is no validation file"
            build = self._part
        self._fill({"file": [path]}, build, f"detect.{self.split}_images")

    def _part(self) -> Content:
        """The images of one split of a file of both."""
        content = files.read_json(self.annotations, drop=("segmentation", "annotations"))
        rows = content.get("images") if isinstance(content, dict) else None
        names = [r["file_name"] for r in rows or () if isinstance(r, dict) and isinstance(r.get("file_name"), str)]
        val = {name for name, is_val in zip(names, held_out(names)) if is_val}
        return read_instances(
            self, self.annotations, lambda record, _: (record["file_name"] in val) == (self.split == "val")
        )

    def _image_folder(self, key: str) -> Path | Shards:
        if key in self.layout.overrides:
            return self._folder(key)
        count = len(self.objects)
        names = [self.objects.file_names[i * count // _LOOKED_AT] for i in range(min(count, _LOOKED_AT))]
        folders = self._folders(key)
        for self.last_part in (False, True):
            wanted = [self._file_name(name) for name in names]
            here = {folder: sum((folder / name).is_file() for name in wanted) for folder in folders}
            best = max(folders, key=here.__getitem__)  # the first of equals
            if here[best] or not names:
                break
        else:
            looked = ", ".join(str(folder) for folder in folders if folder.is_dir())
            raise UserError(
                f"{printable(self.annotations, 400)}: its images are not found, e.g. {printable(names[0])!r}; looked "
                f"in {printable(looked, 600)}; give --data.paths {key}=FOLDER"
            )
        if self.last_part:
            self.findings.note(
                "images found by the last part of their names", f"{printable(names[0])} as {wanted[0]} in {best}"
            )
        return self._opened(best)

    def image_path(self, index: int) -> Path:
        return self._inside(self.folder, self._file_name(self.objects.file_names[index]))

    def _file_name(self, name: str) -> str:
        """The name as looked for: exporters write paths of the machine that they ran on."""
        return PureWindowsPath(name).name if self.last_part else name

    def _folders(self, key: str) -> list[Path]:
        """Where the images may be, the likeliest first: beside the annotations, then the places of the layout."""
        stem, parent = self.annotations.stem.removeprefix("instances_"), self.annotations.parent
        near = [parent, parent / "images", parent.parent / "images" / stem, parent.parent / stem]
        places = [self.layout.root / place for place in self.layout.places(key)]
        return list(dict.fromkeys([*near, *places]))


def annotations(layout: Layout, split: str) -> Path | None:
    """The annotation file of a split: its own, or for training and validation one that is for all."""
    own = _one(layout, f"detect.{split}_annotations")
    if own is not None or split == "test":
        return own
    if split == "val":
        return annotations(layout, "train")
    return _one(layout, "detect.annotations")


def nothing_found(layout: Layout) -> str:
    """Where one's own annotations are looked for, in words."""
    return (
        f"no annotations in COCO's format under {printable(layout.root, 400)}: looked for train/_annotations.coco.json "
        "(Roboflow), annotations/instances_default.json (CVAT), annotations/instances_train*.json and the like; give "
        "--data.paths detect.train_annotations=FILE, or convert a YOLO or VOC folder with unit-fast data prepare"
    )


def _one(layout: Layout, key: str) -> Path | None:
    if key in layout.overrides:
        return layout.find(key)
    for place in layout.places(key):
        found = [path for path in layout.at(place) if path.is_file() and _is_coco(path)]
        if len(found) > 1:
            names = printable(", ".join(str(path.relative_to(layout.root)) for path in found[:4]), 400)
            raise UserError(
                f"{printable(layout.root, 400)}: {len(found)} files could be {key} ({names}); say which with "
                f"--data.paths {key}=FILE"
            )
        if found:
            return found[0]
    return None


def _is_coco(path: Path) -> bool:
    """Whether a file is one in COCO's format by its name, or by how it begins: others are called ``train.json`` too."""
    if "coco" in path.name or "instances" in path.name:
        return True
    try:
        with files.open_file(path) as file:
            begin = file.read(_BEGINNING)
    except UserError:
        return False
    return begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and (b'"file_name"' in begin or b'"bbox"' in begin)
