"""``unit-fast data shard``."""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from unit_fast.config import DataConfig
from unit_fast.errors import UserError, nearest, printable


@dataclass(kw_only=True)
class Options:
    """Write folders of images into WebDataset tar shards, from which training reads as from the files.

    A run that was stopped goes on when the same command is given again. Exit code 1 if an image could not be read.
    """

    root: tyro.conf.Positional[str]
    """Data root."""
    images: tuple[str, ...]
    """Which images, e.g. coco.train_images vg.images; all takes every folder that is there."""
    out: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Where to; give it again for further disks. Each kind of images gets a folder of its own in it."""
    shard_mib: float = 256
    """Largest tar file, MiB."""
    seed: int = 0
    """Seed of the images' order in the shards."""
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Overrides of single paths, as data.paths in training."""


def run(options: Options) -> int:
    from unit_fast.data.layout import PLACES, Layout
    from unit_fast.data.shards.plan import plan_shards
    from unit_fast.data.shards.write import write_shards

    layout = Layout(DataConfig(root=options.root, paths=options.paths))
    # where the images of a user's own folder lie is known from its annotations alone
    known = [k for k in PLACES if k.endswith("images") and (not k.startswith("detect.") or k in options.paths)]
    keys = [key for value in options.images for key in value.split(",") if key]
    for key in keys:
        if key not in known and key != "all":
            raise UserError(f"--images {printable(key)}: no kind of images; {nearest(key, [*known, 'all'])}")
    if not keys or not options.out:
        raise UserError("--images and --out: give at least one of each")
    plans, used = {}, {}
    for key in known if "all" in keys else dict.fromkeys(keys):
        folder = layout.find(key)
        if folder is None or not folder.is_dir():
            if "all" in keys:
                print(f"{key}: not there, left out")
                continue
            raise UserError(f"--images {key}: not found: {layout.where(key)}")
        out = [Path(path).expanduser() / key.replace(".", "_") for path in options.out]
        plans[key] = plan_shards(
            folder, out, shard_mib=options.shard_mib, seed=options.seed, within=layout.root, used=used
        )
    unreadable = 0
    for key, plan in plans.items():
        done = write_shards(plan, progress=sys.stderr.isatty())
        kept = f" ({done.kept} were there)" if done.kept else ""
        print(
            f"{key}: {done.images:,} images in {done.shards:,} shards{kept}, {done.bytes / 2**20:,.1f} MiB, "
            f"{done.index}"
        )
        for what, names in (("files that are no images", done.skipped), ("UNREADABLE images", done.unreadable)):
            if names:
                print(f"  {len(names):,} {what} left out, listed in the index:")
            for name, reason in names[:3]:
                print(f"    {printable(name)}: {printable(reason, 400)}")
        unreadable += len(done.unreadable)
    if not plans:
        raise UserError(f"--images all: no folder of images under {printable(layout.root, 400)}")
    pairs = " ".join(shlex.quote(f"{key}={plan.out[0]}") for key, plan in plans.items())
    print(f"to train from them: --data.paths {pairs}")
    return 1 if unreadable else 0
