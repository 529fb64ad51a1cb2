"""One pass over a split, for an evaluation: every sample once, in batches of one size.

Images of a batch have exactly one size. Padding is not neutral: convolutions carry its border inwards and group norm
counts it, so that with it a figure would depend on the batch. Texts are sorted by length; their padding is masked.
"""

import collections
import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from unit_fast.batch import Batch
from unit_fast.config import DataConfig
from unit_fast.data.background import Background, received
from unit_fast.data.collate import collate
from unit_fast.data.errors import BadImage
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.decoded_steps import DecodedSteps, one_core_threads
from unit_fast.data.images.geometry import Picture
from unit_fast.errors import UserError
from unit_fast.tasks import Task

TOGETHER = 16
"""Samples that a reader of decoded images takes at a time, in one batch or in several: they keep its threads busy."""

Group = tuple[int, ...]
"""Indices of samples that are to be one batch."""


def groups(dataset, task: Task, indices: Sequence[int], size: int, window: int) -> Iterator[Group]:
    """``indices`` in batches of at most ``size`` samples whose images have one size.

    Args:
        dataset: asked for sizes (``shape``, ``text_tokens``) only where ``size`` is above 1.
        window: so many samples in a row are grouped together. Of a large one the batches are fuller, and the sizes of
            as many images are looked up before the first batch.
    """
    if size == 1:
        yield from ((index,) for index in indices)
        return
    for start in range(0, len(indices), window):
        part = list(indices[start : start + window])
        if task.has_text:
            part.sort(key=lambda index: _tokens(dataset, index))
        by_size: dict[tuple, list[int]] = {}
        for index in part:
            by_size.setdefault(dataset.shape(index) if task.has_image else (), []).append(index)
        for members in by_size.values():
            yield from (tuple(members[i : i + size]) for i in range(0, len(members), size))


def _tokens(dataset, index: int) -> int:
    try:
        return dataset.text_tokens(index)
    except UserError:  # ``get`` meets it again, and says so
        return 1


@dataclass
class Part:
    """Some batches of a pass, read together."""

    batches: list[Batch] = field(default_factory=list)
    members: list[list[tuple[int, dict]]] = field(default_factory=list)
    """For each batch the index of its samples and what is known of them, without the pixels."""
    labelled: list[bool] = field(default_factory=list)
    """For each batch whether its samples have labels; a batch without them has no targets."""
    unreadable: list[tuple[int, BadImage]] = field(default_factory=list)
    """Samples whose image could not be read; they are in no batch."""
    read_s: float = 0.0
    """Seconds of one reader that it took."""
    ready: object = None
    """CUDA event after which the batches are on the device."""


class _Fetcher:
    """Reads or describes some groups; what ``DecodedSteps`` asks for."""

    def __init__(self, dataset, task: Task, labelled: Callable[[dict], bool], pad_text: int):
        self.dataset, self.task, self.labelled, self.pad_text = dataset, task, labelled, pad_text

    def read(self, request: Sequence[Group]) -> Part:
        """The groups with their pixels, read by the reference engine."""
        begun = time.monotonic()
        part, _ = self._part(request, lambda index: self.dataset.get(index, None))
        part.read_s = time.monotonic() - begun
        return part

    def describe(self, request: Sequence[Group], checked: CheckedImages) -> tuple[Part, list[list[Picture]]]:
        """The groups without pixels, and what is to be read for each batch."""
        return self._part(request, lambda index: self.dataset.describe(index, None, checked))

    def visited(self, request: Sequence[Group]) -> tuple[object, list[int]]:
        """The data set and the indices of the groups."""
        return self.dataset, list(itertools.chain(*request))

    def _part(self, request: Sequence[Group], get: Callable[[int], dict]) -> tuple[Part, list[list[Picture]]]:
        part, pictures = Part(), []
        for group in request:
            # A sample without labels, or an image that is not as large as announced, takes a batch of its own.
            alike: dict[tuple, list[tuple[int, dict]]] = {}
            for index in group:
                try:
                    sample = get(index)
                except BadImage as error:
                    part.unreadable.append((index, error))
                    continue
                alike.setdefault((self.labelled(sample), _size(sample)), []).append((index, sample))
            for (labelled, _), members in alike.items():
                samples = [sample if labelled else _without_labels(sample) for _, sample in members]
                part.batches.append(collate(self.task.name, samples, self.pad_text))
                part.members.append([(index, _without_pixels(sample)) for index, sample in members])
                part.labelled.append(labelled)
                pictures.append([sample["picture"] for sample in samples if "picture" in sample])
        return part, pictures


def _size(sample: dict) -> tuple[int, int] | None:
    if "picture" in sample:
        return tuple(sample["picture"].geometry.size)
    return None if sample.get("image") is None else tuple(sample["image"].shape[-2:])


def _without_labels(sample: dict) -> dict:
    return {k: v for k, v in sample.items() if k not in ("label", "answer_scores", "labels", "boxes", "attributes")}


def _without_pixels(sample: dict) -> dict:
    return {k: v for k, v in sample.items() if k not in ("image", "picture")}


class SplitReader:
    """Iterator over the ``Part`` of some groups, in their order; a context manager that ends its threads.

    Args:
        dataset: of ``task``; ``get(index, None)``, for decoded images also ``describe`` and ``image_path``.
        wanted: groups of at most ``size`` samples, see ``groups``.
        labelled: whether a sample has labels.
        data: ``workers`` threads read ahead, ``prefetch`` parts each; with an engine as in training.
        pad_text: pad texts to this length; 0 to the longest of a batch.
        device: where the batches are wanted. On a CUDA device they are copied there on a stream of their own while the
            batches before are computed, and images are placed there.
        engine: None reads with the reference engine; ``dali`` or ``torchvision`` decode as they do for training.

    An error of reading is raised by ``next`` after the parts before it.
    """

    def __init__(
        self,
        dataset,
        task: Task,
        wanted: Iterable[Group],
        size: int,
        *,
        labelled: Callable[[dict], bool],
        data: DataConfig,
        pad_text: int = 0,
        device: torch.device,
        engine: str | None = None,
    ):
        fetcher = _Fetcher(dataset, task, labelled, pad_text)
        decoded = engine is not None and task.has_image
        if decoded:
            parts = iter(DecodedSteps(fetcher, _together(wanted), data, size, device, engine))
        elif data.workers:
            parts = _ahead(fetcher.read, ([group] for group in wanted), data.workers, data.workers * data.prefetch)
        else:
            parts = (fetcher.read([group]) for group in wanted)
        if decoded or device.type == "cuda":
            parts = Background(parts, data.prefetch, device)
        self.device, self.parts = device, parts

    def __iter__(self):
        return self

    def __next__(self) -> Part:
        part = next(self.parts)
        if part.ready is not None:
            received(part, self.device)
        return part

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the threads; what they have read ahead is dropped."""
        self.parts.close()


def _together(wanted: Iterable[Group]) -> Iterator[list[Group]]:
    """Groups of one sample or a few several at a time."""
    request: list[Group] = []
    for group in wanted:
        request.append(group)
        if sum(map(len, request)) >= TOGETHER:
            yield request
            request = []
    if request:
        yield request


def _ahead(function: Callable, items: Iterable, workers: int, depth: int) -> Iterator:
    """``map(function, items)`` in order, ``depth`` items ahead in ``workers`` threads."""
    pool = one_core_threads(workers, "evaluate")
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
