"""What a model said about one image and/or text: as values, as text, drawn."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unit_fast.errors import UserError, printable
from unit_fast.report.predictions import TRUTH, draw_answers, draw_boxes, scaled
from unit_fast.tasks import get_task

_DRAWN_SIDE = 800
"""Smaller images are enlarged to this longer side before boxes are drawn."""


@dataclass(kw_only=True)
class Prediction:
    """The answer to one question: boxes of a detection task, else answers or classes, most likely first."""

    task: str
    """Short task name."""
    items: list[dict]
    """Detection: ``label``, ``score`` (probability), ``box`` [x1, y1, x2, y2] in pixels of the image, for Visual Genome
    ``attribute`` where one is likely. Others: ``label``, ``score`` (VQA: sigmoid, others: softmax probability)."""
    text: str | tuple[str, str] | None = None
    """The text that was given."""
    image: Image.Image | None = field(default=None, repr=False)
    """The image that was given."""

    @property
    def is_detection(self) -> bool:
        return get_task(self.task).is_detection

    def to_dict(self) -> dict:
        """Plain values, ready for JSON: ``task``, ``text`` where there is one, ``predictions``."""
        text = list(self.text) if isinstance(self.text, tuple) else self.text
        return {"task": self.task, **({} if text is None else {"text": text}), "predictions": self.items}

    def __str__(self) -> str:
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
        """A picture: the image with its boxes, or image and text with the answers."""
        if not self.is_detection:
            return draw_answers(self.image, self.text, self.items)
        size = (self.image.height, self.image.width)
        objects = [
            {
                "label": " ".join(filter(None, (item.get("attribute"), item["label"]))),
                "score": item["score"],
                "bbox": [*item["box"][:2], item["box"][2] - item["box"][0], item["box"][3] - item["box"][1]],
            }
            for item in self.items
        ]
        small = max(size) < _DRAWN_SIDE
        return draw_boxes(scaled(self.image, _DRAWN_SIDE) if small else self.image, objects, size, TRUTH)

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG or JPEG, or the plain values where ``path`` ends in ``.json``; returns the path."""
        path = Path(path)
        kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".json": "json"}
        kind = kinds.get(path.suffix.lower())
        if kind is None:
            raise UserError(f"{path}: ends in {path.suffix or 'nothing'!r}; give a name in {', '.join(kinds)}")
        try:
            if kind == "json":
                path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            else:
                self.draw().save(path, kind)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another path") from None
        return path
