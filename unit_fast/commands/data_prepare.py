"""``unit-fast data prepare``."""

import shlex
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(kw_only=True)
class Options:
    """Make a folder in COCO's format of one in YOLO's or Pascal VOC's, to train on with --recipe detect."""

    source: tyro.conf.Positional[str]
    """The folder to read; nothing in it is changed."""
    target: tyro.conf.Positional[str]
    """The folder to write; it must not be there or be empty."""
    kind: Annotated[Literal["yolo", "voc"], tyro.conf.arg(name="from")]
    """yolo: data.yaml or classes.txt and text files. voc: an XML file an image."""
    copy: bool = False
    """Copy the images instead of linking them."""


def run(options: Options) -> int:
    from unit_fast.data.prepare import prepare

    done = prepare(options.kind, options.source, options.target, copy=options.copy)
    splits = ", ".join(f"{split} {n:,} images with {done.boxes[split]:,} boxes" for split, n in done.images.items())
    print(f"{done.folder}: {len(done.classes)} classes; {splits}")
    for line in done.lines:
        print(f"  {line}")
    folder = shlex.quote(str(done.folder))
    print(f"look it over: unit-fast data check {folder}\ntrain: unit-fast train --recipe detect --data-root {folder}")
    return 0
