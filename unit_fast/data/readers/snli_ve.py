"""SNLI-VE (SPEC 4.1): a Flickr30k image and a hypothesis, one JSON object a line."""

from pathlib import Path

import numpy as np

from unit_fast.data.images.geometry import Geometry
from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.sources import read_through
from unit_fast.data.store import files
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError, printable

IMAGE_KEYS = ("Flikr30kID", "Flickr30K_ID", "Flickr30kID")
"""Key of the image in the releases: with ``.jpg`` under the first spelling, without under the second."""


class SnliVe(Dataset):
    """SNLI-VE. Rows whose annotators did not agree (``gold_label`` is ``-``) are left out and counted."""

    def _read(self) -> None:
        path = self._file(f"snli_ve.{self.split}")
        self.labelled = True
        self.folder = self._folder("snli_ve.images")
        self.rows = read_through(self, {"file": [path]}, {}, lambda: self._rows(path))
        self.labels = self.rows.arrays["labels"]
        self.images, self.ids = self.rows.strings("images"), self.rows.strings("ids")
        self.columns = (self.rows.strings("hypotheses"),)

    def _rows(self, path: Path) -> Content:
        hypotheses: list[str] = []
        images: list[str] = []
        ids: list[str] = []
        labels = []
        seen = set()
        name = printable(path, 400)
        lines = ((f"{name}:{number}", (number, line)) for number, line in files.read_lines(path) if line.strip())
        for where, (image, hypothesis, gold, pair) in self.findings.parsed("malformed row", lines, _row):
            if gold == "-":
                self.findings.note("row without a gold label", f"{where}: gold_label is -")
                continue
            if gold not in self.task.labels:
                self.findings.error(
                    "unknown label",
                    f"{where}: gold_label {printable(gold)!r} is not one of {', '.join(self.task.labels)}",
                )
                continue
            if pair in seen:
                self.findings.note("pair id twice", f"{where}: pairID {printable(pair)} was used before")
            seen.add(pair)
            images.append(image if image.endswith(".jpg") else f"{image}.jpg")
            hypotheses.append(hypothesis)
            ids.append(pair)
            labels.append(self.task.labels.index(gold))
        content = Content({"labels": np.array(labels, dtype=np.int8)})
        for name, texts in (("images", images), ("ids", ids), ("hypotheses", hypotheses)):
            content.put_strings(name, texts)
        self.facts.update(rows=len(labels), images=len(set(images)))
        self.facts.update({name: labels.count(i) for i, name in enumerate(self.task.labels)})
        return content

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> str:
        return self.ids[index]

    def _fields(self, index: int, geometry: Geometry) -> dict:
        """``input_ids`` and so on of the hypothesis, and ``label``."""
        return {
            **self._encode(index),
            "label": int(self.labels[index]),
            "image_id": self.images[index],
            "sample_id": self.ids[index],
        }

    def image_path(self, index: int) -> Path:
        """The Flickr30k image of a row; ``BadImage`` when its name leads out of the data root."""
        return self._inside(self.folder, self.images[index])

    def _images(self) -> list[int]:
        row_of = {name: index for index, name in enumerate(self.images)}
        return [row_of[name] for name in sorted(row_of)]


def _row(numbered: tuple[int, str], where: str) -> tuple[str, str, str, str]:
    """Image, hypothesis, label and pair id of a line and its number."""
    number, line = numbered
    record = files.parse_json(line.encode(), where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with keys, found {type(record).__name__}")
    image = files.string(record, next((k for k in IMAGE_KEYS if k in record), IMAGE_KEYS[0]), where)
    hypothesis = files.string(record, "sentence2", where)
    gold = files.string(record, "gold_label", where)
    return image, hypothesis, gold, files.string(record, "pairID", where) if "pairID" in record else f"{image}:{number}"
