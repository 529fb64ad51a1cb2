"""What a model said about one image and/or text: as values, as text, drawn."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unit_fast.errors import UserError, printable
from unit_fast.files import replace
from unit_fast.prediction.inputs import Source
from unit_fast.report.boxes import class_colour, draw_boxes
from unit_fast.report.predictions import draw_answers, scaled
from unit_fast.tasks import get_task

DRAWN_SIDE = 800
"""Smaller images are enlarged to this longer side before boxes are drawn."""
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".json": "json"}
"""What ``save`` writes, by the ending of the name."""


class Prediction:
    """The answer to one question: boxes of a detection task, else answers or classes, most likely first.

    Attributes:
        task: short task name.
        items: detection: ``label``, ``score`` (probability), ``box`` [x1, y1, x2, y2] in pixels of the image,
            ``category_id``, the number of the class in the training data, for Visual Genome ``attribute`` where one is
            likely. Others: ``label``, ``score`` (VQA: sigmoid, others: softmax probability).
        text: the text that was given.
        name: the path of the image, or ``image`` with its number in the list; None without one.
        path: the file of the image, where it came from one.
        size: (height, width) of the image as its viewers show it, which the boxes refer to; None without one.
        unknown: words of the text that the model's vocabulary does not have.
        likeliest: the score of the likeliest box, also where it is below the threshold; None without boxes.
        error: why there is no answer; None where there is one. Only among several predictions: a single one raises.
    """

    def __init__(
        self,
        *,
        task: str,
        items: list[dict],
        text: str | tuple[str, str] | None = None,
        image: Image.Image | Source | None = None,
        size: tuple[int, int] | None = None,
        name: str | None = None,
        path: str | None = None,
        unknown: Sequence[str] = (),
        error: str | None = None,
        likeliest: float | None = None,
    ):
        self.task, self.items, self.text = task, items, text
        self._image, self.size, self.name, self.path = image, size, name, path
        self.unknown, self.error, self.likeliest = list(unknown), error, likeliest

    @property
    def image(self) -> Image.Image | None:
        """The image that was given, upright. Of several it is read again: a folder of photographs does not stay in
        memory. ``UserError`` where that is no longer possible."""
        return self._image.read() if isinstance(self._image, Source) else self._image

    @property
    def is_detection(self) -> bool:
        return get_task(self.task).is_detection

    def to_dict(self) -> dict:
        """Plain values, ready for JSON: ``task``, ``predictions``, and where there is one ``image`` (path or name) with
        ``width`` and ``height``, ``text``, ``unknown_words``, ``error``."""
        text = list(self.text) if isinstance(self.text, tuple) else self.text
        found = {"task": self.task}
        if self.name is not None:
            found["image"] = self.name
        if self.size is not None:
            found |= {"width": self.size[1], "height": self.size[0]}
        if text is not None:
            found["text"] = text
        if self.unknown:
            found["unknown_words"] = self.unknown
        if self.error is not None:
            found["error"] = self.error
        return found | {"predictions": self.items}

    def __repr__(self) -> str:
        what = "boxes" if self.is_detection else "answers"
        first = f", first {printable(self.items[0]['label'], 40)!r} {self.items[0]['score']:.3f}" if self.items else ""
        of = f" of {printable(self.name, 80)}" if self.name is not None else ""
        if self.error is not None:
            return f"<Prediction {self.task}{of}: {printable(self.error, 120)}>"
        return f"<Prediction {self.task}{of}: {len(self.items)} {what}{first}>"

    def __str__(self) -> str:
        if self.error is not None:
            return f"no answer: {printable(self.error, 600)}"
        if not self.items:
            return "no object above the threshold"
        names = [printable(i["label"], 40) + (f" ({printable(i['attribute'], 40)})" if i.get("attribute") else "")
                 for i in self.items]  # fmt: skip
        width = max(5, *map(len, names))
        if not self.is_detection:
            return "\n".join(f"{name:<{width}}  {item['score']:.3f}" for name, item in zip(names, self.items))
        lines = [f"{'label':<{width}}  score  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}"]
        for name, item in zip(names, self.items):
            lines.append(f"{name:<{width}}  {item['score']:.3f}  " + " ".join(f"{v:7.1f}" for v in item["box"]))
        return "\n".join(lines)

    def draw(self) -> Image.Image:
        """A picture: the image with its boxes, a colour a class, or image and text with the answers."""
        if self.error is not None:
            raise UserError(f"{self.error}: there is nothing to draw")
        image = self.image
        if not self.is_detection:
            return draw_answers(image, self.text, self.items)
        size = (image.height, image.width)
        objects = [
            {
                "label": " ".join(filter(None, (item.get("attribute"), item["label"]))),
                "score": item["score"],
                "bbox": [*item["box"][:2], item["box"][2] - item["box"][0], item["box"][3] - item["box"][1]],
            }
            for item in self.items
        ]
        colours = [class_colour(item.get("category_id", item["label"])) for item in self.items]
        return draw_boxes(scaled(image, DRAWN_SIDE) if max(size) < DRAWN_SIDE else image, objects, size, colours)

    def show(self) -> None:
        """Show the picture in a window of the system's picture viewer."""
        self.draw().show(title=self.name or self.task)

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG or JPEG, or the plain values where ``path`` ends in ``.json``; returns the path."""
        path = Path(path)
        kind = KINDS.get(path.suffix.lower())
        if kind is None:
            raise UserError(f"{path}: ends in {path.suffix or 'nothing'!r}; give a name in {', '.join(KINDS)}")
        if kind == "json":
            content = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        else:
            file = io.BytesIO()
            self.draw().save(file, kind)
            content = file.getvalue()
        write(path, content)
        return path


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file, whole or not at all. ``UserError`` where that cannot be."""
    try:
        replace(Path(path), content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another path") from None
