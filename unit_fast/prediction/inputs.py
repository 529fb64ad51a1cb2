"""What a prediction is asked about: images in the many ways in which they are given, and texts."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unit_fast.data import BadImage
from unit_fast.data.images.decode import load_image, to_rgb
from unit_fast.data.store.files import open_file
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.labels import TaskLabels
from unit_fast.tasks import Task

ENDINGS = (".jpg", ".jpeg", ".png")
"""What image files of a folder end in, in any case."""
PAIRS = ("qnli", "mnli", "qqp")
"""Tasks about two sentences."""
TEXT_OF = {
    "vqa2": "a question", "snli_ve": "a hypothesis about the image", "qnli": "a question and a sentence",
    "mnli": "a premise and a hypothesis", "qqp": "two questions", "sst2": "a sentence", "answer": "a question",
    "entail": "a text about the image",
}  # fmt: skip
"""What the text of a task is."""
TEXTS_LIMIT = 256 * 2**20
"""Bytes of the largest file of texts."""

Text = str | tuple[str, str]

_log = logging.getLogger("unit_fast.predict")


@dataclass(frozen=True, eq=False)
class Source:
    """One image that is still to be read."""

    given: object
    """A path, or pixels as a user has them."""
    name: str
    """How messages call it: its path, or ``image`` with its number."""
    max_pixels: int

    @property
    def path(self) -> str | None:
        """The file it is read from."""
        return str(self.given) if isinstance(self.given, (str, Path)) else None

    def read(self) -> Image.Image:
        """RGB, 8 bits, as its viewers show it: an EXIF orientation is applied. ``UserError`` naming the image."""
        if self.path is not None:
            try:
                return upright(load_image(self.given, self.max_pixels))
            except BadImage as error:
                raise UserError(
                    f"image {printable(error.path, 400)}: {error.reason}; give a JPEG or PNG file"
                ) from None
        image = self.given if isinstance(self.given, Image.Image) else _from_pixels(self.given, self.name)
        if not 0 < image.width * image.height <= self.max_pixels:
            raise UserError(
                f"{self.name}: {image.width} x {image.height} pixels, the limit is {self.max_pixels:,}; scale it"
            )
        try:
            return upright(to_rgb(image))
        except Exception as error:  # a file that Pillow reads only now
            raise UserError(
                f"{self.name}: cannot be decoded ({printable(error)}); give a whole JPEG or PNG file"
            ) from error


def sources(image, max_pixels: int) -> Source | list[Source]:
    """What was given as one image, or as several: a folder, a pattern, a list (of any of these), or a batch.

    A path, a ``PIL.Image``, an array [H,W,3] uint8, or a tensor [3,H,W] of uint8 or of numbers from 0 to 1 is one; an
    array [B,H,W,3] or a tensor [B,3,H,W] are B. ``UserError`` where nothing is there or it is something else.
    """
    if isinstance(image, (str, Path)):
        found = _files(image)
        if isinstance(found, list):
            return [Source(path, path, max_pixels) for path in found]
        return Source(found, str(found), max_pixels)
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
        image = list(image)
    if isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
        return Source(image, "image", max_pixels)
    if isinstance(image, Iterable) and not isinstance(image, (bytes, bytearray, dict)):
        found = []
        for number, each in enumerate(image, 1):
            one = sources(each, max_pixels)
            if isinstance(one, list):
                found.extend(one)
            else:
                found.append(one if one.path is not None else Source(each, f"image {number}", max_pixels))
        if not found:
            raise UserError("image: an empty list; give at least one image")
        return found
    raise UserError(
        f"image: expected a path, a PIL image, an array, a tensor or a list of them, found {type(image).__name__}"
    )


def _files(path: str | Path) -> str | Path | list[str]:
    """The file at ``path``, or the files of a folder or a pattern in the order of their names."""
    text = str(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) or re.match(r"https?:", text):
        raise UserError(f"image {printable(text, 400)}: addresses are not fetched; download it and give the file")
    if os.path.isdir(path):
        try:
            every = os.listdir(path)
        except OSError as error:
            raise UserError(f"image {printable(text, 400)}: cannot be listed ({error.strerror or error})") from None
        # hidden ones are other programs' leavings
        names = sorted((n for n in every if n.lower().endswith(ENDINGS) and not n.startswith(".")), key=_natural)
        if not names:
            raise UserError(
                f"image {printable(text, 400)}: no JPEG or PNG file in this folder; give 'FOLDER/**/*.jpg' for those "
                "in folders below it"
            )
        return [os.path.join(text, name) for name in names]
    if not glob.has_magic(text) or os.path.lexists(path):
        return path
    found = sorted((name for name in glob.glob(text, recursive=True) if not os.path.isdir(name)), key=_natural)
    if not found:
        raise UserError(f"image {printable(text, 400)}: no file is called like this; check the pattern")
    return [name for name in found if name.lower().endswith(ENDINGS)] or found


def _natural(name: str) -> list:
    """Sorts ``2.jpg`` before ``10.jpg``."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name)]


