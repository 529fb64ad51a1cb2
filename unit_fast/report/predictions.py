"""Drawn predictions: boxes on images, answers beside them (Figure E.1)."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from unit_fast.errors import UserError, printable
from unit_fast.overlap import iou
from unit_fast.report.boxes import draw_boxes, drawable, font
from unit_fast.report.run import read_thresholds
from unit_fast.tasks import get_task

TRUTH, RIGHT, WRONG = "#2f6fde", "#1f9d63", "#e0641a"
"""Colours of true boxes, of predictions that meet one, and of the others."""

THRESHOLD = 0.5
"""Predictions below this score are not drawn where a run has chosen no other threshold."""

FALLBACK = 3
"""Most likely predictions that are drawn where no threshold was chosen and none reaches ``THRESHOLD``."""

DUPLICATE = 0.6
"""Overlap with a likelier box of its class from which on a box is not drawn."""

_PAPER, _INK = "#ffffff", "#1c2430"


def chosen(predictions: list[dict], threshold: float | None = None) -> list[dict]:
    """The predictions to draw, most likely first, each object once.

    Those of at least ``threshold``, the run's; without one those of ``THRESHOLD``, else the ``FALLBACK`` likeliest.
    What is no number is left out.
    """
    ranked = []
    for p in sorted(filter(drawable, predictions), key=lambda p: -p.get("score", 1.0)):
        if not any(p["label"] == r["label"] and iou(p["bbox"], r["bbox"]) >= DUPLICATE for r in ranked):
            ranked.append(p)
    least = THRESHOLD if threshold is None else threshold
    shown = [p for p in ranked if p.get("score", 1.0) >= least]
    return shown if shown or threshold is not None else ranked[:FALLBACK]


def matched(truth: list[dict], predictions: list[dict], least: float = 0.5) -> tuple[list[bool], list[bool]]:
    """(found, right): for every true box whether a prediction met it, for every prediction whether it met one.

    Greedy in the order of ``predictions``, as COCOeval matches: the same class and an overlap of at least ``least``;
    a true box is met once. Boxes are xywh.
    """
    found, right = [False] * len(truth), []
    for prediction in predictions:
        overlaps = [
            (iou(t["bbox"], prediction["bbox"]), i)
            for i, t in enumerate(truth)
            if not found[i] and t["label"] == prediction["label"]
        ]
        best, index = max(overlaps, default=(0.0, -1))
        right.append(best >= least)
        if best >= least:
            found[index] = True
    return found, right


def scaled(image: Image.Image, side: int) -> Image.Image:
    """``image`` with a longer side of ``side`` pixels."""
    factor = side / max(image.size)
    size = tuple(max(1, round(x * factor)) for x in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)


def draw_example(
    image: Image.Image, example: dict, side: int = 460, threshold: float | None = None
) -> tuple[Image.Image, Image.Image, str]:
    """(truth, prediction, caption) of a detection example of ``examples.json``; threshold: as for ``chosen``."""
    image = scaled(image, side)
    objects, shown = example["truth"] or [], chosen(example["prediction"], threshold)
    found, right = matched(objects, shown)
    truth = draw_boxes(image, objects, example["size"], TRUTH)
    colours = [RIGHT if r else WRONG for r in right]
    prediction = draw_boxes(image, shown, example["size"], colours)
    wrong = right.count(False)
    caption = f"{sum(found)} of {len(found)} objects found, {wrong} wrong box{'' if wrong == 1 else 'es'}"
    if threshold is None and shown and shown[0].get("score", 1.0) < THRESHOLD:
        caption += f"; no box reaches {THRESHOLD}, the {len(shown)} likeliest are drawn"
    return truth, prediction, caption


def draw_answers(image: Image.Image | None, text, answers: list[dict], width: int = 640) -> Image.Image:
    """A picture of an image and/or a text with its answers ({"label", "score"}) as bars."""
    texts = [text] if isinstance(text, str) else list(text or [])
    letters, small = font(18), font(15)
    lines = [line for t in texts for line in _wrapped(printable(t, 600), letters, width - 32)]
    picture = scaled(image, width) if image is not None else None
    top = picture.height if picture else 0
    sheet = Image.new("RGB", (width, top + 24 + 26 * len(lines) + 30 * len(answers) + 12), _PAPER)
    if picture:
        sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw, y = ImageDraw.Draw(sheet), top + 12
    for line in lines:
        draw.text((16, y), line, fill=_INK, font=letters)
        y += 26
    y += 6
    for rank, answer in enumerate(answers):
        bar = round((width - 290) * min(max(answer["score"], 0.0), 1.0)) if drawable(answer) else 0
        draw.text((16, y + 3), printable(answer["label"], 22), fill=_INK, font=small)
        draw.rectangle([210, y + 4, 210 + max(1, bar), y + 20], fill=TRUTH if rank == 0 else "#b9c3d3")
        draw.text((width - 64, y + 3), f"{answer['score']:.3f}", fill=_INK, font=small)
        y += 30
    return sheet


def _wrapped(text: str, letters, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}".strip()
        if line and letters.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def example_image(folder: Path, example: dict) -> Image.Image | None:
    """The copy of an example's image in the run folder; None where it is absent or unreadable."""
    name = example.get("image")
    if not isinstance(name, str):
        return None
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        return None
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.convert("RGB") if image.width * image.height <= 4_000_000 else None
    except (OSError, ValueError, SyntaxError):
        return None


def write_samples(run_dir: str | Path, step: int, rows: int = 4) -> Path | None:
    """Draw ``samples/step_XXXXXX.jpg`` from ``examples.json``: detection images, truth | prediction.

    Up to ``rows`` images a detection task. None where there is no detection example.
    """
    folder = Path(run_dir)
    try:
        examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'examples.json'}: cannot be read ({error}); evaluate the run first") from None
    pairs, thresholds = [], read_thresholds(folder)
    for task in (get_task(name) for name in examples):
        for example in examples[task.short].get("samples", [])[:rows] if task.is_detection else ():
            image = example_image(folder, example)
            if image is not None:
                threshold = thresholds.get(task.name, {}).get("threshold")
                pairs.append(draw_example(image, example, side=320, threshold=threshold)[:2])
    if not pairs:
        return None
    # two pairs a line
    gap, cell = 8, 320
    lines = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    heights = [max(image.height for pair in line for image in pair) for line in lines]
    sheet = Image.new("RGB", (4 * cell + 5 * gap, sum(heights) + gap * (len(lines) + 1)), _PAPER)
    y = gap
    for line, height in zip(lines, heights):
        for column, image in enumerate(image for pair in line for image in pair):
            sheet.paste(image, (gap + column * (cell + gap) + (cell - image.width) // 2, y))
        y += height + gap
    path = folder / "samples" / f"step_{step:06d}.jpg"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, "JPEG", quality=85)
    return path
