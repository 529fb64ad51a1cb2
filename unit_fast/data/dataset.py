"""What all data sets have in common: split, texts, images, the book of oddities."""

from pathlib import Path

import torch

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.errors import BadImage, EmptySplit, Findings, MissingSplit
from unit_fast.data.files import safe_path
from unit_fast.data.images import EvalTransform, ImageCache, to_tensor
from unit_fast.data.layout import Layout
from unit_fast.data.text import WordPieces
from unit_fast.errors import UserError, printable
from unit_fast.tasks import Task

SPLITS = ("train", "val", "test")
NOTABLE = ("file", "files", "split by", "questions without answers")
"""Facts that help to see why a split is empty."""


class Dataset:
    """One split of one data set: annotations in memory, images and word pieces made when asked for.

    Subclasses fill themselves from files in ``_read`` and define ``__len__``, ``sample_id`` and ``get``.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        data: DataConfig,
        config: TaskConfig,
        *,
        augment: bool = False,
        vocab_size: int | None = None,
        attribute_outputs: int = 401,
        findings: Findings | None = None,
    ):
        if split not in SPLITS:
            raise UserError(f"split {split!r} of {task.short}: must be one of {', '.join(SPLITS)}")
        self.task = task
        self.split = split
        self.data = data
        self.config = config
        self.augment = augment and data.augment
        self.attribute_limit = attribute_outputs - 1
        self.layout = Layout(data)
        self.findings = findings or Findings()
        self.facts: dict[str, object] = {}
        """What was read, by name: counts and the files used."""
        self.decoded = ImageCache(data.cache_mib * 2**20)
        self.transform = EvalTransform(data, floor=task.has_text)
        self._read()
        # after the files: where a split is missing, that is what to say
        self.words = self._word_pieces(vocab_size) if task.has_text else None
        if not len(self):
            # an empty file, no row of the split in it, or everything in it was left out
            details = [f"{f.count} x {f.kind} left out" for f in self.findings.found.values()]
            details += [f"{name}: {value}" for name, value in self.facts.items() if name in NOTABLE]
            reason = f" ({printable('; '.join(details), 600)})" if details else ""
            raise EmptySplit(
                f"{task.short}: no usable sample in split {split}{reason}; "
                f"check the files with: unit-fast data check {printable(self.layout.root, 400)}",
                by_ids="split by" in self.facts,
            )

    def _read(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def sample_id(self, index: int) -> int | str:
        """The id used in messages and prediction files."""
        raise NotImplementedError

    def get(self, index: int, key: int | None = None) -> dict:
        """The sample at ``index`` as a dict for ``collate``.

        Args:
            key: seeds the augmentation of this visit; None uses no randomness.

        Raises:
            BadImage: the image is absent or damaged.
        """
        raise NotImplementedError

    def image_paths(self):
        """(path, stated (height, width) or None) of every image of the split, each once."""
        return iter(())

    # ------------------------------------------------------------------------------------------------- helpers

    def _word_pieces(self, vocab_size):
        if self.config.text_length < 3:
            raise UserError(
                f"{self.task.short}: text_length is {self.config.text_length}; it must be at least 3 (one word piece "
                f"between [CLS] and [SEP])"
            )
        path = self.layout.find("bert.vocab")
        if path is None:
            raise UserError(f"vocabulary not found: {self.layout.where('bert.vocab')}; or give --vocab FILE")
        return WordPieces(path, vocab_size)

    def _encode(self, text) -> dict:
        ids, segments = self.words.encode(text, self.config.text_length)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "token_type_ids": torch.tensor(segments, dtype=torch.int64),
            "text": text,
        }

    def _missing(self, *keys: str) -> MissingSplit:
        """The error for a split whose files are not there."""
        places = "; ".join(self.layout.where(key) for key in keys)
        return MissingSplit(f"{self.task.short}: no files for split {self.split}; looked for {places}")

    def _folder(self, key: str) -> Path:
        """An image folder that must exist."""
        path = self.layout.find(key)
        if path is None or not path.is_dir():
            raise UserError(f"{self.task.short}: image folder not found: {self.layout.where(key)}")
        return path

    def _image(self, path: Path) -> dict:
        """The image at ``path`` through the evaluation transform, with the fields every image sample has."""
        image = self.decoded.load(path, self.data.max_pixels)
        geometry = self.transform.geometry(image.height, image.width)
        return {
            "image": to_tensor(geometry.apply_image(image)),
            "orig_size": geometry.stored,
            "image_path": str(path),
        }

    def _inside(self, folder: Path, name: str) -> Path:
        """``folder / name``, refused as ``BadImage`` when it leads out of the folder and the data root."""
        try:
            return safe_path(folder, name, within=self.layout.root)
        except UserError as error:
            raise BadImage(name, str(error)) from None