def _from_pixels(pixels: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    """[H,W,3] uint8 array, or [3,H,W] tensor of uint8 or float in 0..1; also one channel (grey) or four (the last is
    left out)."""
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu()
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
            raise UserError(
                f"{name}: a tensor of shape {list(pixels.shape)}; give [3, H, W], or [B, 3, H, W] for several"
            )
        if not pixels.numel():
            raise UserError(f"{name}: {pixels.shape[2]} x {pixels.shape[1]} pixels; give an image with some")
        if pixels.is_floating_point():
            if not (pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise UserError(
                    f"{name}: a {str(pixels.dtype).removeprefix('torch.')} tensor with values outside 0..1; give 0..1 "
                    "that is not normalised, or uint8"
                )
            pixels = (pixels.float() * 255).round().to(torch.uint8)
        elif pixels.dtype != torch.uint8:
            raise UserError(f"{name}: a tensor of {pixels.dtype}; give uint8, or floating numbers from 0 to 1")
        pixels = pixels.permute(1, 2, 0).numpy()
    elif pixels.dtype != np.uint8:
        raise UserError(f"{name}: an array of {pixels.dtype}; give uint8 from 0 to 255")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(f"{name}: an array of shape {list(pixels.shape)}; give [H, W, 3], or [B, H, W, 3] for several")
    if 0 in pixels.shape:
        raise UserError(f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels; give an image with some")
    pixels = pixels[:, :, :3] if pixels.shape[2] > 1 else pixels.repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels))


def upright(image: Image.Image) -> Image.Image:
    """A photograph as its camera held it upright. A damaged EXIF record tells no orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # foreign bytes fail in many ways
        _log.warning("image: its EXIF record cannot be read (%s); taken as stored", printable(error))
        return image


# --------------------------------------------------------------------------------------------------------- texts


def is_pair(task: Task, labels: TaskLabels) -> bool:
    """Whether a task is about two sentences; a task of one's own is where its table was."""
    return labels.texts == 2 if labels.texts else task.short in PAIRS


def texts(task: Task, text, pair: bool) -> Text | list[Text] | None:
    """The text of a task, checked; of a list those of each prediction. None for a task without.

    pair: the task is about two sentences. One sentence is a string, a pair two strings; a list of strings (of pairs) is
    several. ``UserError`` naming what is missing.
    """
    if not task.has_text:
        if text is not None and text != "":
            raise UserError(f"{task.short} takes no text, only an image; leave the text out")
        return None
    several = isinstance(text, list) and text and (not pair or not isinstance(text[0], str))
    if not several:
        return _one_text(task, pair, text, "")
    return [_one_text(task, pair, each, f"text {number}: ") for number, each in enumerate(text, 1)]


def _one_text(task: Task, pair: bool, text, where: str) -> Text:
    parts = list(text) if isinstance(text, (list, tuple)) else [] if text is None else [text]
    wanted = 2 if pair else 1
    if len(parts) != wanted or not all(isinstance(part, str) and part.strip() for part in parts):
        how = 'text=("...", "...") (--text twice)' if pair else 'text="..." (--text)'
        empty = " (empty)" if any(not str(part).strip() for part in parts) else ""
        needed = TEXT_OF.get(task.short, "two texts" if pair else "a text")
        raise UserError(
            f"{where}{task.short} needs {needed}, found {len(parts)} text{'' if len(parts) == 1 else 's'}{empty}; "
            f"give {how}"
        )
    return tuple(parts) if pair else parts[0]


def read_texts(path: str | Path, pair: bool) -> list[Text]:
    """The texts in a file, one a line; of a ``pair`` two with a tab between. ``UserError`` naming the line."""
    where = printable(path, 400)
    with open_file(path, TEXTS_LIMIT) as file:
        data = file.read()
    try:
        lines = data.decode("utf-8-sig").rstrip("\r\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return list(_parsed(lines, where, pair))


def _parsed(lines: list[str], where: str, pair: bool) -> Iterator[Text]:
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split("\t")] if pair else [line.strip()]
        if len(parts) != (2 if pair else 1) or not all(parts):
            what = f"{len(parts)} texts between tabs, a pair has 2" if pair and all(parts) else "an empty text"
            raise UserError(f"{where}:{number}: {what}; give one {'pair' if pair else 'text'} a line")
        yield tuple(parts) if pair else parts[0]
