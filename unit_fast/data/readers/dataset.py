"""What all data sets have in common: split, texts, images, the book of oddities."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.errors import BadImage, EmptySplit, Findings, MissingSplit
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.decode import image_size, is_turned, load_image
from unit_fast.data.images.geometry import EvalTransform, Geometry, Picture
from unit_fast.data.images.memory import KeptImages
from unit_fast.data.images.transforms import to_tensor
from unit_fast.data.layout import Layout
from unit_fast.data.shards.index import Shards, opened
from unit_fast.data.shards.member import Member, NoMember
from unit_fast.data.store.cache import Cache, open_cache
from unit_fast.data.store.content import Content, Strings
from unit_fast.data.store.files import safe_path
from unit_fast.data.text.tokens import Tokens, cached_tokens, lengths, tokenise
from unit_fast.data.text.wordpieces import WordPieces
from unit_fast.errors import UserError, printable
from unit_fast.tasks import Task

SPLITS = ("train", "val", "test")
NOTABLE = ("file", "files", "split by", "questions without answers")
"""Facts that help to see why a split is empty."""


class Dataset:
    """One split of one data set: annotations in flat arrays, images made when asked for.

    The arrays of large files are mapped from the cache, and so are the word pieces of their texts; of small files the
    arrays are in memory and the word pieces made when asked for. Forked workers share either; the mapped ones cost them
    no memory of their own.

    Subclasses fill themselves from files in ``_read``, those with texts ``columns`` and ``rows`` too, and define
    ``__len__``, ``sample_id``, ``_fields`` and, with images, ``image_path``.
    """

    columns: tuple[Strings, ...] = ()
    """The first sentence of every row, and the second ones of pairs."""
    rows: Content | None = None
    """What was read from the annotation files; ``columns`` are part of it."""

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
        self.shards: dict[str, Shards] = {}
        """The shards that images come from, by folder; empty for loose files."""
        self._sizes: dict[str, tuple[int, int]] = {}
        self._lengths: np.ndarray | None = None
        self.kept = KeptImages(data.cache_mib * 2**20)
        self._kept_paths: dict[int, object] = {}
        """Index of a sample whose image was kept when it was read -> its path."""
        self.transform = EvalTransform(data, floor=task.has_text)
        # a check of the files reads the files
        self.cache = open_cache(data) if self.findings.strict else Cache(None)
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
        self._tokens: Tokens | None = None
        if self.words is not None and self.rows is not None and self.rows.name is not None:
            self._tokens = cached_tokens(self.cache, self.rows, self.words, self.columns, f"{task.short} {split}")

    @classmethod
    def present(cls, layout: Layout) -> bool:
        """Whether a user's own files for the task are there; asked of the tasks in ``tasks.OWN``."""
        return False

    @classmethod
    def outputs_of(cls, task: Task, data: DataConfig, config: TaskConfig):
        """``categories.Outputs``: the classes that the files have for a task without published ones (``outputs`` 0, or
        not as published); None where the published ones hold."""

    def _read(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def sample_id(self, index: int) -> int | str:
        """The id used in messages and prediction files."""
        raise NotImplementedError

    @property
    def class_names(self) -> dict[int, str]:
        """Class -> its name."""
        return dict(enumerate(self.config.classes or self.task.labels))

    def meaning(self) -> dict[str, str]:
        """Digests of what gives the numbers in the samples their meaning, by name: with another one a model trained on
        them is no use."""
        return {"vocabulary": self.words.fingerprint} if self.words is not None else {}

    def digest(self) -> dict:
        """What tells this data set from a changed one, as JSON: ``meaning``, a digest of the ``rows`` in their order,
        and the number of ``samples``. The images' pixels are not looked at."""
        return {"meaning": self.meaning(), "rows": self.rows.digest(), "samples": len(self)}

    def remarks(self) -> list[str]:
        """What the reader found odd and left out or tolerated, one line a kind with its count and an example."""
        return [
            f"{self.task.short} {self.split}: {f.count:,} x {f.kind} (first: {printable(f.examples[0], 400)})"
            for f in self.findings.found.values()
        ]

    def get(self, index: int, key: int | None = None) -> dict:
        """The sample at ``index`` as a dict for ``collate``, its image read by the reference engine.

        Args:
            key: seeds the augmentation of this visit; None uses no randomness.

        Raises:
            BadImage: the image is absent or damaged.
        """
        if not self.task.has_image:
            return self._fields(index, None)
        path = self._kept_paths.get(index)
        if path is None:
            path = self.image_path(index)
        image = self.kept.get(path)
        if image is None:
            image = load_image(path, self.data.max_pixels)
            if self.kept.put(path, image, 3 * image.width * image.height):
                self._kept_paths[index] = path  # finding it again costs more than the image
        size = image.height, image.width
        return self.sample(
            index, key, path, size, lambda geometry: {"image": to_tensor(geometry.apply_image(image))}, is_turned(image)
        )

    def describe(self, index: int, key: int | None, checked: CheckedImages) -> dict:
        """As ``get``, but with ``picture`` (``geometry.Picture``), which is still to be read, instead of ``image``."""
        path = self.image_path(index)
        facts = checked.facts(path)
        size = facts.height, facts.width
        return self.sample(
            index, key, path, size, lambda geometry: {"picture": Picture(path, geometry, facts.stamp)}, facts.turned
        )

    def sample(
        self, index: int, key: int | None, path, size: tuple[int, int], image: Callable[..., dict], turned: bool = False
    ) -> dict:
        """The sample at ``index``, whose image lies at ``path`` and is stored in this (height, width).

        image: makes the field that stands for the image of what is to happen to it (``Geometry``). turned: viewers turn
        it, as its EXIF orientation says.
        """
        stated = self._stated_size(index)
        if stated is not None and size != stated:
            shown = " as stored, and turned in viewers by its EXIF orientation" if turned else ""
            raise BadImage(
                path, f"is {size[1]} x {size[0]} pixels{shown}, its annotation says {stated[1]} x {stated[0]}"
            )
        geometry = self.transform.geometry(*size, key if self.augment else None)
        fields = {**image(geometry), "orig_size": geometry.stored, "image_path": str(path), "turned": turned}
        return fields | self._fields(index, geometry)

    def shape(self, index: int, key: int | None = None) -> tuple[int, ...]:
        """(height, width) of the image of ``get`` as far as its header tells, or (tokens,) of a text alone.

        An image without a readable header has (0, 0).
        """
        if not self.task.has_image:
            if self._lengths is None:
                self._lengths = self.text_lengths()
            return (int(self._lengths[index]),)
        try:
            return self.transform.geometry(*self._stored_size(index), key if self.augment else None).size
        except BadImage:
            return 0, 0

    def image_path(self, index: int):
        """The image file of a sample; ``BadImage`` when its name leads out of the data root."""
        raise NotImplementedError

    def image_paths(self):
        """(path, stated (height, width) or None) of every image of the split, each once."""
        for index in self._images() if self.task.has_image else ():
            try:
                yield self.image_path(index), self._stated_size(index)
            except BadImage as error:
                self.findings.error("file name outside the data root", str(error))

    def text(self, index: int) -> str | tuple[str, str]:
        """The sentence of row ``index``, or the two of a pair."""
        texts = tuple(column[index] for column in self.columns)
        return texts[0] if len(texts) == 1 else texts

    def text_tokens(self, index: int) -> int:
        """Number of ids of row ``index`` as ``get`` gives them: cut to ``text_length``, special pieces included.

        Raises:
            UserError: the text cannot be tokenised, and no tokens are at hand (``text_lengths`` then counts it as one
                piece).
        """
        if self._tokens is None:
            return len(self.words.encode(self.text(index), self.config.text_length)[0])
        counts = [ends[index + 1 : index + 2] - ends[index : index + 1] for ends in self._tokens.ends]
        return int(lengths(counts, self.config.text_length)[0])

    def text_lengths(self) -> np.ndarray:
        """``text_tokens`` of all rows: int64 [n]. Texts that have no tokens yet are tokenised once, for ``get`` too."""
        if self._tokens is None:
            self._tokens = Tokens(tokenise(self.words, self.columns, self.task.short), len(self.columns))
        return lengths(self._tokens.counts(), self.config.text_length)

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

    def _encode(self, index: int) -> dict:
        text = self.text(index)
        pieces = self._tokens.pieces(index) if self._tokens is not None else None
        if pieces is None:  # without tokens, or one raises the error of its text
            ids, segments = self.words.encode(text, self.config.text_length)
        else:
            ids, segments = self.words.form(pieces[0], pieces[1] if len(pieces) > 1 else [], self.config.text_length)
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "token_type_ids": torch.tensor(segments, dtype=torch.int64),
            "text": text,
        }

    def _file(self, key: str) -> Path:
        """The annotation file of a layout key, noted among the facts."""
        path = self.layout.find(key)
        if path is None:
            raise self._missing(key)
        self.facts["file"] = str(path)
        return path

    def _missing(self, *keys: str) -> MissingSplit:
        """The error for a split whose files are not there."""
        places = "; ".join(self.layout.where(key) for key in keys)
        return MissingSplit(f"{self.task.short}: no files for split {self.split}; looked for {places}")

    def _folder(self, key: str) -> Path | Shards:
        """A folder of image files, or of shards, that must exist."""
        path = self.layout.find(key)
        if path is None or not path.is_dir():
            raise UserError(f"{self.task.short}: image folder not found: {self.layout.where(key)}")
        return self._opened(path)

    def _opened(self, path: Path) -> Path | Shards:
        """The folder, or its shards, whose tar files must be there and of the right size."""
        shards = opened(path)
        if shards is None:
            return path
        self.shards[str(path)] = shards
        for problem in shards.problems():
            self.findings.error("shard missing or damaged", problem)
        return shards

    def _fields(self, index: int, geometry: Geometry | None) -> dict:
        """What a sample holds besides its image, to which ``geometry`` happens."""
        raise NotImplementedError

    def _images(self) -> Iterable[int]:
        """One sample of each image."""
        return range(len(self))

    def _stated_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of an image as its annotation says, where it does."""
        return None

    def _stored_size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image as stored, from its annotation or its header."""
        if (stated := self._stated_size(index)) is not None:
            return stated
        path = self.image_path(index)
        found = self._sizes.get(str(path))
        if found is None:
            found = self._sizes[str(path)] = image_size(path, self.data.max_pixels)
        return found

    def _inside(self, folder: Path | Shards, name: str) -> Path | Member | NoMember:
        """``folder / name``, refused as ``BadImage`` when it leads out of the folder and the data root."""
        try:
            if isinstance(folder, Shards):
                return folder.get(name)
            return safe_path(folder, name, within=self.layout.root)
        except UserError as error:
            raise BadImage(name, str(error)) from None
