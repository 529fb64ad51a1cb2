"""Where the files of the data sets are: a key for each, with the places it is looked for.

A place is relative to the data root. ``*`` stands for any part of a name, a comma joins places that belong together,
and the first place that exists counts. ``DataConfig.paths`` overrides any key.
"""

import glob
import os
from pathlib import Path

from unit_fast.config import DataConfig
from unit_fast.errors import UserError, nearest, printable


def _glue(folder: str, table: str, *exports: str) -> tuple[str, ...]:
    """Places of a GLUE split: the official table, then Hugging Face's exports (``configuration/split``): parquet files
    of the hub, a ``save_to_disk`` folder, a file of the cache."""
    places = [f"glue/{folder}/{table}.tsv"]
    for pattern in ("{0}/{1}-*.parquet", "{0}/{1}.parquet", "{0}/{1}/*.arrow", "{0}/glue-{1}*.arrow", "{0}/{1}.arrow"):
        places += [f"glue/{pattern.format(*export.split('/'))}" for export in exports]
    return tuple(places)


def _coco_folder(*words: str) -> tuple[str, ...]:
    """Places of one split's annotations in a folder in COCO's format, by the names of the split that exporters use."""
    forms = (
        "{0}/_annotations.coco.json", "{0}/annotations.json", "{0}/instances_{0}.json",
        "annotations/instances_{0}*.json", "coco/annotations/instances_{0}*.json", "annotations/{0}*.json",
        "annotations/*_{0}.json", "instances_{0}*.json", "{0}.json", "{0}_*.json", "*_{0}.json",
    )  # fmt: skip
    return _mixed(tuple(form.format(word) for form in forms for word in words))


def _mixed(places: tuple[str, ...]) -> tuple[str, ...]:
    """Places of one's own boxes, before them the same in a folder ``detect``, beside which other data sets lie."""
    return (*(f"detect/{place}" for place in places), *places)


def _image_folders(*words: str) -> tuple[str, ...]:
    """Places of one split's images in such a folder."""
    below = ("{0}", "images/{0}", "{0}/images", "coco/images/{0}", "coco/{0}", "data/{0}")
    here = (*(form.format(word) for form in below for word in words), "images", "data", "JPEGImages", ".")
    return _mixed(here)


OWN_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
"""Split -> the names its table may have in a data set of one's own."""


def _own(task: str) -> dict[str, tuple[str, ...]]:
    """Places of the tables and images of one's own data set for ``task``: in a folder of its name, or in the root."""
    places = {}
    for split, names in OWN_SPLITS.items():
        tables = [f"{name}.{kind}" for name in names for kind in ("csv", "tsv", "jsonl", "json")]
        if task == "answer":
            tables += [f"*{name}*questions.json" for name in names]
        places[f"{task}.{split}"] = tuple(f"{folder}{table}" for folder in (f"{task}/", "") for table in tables)
    if task != "classify":
        places[f"{task}.images"] = (f"{task}/images", "images")
    return places


