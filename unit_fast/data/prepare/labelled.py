"""Images and boxes on the way from one format to another."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from unit_fast.config import DataConfig
from unit_fast.data.images.decode import image_size

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Of image files."""
SPLITS = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
"""Split -> names that folders and lists of it have."""


class Box(NamedTuple):
    """An object of an image."""

    label: int
    """Index of its class."""
    x: float
    y: float
    w: float
    h: float
    """Pixels."""
    crowd: bool = False
    """Neither trained on nor scored."""


class LabelledImage(NamedTuple):
    """An image with its boxes."""

    path: Path
    name: str
    """File name in the folder that is written, relative to the images of its split."""
    height: int
    width: int
    boxes: list[Box]


@dataclass
class Labelled:
    """What a folder holds."""

    classes: list[str]
    splits: dict[str, list[LabelledImage]]
    lines: list[str] = field(default_factory=list)
    """What to tell about how it was read."""


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of an image file. ``BadImage`` where it is none."""
    return image_size(path, DataConfig().max_pixels)


def images_below(folder: Path) -> list[Path]:
    """The image files in ``folder`` and below, sorted; hidden ones are left out."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return sorted(found)
