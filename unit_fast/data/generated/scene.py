"""Scenes of the generated world: a few coloured shapes on a textured ground, drawn and described.

A scene is drawn from a ``random.Random`` alone, so that it is a pure function of its seed. Coordinates are pixels, the
origin is the top left corner, boxes are ``(x, y, w, h)`` as in COCO.
"""

import io
import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("brick", "ladder", "ring")
"""Flat, upright and round: what is told apart by the sides of a box too is learned in minutes."""
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 170, 60),
    "blue": (45, 90, 225),
    "yellow": (240, 215, 40),
    "white": (240, 240, 240),
}
GROUNDS = {"gray": (128, 128, 128), "brown": (136, 82, 36), "purple": (112, 62, 150)}
SIZES = {"small": (8.0, 9.5), "large": (11.5, 13.5)}
"""Size name -> range of the half side in pixels; the gap keeps the names unambiguous."""

SIDE = 48
"""Pixels a side of every image: the demo trains on them as they are, without resizing or padding."""
FRAME = 2
"""Pixels of the white frame around every scene. A group norm takes the mean colour of an image away; beside a white
that is always the same the ground keeps its colour."""
MOST = 3
"""Shapes of a scene, at most."""

_COUNT_WEIGHTS = (0.55, 0.33, 0.12)
_CROWD_SHARE = 0.02
_ATTEMPTS = 50
_HOLE = 0.6  # of a ring's radius
_RAIL = 0.25  # of a ladder's width
_GAPS = ((-0.05, 0.2), (0.4, 0.6), (0.8, 1.05))  # of a ladder's height; the outer ones are open
_OVERSAMPLING = 3  # shapes are drawn this much larger and averaged down, which smooths their edges


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    kind: str
    color: str
    size: str
    polygon: tuple[tuple[float, float], ...]
    """Outline, pixels, rounded to 1/100."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        xs, ys = zip(*self.polygon)
        return (min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2))

    @property
    def attributes(self) -> tuple[str, str]:
        return (self.color, self.size)

    @property
    def center(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return (x + w / 2, y + h / 2)

    @property
    def area(self) -> float:
        """Area inside the outline in square pixels (shoelace formula)."""
        points = self.polygon
        pairs = zip(points, points[1:] + points[:1])
        return round(abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2, 2)


@dataclass(frozen=True)
class Scene:
    """What is to be seen in one image."""

    width: int
    height: int
    ground: str
    things: tuple[Thing, ...]
    crowd: tuple[Thing, ...] = ()
    """Tiny shapes of one kind that are annotated together, as COCO's crowds are."""
    texture_seed: int = field(default=0, compare=False)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of ``kind`` around the origin, its half side being about 1."""
    if kind == "ring":
        angles = (2 * math.pi * i / 24 for i in range(24))
        return [(math.cos(a), math.sin(a)) for a in angles]
    x, y = (1.1, 0.65) if kind == "brick" else (0.7, 1.1)
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def _rotate(x: float, y: float, angle: float) -> tuple[float, float]:
    return (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle))


def _place(rng, kind, color, size, half, width, height, taken, area=None) -> Thing | None:
    """A shape of half side ``half`` at a free place, or None when thirty places were taken."""
    angle = 0.0 if kind == "ring" else rng.uniform(-0.15, 0.15)
    stretch_x, stretch_y = rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12)
    corners = [_rotate(x * half * stretch_x, y * half * stretch_y, angle) for x, y in _outline(kind)]
    left, top = min(x for x, _ in corners), min(y for _, y in corners)
    right, bottom = max(x for x, _ in corners), max(y for _, y in corners)
    x0, y0, x1, y1 = area or (FRAME, FRAME, width - FRAME, height - FRAME)
    if right - left >= x1 - x0 or bottom - top >= y1 - y0:
        return None
    for _ in range(30):
        x, y = rng.uniform(x0 - left, x1 - right), rng.uniform(y0 - top, y1 - bottom)
        box = (x + left, y + top, x + right, y + bottom)
        if all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
            taken.append(box)
            return Thing(kind, color, size, tuple((round(x + cx, 2), round(y + cy, 2)) for cx, cy in corners))
    return None


def draw_scene(rng: random.Random, *, crowds: bool = False) -> Scene:
    """A scene with one to three shapes that do not overlap; ``crowds`` allows a crowd."""
    width = height = SIDE
    taken: list = []
    crowd: list = []
    if crowds and rng.random() < _CROWD_SHARE:
        x, y = (rng.choice((FRAME, side - FRAME - 24)) for side in (width, height))  # in a corner, out of the way
        kind, color = rng.choice(KINDS), rng.choice(list(COLORS))
        cells = [(x + 8 * column, y + 8 * row) for row in range(3) for column in range(3)]
        for left, top in rng.sample(cells, rng.randrange(6, 9)):
            crowd.append(_place(rng, kind, color, "small", 2.6, width, height, [], (left, top, left + 8, top + 8)))
        taken.append((x, y, x + 24, y + 24))
    number = rng.choices(range(1, MOST + 1), _COUNT_WEIGHTS)[0]
    for _ in range(_ATTEMPTS):
        things = _things(rng, number, width, height, list(taken))
        if len(things) == number:
            break
    return Scene(width, height, rng.choice(list(GROUNDS)), tuple(things), tuple(crowd), rng.getrandbits(32))


def _things(rng, number, width, height, taken) -> list[Thing]:
    """``number`` shapes outside the boxes ``taken``; fewer where one finds no place."""
    things = []
    for _ in range(number):
        size = rng.choice(list(SIZES))
        half = rng.uniform(*SIZES[size])
        thing = _place(rng, rng.choice(KINDS), rng.choice(list(COLORS)), size, half, width, height, taken)
        if thing is None:
            break
        things.append(thing)
    return things


def render(scene: Scene) -> bytes:
    """The scene as a JPEG file."""
    rng = np.random.default_rng(scene.texture_seed)
    height, width = scene.height, scene.width
    spots = rng.normal(0, 9, (height // 8 + 2, width // 8 + 2)).clip(-20, 20)
    coarse = Image.fromarray(spots.astype(np.float32))
    texture = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    texture = texture + _pattern(scene.ground, width, height)
    ground = np.array(GROUNDS[scene.ground], np.float32) + rng.normal(0, 2.5) + texture[..., None]
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    for thing in scene.crowd + scene.things:
        color = np.array(COLORS[thing.color]) + rng.normal(0, 4.5, 3)
        image.paste(tuple(int(c) for c in color.clip(0, 255)), mask=_mask(thing, width, height))
    pixels = np.full((height, width, 3), 250.0)
    inside = (slice(FRAME, height - FRAME), slice(FRAME, width - FRAME))
    pixels[inside] = np.asarray(image, np.float32)[inside]
    pixels += rng.normal(0, 2.5, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _pattern(ground: str, width: int, height: int) -> np.ndarray:
    """What is added to a ground's brightness, [height,width]: gray is plain, brown has planks, purple is chequered."""
    y, x = np.mgrid[:height, :width]
    if ground == "brown":
        return np.where(y % 8 < 2, -24.0, 0.0)
    if ground == "purple":
        return np.where((x // 4 + y // 4) % 2 == 0, 14.0, -14.0)
    return np.zeros((height, width))


def _holes(thing: Thing) -> list[list[tuple[float, float]]]:
    """What is cut out of the outline: the middle of a ring, the gaps between a ladder's rungs."""
    if thing.kind == "ring":
        cx, cy = thing.center
        return [[(cx + _HOLE * (x - cx), cy + _HOLE * (y - cy)) for x, y in thing.polygon]]
    if thing.kind == "ladder":
        (x0, y0), (x1, y1), _, (x3, y3) = thing.polygon
        across, down = (x1 - x0, y1 - y0), (x3 - x0, y3 - y0)
        gaps = [[(_RAIL, top), (1 - _RAIL, top), (1 - _RAIL, end), (_RAIL, end)] for top, end in _GAPS]
        return [[(x0 + u * across[0] + v * down[0], y0 + u * across[1] + v * down[1]) for u, v in g] for g in gaps]
    return []


def _mask(thing: Thing, width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    draw.polygon([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in thing.polygon], fill=255)
    for hole in _holes(thing):
        draw.polygon([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in hole], fill=0)
    return mask.reduce(_OVERSAMPLING)


def crowd_region(scene: Scene) -> tuple[dict, int, list[int]]:
    """COCO's run-length segmentation (column by column, zeros first), area and box of the scene's crowd."""
    mask = np.zeros((scene.height, scene.width), bool)
    for thing in scene.crowd:
        mask |= np.asarray(_mask(thing, scene.width, scene.height)) > 127
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends, [flat.size - 1]])).tolist()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    segmentation = {"counts": counts, "size": [scene.height, scene.width]}
    return segmentation, int(mask.sum()), [int(v) for v in box]
