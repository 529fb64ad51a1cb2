"""Folders of images written into shards, for tests."""

import shutil
from pathlib import Path

from tests.data_roots import picture
from unit_fast.commands import main as cli
from unit_fast.data.shards.plan import plan_shards
from unit_fast.data.shards.write import write_shards

KEYS = ("coco.train_images", "coco.val_images", "coco.train2014_images", "coco.val2014_images", "vg.images",
        "snli_ve.images")  # fmt: skip


def shard(root, out, *more, keys=KEYS, mib="0.03"):
    """What the command writes of a root; key -> shard folder."""
    arguments = ["data", "shard", str(root), "--images", *keys, "--out", str(out), "--shard-mib", mib, *more]
    assert cli.main(arguments) == 0
    return {key: str(Path(out) / key.replace(".", "_")) for key in keys}


def without_images(root, folder) -> Path:
    """A copy of a root that has no image."""
    return Path(shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.jpg")))


def small_folder(folder: Path) -> tuple[Path, Path]:
    """(folder of 30 images in folders, shard folder of several tar files), below ``folder``."""
    images = folder / "images"
    for i in range(30):
        picture(images / f"part{i % 2}/{i:03d}.jpg", 20 + i, 30, seed=i)
    return images, written(images, folder / "out").index.parent


def written(folder, *out, **options):
    return write_shards(plan_shards(folder, out, shard_mib=options.pop("shard_mib", 0.02), **options))


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}
