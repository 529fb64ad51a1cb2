"""Reading images and bringing them to size (SPEC 4.3).

What a transform does to one image is decided first, as a ``Geometry``: numbers that depend only on the image's size,
the settings and a seeded generator. Pixels and boxes are then changed by it apart, so that another engine can apply
the same decisions.
"""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unit_fast.config import DataConfig
from unit_fast.data.errors import BadImage
from unit_fast.data.files import describe

FORMATS = ("JPEG", "PNG")
"""The only decoders used; the others of the library have had bombs of their own and no data set needs them."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_MEAN = torch.tensor(MEAN).view(3, 1, 1)
_STD = torch.tensor(STD).view(3, 1, 1)


# --------------------------------------------------------------------------------------------------------- reading


def _open(path, max_pixels):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and an error
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(path, "not a JPEG or PNG image") from None
    except Exception as error:  # fed with foreign bytes, decoders fail in many ways, KeyError included
        raise BadImage(path, describe(error)) from None
    width, height = image.size
    if width * height > max_pixels or width * height == 0:
        image.close()
        raise BadImage(path, f"{width} x {height} pixels, the limit is {max_pixels:,} (data.max_pixels)")
    return image


def image_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """(height, width) from the header, without decoding. ``BadImage`` as ``load_image``, decoding errors excepted."""
    with _open(path, max_pixels) as image:
        return image.height, image.width


def load_image(path: str | Path, max_pixels: int) -> Image.Image:
    """The image as RGB, 8 bits.

    The header's size is checked before anything is decoded. Grey, palette and CMYK images are converted, 16-bit grey is
    scaled (the library's own conversion clips it at 255), transparency is dropped. An EXIF orientation is not applied:
    the annotations of all data sets refer to the pixels as stored.

    Raises:
        BadImage: naming the file and the reason: absent, not JPEG or PNG, larger than ``max_pixels``, damaged.
    """
    with _open(path, max_pixels) as image:
        try:
            image.load()
            if image.mode == "RGB":
                return image.copy()
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.int64)
                image = Image.fromarray(((grey.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
        except Exception as error:  # see _open
            raise BadImage(path, describe(error)) from None


class ImageCache:
    """``load_image`` with the images read first kept, up to ``limit`` bytes of pixels.

    Nothing is dropped for a later one: visits are in random order, so none is likelier to be asked for again.
    """

    def __init__(self, limit: int):
        self.left, self._images = limit, {}

    def load(self, path: str | Path, max_pixels: int) -> Image.Image:
        """As ``load_image``; the image belongs to the cache and is not to be changed."""
        name = str(path)
        image = self._images.get(name)
        if image is None:
            image = load_image(path, max_pixels)
            size = 3 * image.width * image.height
            if size <= self.left:
                self.left -= size
                self._images[name] = image
        return image


def to_tensor(image: Image.Image) -> Tensor:
    """[3,H,W] float32: RGB scaled to 0..1, then normalised with ``MEAN`` and ``STD``."""
    pixels = torch.from_numpy(np.array(image))  # np.array copies: the image's own memory is read-only
    return pixels.permute(2, 0, 1).contiguous().float().div_(255).sub_(_MEAN).div_(_STD)


# --------------------------------------------------------------------------------------------------------- geometry


def resized(height: int, width: int, short_side: int, max_side: int | None, floor: bool = False) -> tuple[int, int]:
    """(height, width) of an image brought to ``short_side`` with neither side above ``max_side`` (SPEC 4.3).

    Args:
        floor: at the ``max_side`` limit the short side is floored (VQA v2 and SNLI-VE) instead of rounded (detection).

    An image so thin that its short side would vanish gets a short side of 1 pixel and a long side of at most
    ``max_side``.
    """
    small, large = min(height, width), max(height, width)
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
