"""What happens to an image on its way to the model, decided as numbers (SPEC 4.3).

A ``Geometry`` depends only on the image's size, the settings and a seeded generator. Boxes are changed by it here and
nowhere else; pixels by ``apply_image``, the reference for the faster ways of ``transforms.py`` and ``dali.py``.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unit_fast.config import DataConfig
from unit_fast.data.images.decode import Stamp
from unit_fast.errors import UserError


def resized(height: int, width: int, short_side: int, max_side: int | None, floor: bool = False) -> tuple[int, int]:
    """(height, width) of an image brought to ``short_side`` with neither side above ``max_side`` (SPEC 4.3).

    Args:
        floor: at the ``max_side`` limit the short side is floored (VQA v2 and SNLI-VE) instead of rounded (detection).

    An image so thin that its short side would vanish gets a short side of 1 pixel and a long side of at most
    ``max_side``.

    Raises:
        UserError: a side below 1.
    """
    small, large = min(height, width), max(height, width)
    if small < 1 or short_side < 1:
        raise UserError(f"an image of {width} x {height} pixels cannot be brought to a short side of {short_side}")
    short = short_side
    if max_side is not None and large / small * short > max_side:
        limit = max_side * float(small) / float(large)
        short = int(limit) if floor else round(limit)
        if short < 1:
            return (1, min(large, max_side)) if height < width else (min(large, max_side), 1)
    if small == short:
        return height, width
    if width < height:
        return int(short * height / width), short
    return short, int(short * width / height)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What happens to one image, in this order: flip, resize to ``first``, cut out ``crop``, resize to ``size``."""

    stored: tuple[int, int]
    """(height, width) of the image as stored, pixels."""
    flip: bool = False
    """Mirror left and right."""
    first: tuple[int, int] | None = None
    """(height, width) before the crop."""
    crop: tuple[int, int, int, int] | None = None
    """(top, left, height, width) of the crop in the image of size ``first``."""
    size: tuple[int, int]
    """(height, width) of the result."""

    def apply_image(self, image: Image.Image) -> Image.Image:
        """The image changed; resizing is bilinear with anti-aliasing, and left out where the size is right."""
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.first is not None:
            image = _resize(image, self.first)
        if self.crop is not None:
            top, left, height, width = self.crop
            image = image.crop((left, top, left + width, top + height))
        return _resize(image, self.size)

    def apply_boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of the stored image to boxes of the result.

        Args:
            boxes: [n,4] float, x1 y1 x2 y2 in pixels, inside the stored image.

        Returns:
            [m,4] float32 cx, cy, w, h relative to the result, and [n] bool telling which m of the n boxes are kept: a
            crop drops those without area inside it.
        """
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        keep = np.ones(len(boxes), dtype=bool)
        height, width = self.stored
        if self.flip:
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        if self.first is not None:
            boxes *= np.array([self.first[1] / width, self.first[0] / height] * 2)
            height, width = self.first
        if self.crop is not None:
            top, left, height, width = self.crop
            boxes -= np.array([left, top, left, top])
            boxes = np.clip(boxes, 0, [width, height, width, height])
            keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            boxes = boxes[keep]
        # the last resize scales box and image alike, so relative boxes do not see it
        x1, y1, x2, y2 = (boxes / [width, height, width, height]).T
        out = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        return out.astype(np.float32), keep


def _resize(image, size):
    height, width = size
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Picture:
    """An image that is still to be read: where it is and what happens to it."""

    path: object
    """A ``Path`` or a member of a shard (``shards/member.py``)."""
    geometry: Geometry
    stamp: Stamp | None = None
    """The file as it was when it was described."""


class EvalTransform:
    """Resize to ``data.short_side`` within ``data.max_side``; ``floor`` for VQA v2 and SNLI-VE."""

    def __init__(self, data: DataConfig, *, floor: bool = False):
        self.short_side, self.max_side, self.floor = data.short_side, data.max_side, floor

    def geometry(self, height: int, width: int, key: int | None = None) -> Geometry:
        """The decision for an image of this size; ``key`` has no influence."""
        size = resized(height, width, self.short_side, self.max_side, self.floor)
        return Geometry(stored=(height, width), size=size)


class TrainTransform:
    """The detection training transform: flip, then resize, or resize, random crop and resize (each half the time)."""

    def __init__(self, data: DataConfig):
        self.data = data
        self.without_key = EvalTransform(data)

    def geometry(self, height: int, width: int, key: int | None = None) -> Geometry:
        """The decision for an image of this size: a pure function of size, settings and ``key``.

        Without a key nothing is random: validation's resize.
        """
        if key is None:
            return self.without_key.geometry(height, width)
        data, draw = self.data, random.Random(key)
        flip = draw.random() < 0.5 and data.flip
        first = crop = None
        current = (height, width)
        if draw.random() >= 0.5:
            first = resized(height, width, draw.choice(data.crop_short_sides), None)
            crop_width = draw.randint(min(data.crop_min, first[1]), min(first[1], data.crop_max))
            crop_height = draw.randint(min(data.crop_min, first[0]), min(first[0], data.crop_max))
            top = draw.randint(0, first[0] - crop_height)
            left = draw.randint(0, first[1] - crop_width)
            crop = (top, left, crop_height, crop_width)
            current = (crop_height, crop_width)
        size = resized(*current, draw.choice(data.train_short_sides), data.max_side)
        return Geometry(stored=(height, width), flip=flip, first=first, crop=crop, size=size)
