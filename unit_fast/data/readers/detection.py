"""What COCO and Visual Genome share: targets, ground truth, and what is asked of boxes and classes (SPEC 4.2)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unit_fast.data.images.geometry import Geometry, TrainTransform
from unit_fast.data.readers.categories import numbering
from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.objects import Objects, corners, pack
from unit_fast.data.readers.sources import read_through
from unit_fast.data.shards.index import Shards
from unit_fast.data.store.content import Content, hash_of
from unit_fast.errors import UserError, printable


class Detection(Dataset):
    """A detection data set. Subclasses say in ``_read`` where ``objects`` and the images come from."""

    objects: Objects
    has_targets = True
    """False for images that were published without annotations."""

    def __len__(self) -> int:
        return len(self.objects)

    def sample_id(self, index: int) -> int | str:
        return self.objects.image_ids[index] if self.objects.image_ids else int(self.objects.ids[index])

    def meaning(self) -> dict[str, str]:
        return super().meaning() | {"categories": hash_of(sorted(self.class_names.items()))}

    @property
    def class_names(self) -> dict[int, str]:
        """Class -> name."""
        return self.objects.names

    @property
    def by_order(self) -> bool:
        """Whether classes are those of ``config.classes``; otherwise a class is its category id."""
        return bool(self.config.classes)

    @property
    def category_ids(self) -> dict[int, int]:
        """Class -> its category id in the file that was read, for results and ground truth; empty where a class is its
        category id."""
        return dict(enumerate(self.objects.category_ids))

    def number(self, listed: list[tuple[int, str]]) -> dict[int, int]:
        """Category id -> class, of the (id, name) that a file lists; see ``categories.numbering``."""
        return numbering(listed, self.config.classes, self.config.class_ids)

    def ids_of(self, class_of: dict[int, int]) -> list[int]:
        """The category id of every class, from those of the file. A class that the file does not have keeps the id it
        was trained with, or takes a free one."""
        ids = {label: i for i, label in reversed(class_of.items())}
        taken = {*ids.values(), *self.config.class_ids}
        for label in range(len(self.config.classes)):
            wished = self.config.class_ids[label] if self.config.class_ids else None
            if label not in ids and (wished is None or wished in ids.values()):
                taken.add(wished := max(taken, default=0) + 1)
            ids.setdefault(label, wished)
        return [ids[label] for label in range(len(self.config.classes))]

    def _stated_size(self, index: int) -> tuple[int, int]:
        return tuple(self.objects.sizes[index].tolist())

    def _fields(self, index: int, geometry: Geometry) -> dict:
        """``labels`` int64 [n], ``boxes`` float32 [n,4] cx cy w h of the image as given,
        ``attributes`` int64 [n,16] (Visual Genome), ids and the stored size."""
        sample = dict.fromkeys(("image_id", "sample_id"), self.sample_id(index))
        if self.has_targets:
            rows = self.objects.rows(index)
            boxes, keep = corners(self.objects.xywh[rows], *self._stated_size(index))
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
        ids, image_ids = self.category_ids, dict(zip(o.ids.tolist(), o.image_ids or o.ids.tolist()))
        merged = [np.insert(array, o.left["at"], o.left[name], axis=0) for name, array in targets.items()]
        rows = zip(*(array.tolist() for array in merged))
        return {
            "info": {"description": f"{self.task.title} {self.split}"},
            "images": [
                {"id": image_ids[i], "file_name": name, "height": h, "width": w}
                for i, name, (h, w) in zip(o.ids.tolist(), o.file_names, o.sizes.tolist())
            ],
            "annotations": [
                {
                    "id": n, "image_id": image_ids[i], "category_id": ids.get(label, label), "bbox": box, "area": area,
                    "iscrowd": int(crowd),
                }
                for n, (i, label, box, area, crowd) in enumerate(rows, 1)
            ],
            "categories": [{"id": ids.get(label, label), "name": name} for label, name in sorted(o.names.items())],
        }  # fmt: skip

    def _fill(self, sources: dict[str, list[Path]], build: Callable[[], Content], images: str) -> None:
        """Keep the objects that ``build`` makes of the files ``sources``, through the cache, and the folder of the
        layout key ``images``; choose the transform; count what the training targets leave out."""
        depends = {"classes": self.class_limit(), "attributes": self.attribute_limit if self.task.attributes else 0}
        depends |= {"names": list(self.config.classes), "ids": list(self.config.class_ids)}
        # not ``rows`` of ``columns``: nothing here is tokenised
        self.rows = read_through(self, sources, depends, build)
        self.objects = objects = Objects(self.rows)
        self.folder = self._image_folder(images)
        if self.augment:
            self.transform = TrainTransform(self.data)
        self.facts.update(images=len(objects), boxes=len(objects.labels), crowd=int(objects.crowd.sum()))
        self.facts["images without objects"] = int((np.diff(objects.starts) == 0).sum())
        if self.by_order:
            counts = np.bincount(objects.labels, minlength=len(self.config.classes)).tolist()
            self.facts["boxes by class"] = dict(zip(self.config.classes, counts))
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

    def _image_folder(self, key: str) -> Path | Shards:
        """The folder of the images, whose layout key is given."""
        return self._folder(key)

    def packed(
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

    def class_limit(self) -> int:
        """Largest class id: the last output is the no-object class."""
        return self.config.outputs - 2

    def check_class(self, label: int, where: str) -> bool:
        if 1 <= label <= self.class_limit():
            return True
        self.findings.error(
            "class id out of range",
            f"{where}: category_id {label} is outside 1..{self.class_limit()} ({self.task.short} has "
            f"{self.config.outputs} outputs, the last is no-object); correct the file or set the task's outputs",
        )
        return False

    def check_box(self, box, height: int, width: int, where: str) -> bool:
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
