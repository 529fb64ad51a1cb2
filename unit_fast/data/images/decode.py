"""Image files to RGB pixels: what is accepted, what is refused, and how odd kinds are converted."""

import contextlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from unit_fast.data.errors import BadImage
from unit_fast.data.store.files import describe

FORMATS = ("JPEG", "PNG")
"""The only decoders used; the others of the library have had bombs of their own and no data set needs them."""
BYTES_LIMIT = 512 * 2**20
"""Bytes of the largest image file; 50 million pixels of 16-bit RGB without compression are 300 MB."""


class Stamp(NamedTuple):
    """What changes when a file does."""

    bytes: int
    time_ns: int


def stamp(path) -> Stamp:
    """The stamp of an image file or of a member of a shard. ``BadImage`` where there is none."""
    with _named(path):
        found = os.stat(path) if isinstance(path, (str, Path)) else path.stamp()
    if not isinstance(found, Stamp) and not stat.S_ISREG(found.st_mode):
        raise BadImage(path, "not a plain file")  # reading a FIFO or a device may never end
    return found if isinstance(found, Stamp) else Stamp(found.st_size, found.st_mtime_ns)


def _check_bytes(path) -> None:
    """``BadImage`` for a file that is absent, no plain file, or larger than ``BYTES_LIMIT``."""
    if (size := stamp(path).bytes) > BYTES_LIMIT:
        raise BadImage(path, f"{size:,} bytes, the limit is {BYTES_LIMIT:,}")


def read_bytes(path) -> bytes:
    """The encoded image, from a file or a member of a shard. ``BadImage`` where it cannot be read."""
    _check_bytes(path)
    with _named(path):
        return Path(path).read_bytes() if isinstance(path, (str, Path)) else path.read()


@contextlib.contextmanager
def _named(path, *kinds: type[Exception]):
    """Errors of the system, and of ``kinds``, as ``BadImage`` of this path; a shard's member raises its own."""
    try:
        yield
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(path, "not a JPEG or PNG image") from None
    except (OSError, ValueError, *kinds) as error:
        raise BadImage(path, describe(error)) from None


def _open(path, max_pixels):
    # fed with foreign bytes, decoders fail in many ways, KeyError included
    with _named(path, Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and an error
        if isinstance(path, (str, Path)):
            _check_bytes(path)
            image = Image.open(path, formats=FORMATS)
        else:
            image = Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels or width * height == 0:
        image.close()
        raise BadImage(path, f"{width} x {height} pixels, the limit is {max_pixels:,} (data.max_pixels)")
    return image


def image_size(path, max_pixels: int) -> tuple[int, int]:
    """(height, width) from the header, without decoding. ``BadImage`` as ``load_image``, decoding errors excepted."""
    with _open(path, max_pixels) as image:
        return image.height, image.width


def header(path, max_pixels: int) -> tuple[int, int, bool]:
    """(height, width, ``is_turned``) as ``image_size``; an orientation that stands behind the pixels is not seen."""
    with _open(path, max_pixels) as image:
        return image.height, image.width, is_turned(image)


def probe(path, max_pixels: int) -> tuple[int, int, bool]:
    """(height, width, whether it is a plain JPEG) from the header.

    Plain is what every decoder turns into the same RGB pixels: colour or grey, 8 bits. ``BadImage`` as ``image_size``.
    """
    with _open(path, max_pixels) as image:
        # Adobe's marker may tell of another colour space than JFIF's (1 is the same): that is left to one decoder.
        usual = image.mode in ("RGB", "L") and image.info.get("adobe_transform", 1) == 1
        plain = image.format == "JPEG" and usual
        return image.height, image.width, plain


def load_image(path, max_pixels: int) -> Image.Image:
    """The image at ``path`` (a path, or a member of a shard) as RGB, 8 bits.

    The header's size is checked before anything is decoded. Grey, palette and CMYK images are converted, 16-bit grey is
    scaled (the library's own conversion clips it at 255), transparency is dropped. An EXIF orientation is not applied:
    the annotations of all data sets refer to the pixels as stored.

    Raises:
        BadImage: naming the file and the reason: absent, not JPEG or PNG, larger than ``max_pixels``, damaged.
    """
    with _open(path, max_pixels) as image, _named(path, Exception):  # see _open
        return to_rgb(image)


def is_turned(image: Image.Image) -> bool:
    """Whether an image as ``load_image`` gives it has an EXIF orientation: viewers turn it, ``load_image`` does not. A
    damaged record tells none."""
    if not {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys():  # as for nearly all
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # foreign bytes fail in many ways
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy as RGB, 8 bits, converted as ``load_image`` says; what Pillow knows besides the pixels is kept."""
    image.load()
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        scaled = Image.fromarray(((grey.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
        scaled.info = dict(image.info)
        image = scaled
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