PLACES: dict[str, tuple[str, ...]] = {
    "bert.vocab": ("bert/vocab.txt", "pretrained/bert-base-uncased/vocab.txt", "bert-base-uncased/vocab.txt"),
    "coco.train_annotations": ("coco/annotations/instances_train2017.json",),
    "coco.val_annotations": ("coco/annotations/instances_val2017.json",),
    "coco.test_annotations": (
        "coco/annotations/image_info_test-dev2017.json",
        "coco/annotations/image_info_test2017.json",
    ),
    **{
        f"coco.{folder.removesuffix('2017')}_images": (f"coco/images/{folder}", f"coco/{folder}")
        for folder in ("train2017", "val2017", "test2017", "train2014", "val2014", "test2015")
    },
    **{
        f"vg.{split}_annotations": (
            f"visual_genome/annotations/instances_{split}_split_by_coco_2017.json",
            f"visual_genome/instances_{split}_split_by_coco_2017.json",
        )
        for split in ("train", "val")
    },
    "detect.train_annotations": _coco_folder("train", "Train"),
    "detect.val_annotations": _coco_folder("valid", "val", "validation", "Validation", "Val"),
    "detect.test_annotations": _coco_folder("test", "Test"),
    "detect.annotations": _mixed(
        (
            "_annotations.coco.json",
            "annotations/instances_default.json",
            "instances_default.json",
            "annotations.json",
            "result.json",
            "instances.json",
            "annotations/instances.json",
            "annotations/annotations.json",
            "coco.json",
            "labels.json",
            "annotations/*.json",
            "*.json",
        )
    ),
    "detect.train_images": _image_folders("train", "train2017"),
    "detect.val_images": _image_folders("valid", "val", "validation", "val2017"),
    "detect.test_images": _image_folders("test", "test2017"),
    "vg.annotations": ("visual_genome/annotations/instances_from_scene_graphs.json",),
    "vg.scene_graphs": ("visual_genome/scene_graphs.json",),
    "vg.objects": ("visual_genome/objects.json",),
    "vg.attributes": ("visual_genome/attributes.json",),
    "vg.image_data": ("visual_genome/image_data.json",),
    "vg.object_vocab": ("visual_genome/1600-400-20/objects_vocab.txt", "visual_genome/objects_vocab.txt"),
    "vg.attribute_vocab": ("visual_genome/1600-400-20/attributes_vocab.txt", "visual_genome/attributes_vocab.txt"),
    "vg.images": ("visual_genome/images", "visual_genome"),
    "vqa2.answers": tuple(
        f"vqa2/{name}" for name in ("trainval_label2ans.json", "answers_vqa.txt", "answers_vqa2.txt", "answers.txt")
    ),
    "vqa2.train_imdb": ("vqa2/imdb_train2017*.npy,vqa2/imdb_vg_karpathy*_not_in_val2017.npy",),
    "vqa2.val_imdb": ("vqa2/imdb_val2017.npy",),
    "vqa2.test_imdb": ("vqa2/imdb_test2015.npy",),
    **{
        f"vqa2.{part}_questions": (f"vqa2/v2_OpenEnded_mscoco_{part}_questions.json",)
        for part in ("train2014", "val2014", "test2015")
    },
    **{f"vqa2.{part}_annotations": (f"vqa2/v2_mscoco_{part}_annotations.json",) for part in ("train2014", "val2014")},
    "snli_ve.train": ("snli_ve/snli_ve_train.jsonl",),
    "snli_ve.val": ("snli_ve/snli_ve_dev.jsonl",),
    "snli_ve.test": ("snli_ve/snli_ve_test.jsonl",),
    "snli_ve.images": ("snli_ve/flickr30k_images", "flickr30k/flickr30k_images", "flickr30k_images", "flickr30k"),
    "qnli.train": _glue("QNLI", "train", "qnli/train"),
    "qnli.val": _glue("QNLI", "dev", "qnli/validation"),
    "qnli.test": _glue("QNLI", "test", "qnli/test"),
    "mnli.train": _glue("MNLI", "train", "mnli/train"),
    "mnli.val": _glue("MNLI", "dev_mismatched", "mnli_mismatched/validation", "mnli/validation_mismatched"),
    "mnli.test": _glue("MNLI", "test_mismatched", "mnli_mismatched/test", "mnli/test_mismatched"),
    "qqp.train": _glue("QQP", "train", "qqp/train"),
    "qqp.val": _glue("QQP", "dev", "qqp/validation"),
    "qqp.test": _glue("QQP", "test", "qqp/test"),
    "sst2.train": _glue("SST-2", "train", "sst2/train"),
    "sst2.val": _glue("SST-2", "dev", "sst2/validation"),
    "sst2.test": _glue("SST-2", "test", "sst2/test"),
    **_own("answer"),
    **_own("entail"),
    **_own("classify"),
}
"""Key -> places, in the order they are tried. Of those of ``detect.*_images`` the one counts that has the images."""


class Layout:
    """The files under one data root.

    Raises:
        UserError: no root and no paths, a root that is not a folder, an unknown key in ``data.paths``.
    """

    def __init__(self, data: DataConfig):
        for key in data.paths:
            if key not in PLACES:
                raise UserError(f"data.paths: unknown key {printable(key)!r}; {nearest(key, PLACES)}")
        if data.root is None and not data.paths:
            raise UserError("no data root; give --data-root DIR (layout: unit-fast data check DIR)")
        self.root = Path(data.root).expanduser() if data.root is not None else Path()
        if not self.root.is_dir():
            raise UserError(f"data root {printable(self.root, 400)}: no such folder; give --data-root DIR")
        self.overrides = dict(data.paths)
        self.columns = data.columns
        if data.vocab is not None:
            # the field's own path is relative to the working folder, as other command line paths
            self.overrides["bert.vocab"] = str(Path(data.vocab).expanduser().absolute())

    def places(self, key: str) -> tuple[str, ...]:
        """Where ``key`` is looked for."""
        return (self.overrides[key],) if key in self.overrides else PLACES[key]

    def files(self, key: str) -> list[Path]:
        """The existing files or folders of ``key``, sorted by name within a pattern; empty when there is none.

        Raises:
            UserError: an overridden path that does not exist.
        """
        for place in self.places(key):
            if found := self.at(place):
                return found
        if key in self.overrides:
            raise UserError(f"data.paths {key}: {printable(self.overrides[key], 400)} does not exist; correct the path")
        return []

    def at(self, place: str) -> list[Path]:
        """The existing files or folders of one place, sorted by name within a pattern."""
        found = []
        for part in place.split(","):
            part = os.path.expanduser(part)
            if (self.root / part).exists():
                found.append(self.root / part)
            elif glob.has_magic(part):
                found += map(Path, sorted(glob.glob(os.path.join(glob.escape(str(self.root)), part))))
        return found

    def find(self, key: str) -> Path | None:
        """The one file or folder of ``key``, or None."""
        found = self.files(key)
        return found[0] if found else None

    def where(self, key: str) -> str:
        """The places of ``key`` in words, for a message."""
        return f"{' or '.join(self.places(key)[:3])} under {printable(self.root, 400)} (data.paths key {key})"
