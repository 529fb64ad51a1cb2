"""Boxes with their names, drawn on an image: one colour a class, labels beside each other and inside the picture."""

import colorsys
import functools
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unit_fast.errors import printable

_PAPER = "#ffffff"
_GOLDEN = 0.618033988749895
"""Steps of this on the circle of hues stay apart however many there are."""


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all drawn text; matplotlib's DejaVu covers most scripts."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def drawable(item: dict) -> bool:
    """Whether score and box are numbers; a run that had NaN in its weights may have kept others."""
    values = [item.get("score", 1.0), *item.get("bbox", ())]
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values if v is not None)


def class_colour(key: int | str) -> str:
    """The colour of a class, by its number or its name: the same in every image and run, dark enough for white text.

    Neighbouring numbers get colours far apart.
    """
    number = key if isinstance(key, int) else zlib.crc32(key.encode("utf-8", "surrogatepass"))
    hue = (0.58 + number * _GOLDEN) % 1.0
    # three shades: a hue comes back close by after some classes, then lighter or duller
    saturation, value = ((0.85, 0.78), (0.95, 0.58), (0.55, 0.66))[number % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    factor = min(1.0, 0.5 / brightness)
    return "#{:02x}{:02x}{:02x}".format(*(round(255 * factor * c) for c in (red, green, blue)))


def draw_boxes(image: Image.Image, objects: list[dict], size, colours: str | list[str] | None = None) -> Image.Image:
    """A copy of ``image`` with boxes and their names.

    objects: {"label", "bbox" xywh in pixels of an image of ``size`` (height, width), optional "score"}, the most
    important first; one whose numbers are not finite is left out. colours: one for all, one an object, or None for one
    a class. A name for which the picture has no free place left is not written.
    """
    image = image.convert("RGB").copy()
    draw = ImageDraw.Draw(image)
    across, down = image.width / max(size[1], 1), image.height / max(size[0], 1)
    if colours is None:
        colours = [class_colour(item["label"]) for item in objects]
    colours = [colours] * len(objects) if isinstance(colours, str) else colours
    line = max(3, round(max(image.size) / 200))
    shown = []
    for item, colour in zip(objects, colours):
        if drawable(item):
            x, y, width, height = (float(v) for v in item["bbox"])
            box = [x * across, y * down, (x + width) * across, (y + height) * down]
            # a predicted box may leave the image
            box = [min(max(v, 0), limit - 1) for v, limit in zip(box, (image.width, image.height) * 2)]
            shown.append((item, colour, box))
    for _, colour, box in reversed(shown):
        # a white rim keeps the box apart from an object of its colour
        draw.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline=_PAPER, width=line + 2)
        draw.rectangle(box, outline=colour, width=line)
    labels = _Labels(draw, image.size, font(max(11, round(max(image.size) / 36))))
    for item, colour, box in shown:
        score = f" {item['score']:.2f}" if item.get("score") is not None else ""
        labels.add(printable(item["label"], 40), score, colour, box)
    labels.write()
    return image


class _Labels:
    """Names written so that none lies over another or leaves the picture."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: tuple[int, int], letters):
        self.draw, self.size, self.letters = draw, size, letters
        self.taken = np.zeros((0, 4))
        """[n,4] x1 y1 x2 y2 of the labels so far."""
        self.texts: list[tuple[str, tuple[float, float], str]] = []
        """Of each label its text, where that is anchored, and its colour."""
        self.leaders: list[tuple[tuple, tuple, str]] = []
        """From a label to its box where it is not beside it: both ends and the colour."""

    def add(self, name: str, score: str, colour: str, box: list[float]) -> None:
        """Find a place for a name, the best for the first."""
        name, (left, top, right, bottom) = self._cut(name, score)
        width, height = right - left + 6, bottom - top + 5
        place = self._place(width, height, box)
        if place is None:
            return
        x, y = place
        self.taken = np.vstack([self.taken, (x, y, x + width, y + height)])
        self.texts.append((name + score, (x + 3 - left, y + 2 - top), colour))
        near = tuple(min(max(v, low), high) for v, low, high in zip((x, y), box[:2], box[2:]))
        if max(abs(near[0] - x), abs(near[1] - y)) > 2 * height:
            self.leaders.append(((x, y + height / 2), near, colour))

    def write(self) -> None:
        """Draw what was added, the names over everything."""
        for start, end, colour in self.leaders:
            self.draw.line([start, end], fill=colour, width=2)
        for place, (text, at, colour) in zip(self.taken.tolist(), self.texts):
            self.draw.rectangle(place, fill=colour)
            self.draw.text(at, text, fill=_PAPER, font=self.letters)

    def _cut(self, name: str, score: str):
        """The name, shortened where name and score are wider than the picture, and the text's bounding box."""
        extent = self.draw.textbbox((0, 0), name + score, font=self.letters)
        while len(name) > 1 and extent[2] - extent[0] + 7 > self.size[0]:
            name = name.removesuffix("…")[:-1] + "…"
            extent = self.draw.textbbox((0, 0), name + score, font=self.letters)
            if name == "…":
                break
        return name, extent

    def _place(self, width: float, height: float, box: list[float]) -> tuple[float, float] | None:
        """Upper left corner of a free place: at the box where there is one, else the nearest to its upper corner."""
        most_x, most_y = self.size[0] - 1 - width, self.size[1] - 1 - height
        if most_x < 0 or most_y < 0:
            return None
        x1, y1, x2, y2 = box
        at_box = [
            (min(x1, most_x), y1 - height), (x2 - width, y1 - height), (x1, y1), (x2 - width, y1),
            (min(x1, most_x), y2 + 1), (x1, y2 - height), (x2 + 1, y1), (x1 - width - 1, y1),
        ]  # fmt: skip
        columns = np.linspace(0, most_x, max(2, int(most_x / max(width / 3, 1)) + 1))
        rows = np.linspace(0, most_y, max(2, int(most_y / max(height / 2, 1)) + 1))
        grid = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
        nearest = np.argsort(np.abs(grid - (x1, y1 - height)).sum(1), kind="stable")
        places = np.concatenate([np.array(at_box, dtype=float), grid[nearest]])
        inside = (places >= 0).all(1) & (places <= (most_x, most_y)).all(1)
        a, b = places[:, None], self.taken[None]
        apart = (
            (a[..., 0] + width < b[..., 0]) | (a[..., 0] > b[..., 2])
            | (a[..., 1] + height < b[..., 1]) | (a[..., 1] > b[..., 3])
        ).all(1)  # fmt: skip
        free = np.flatnonzero(inside & apart)
        return tuple(places[free[0]].tolist()) if len(free) else None
