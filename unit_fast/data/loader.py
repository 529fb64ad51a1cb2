"""Batches in the order of ``sampler.requests``, read by DALI or by torchvision's way, in the background.

What a step gets depends on its request and the engine alone, never on who reads it: the same batches with any number of
workers. On a CUDA device batches are copied there on a stream of their own while the step before computes.
"""

import collections
from collections.abc import Callable, Iterator

import torch

from unit_fast.buckets import buckets_of
from unit_fast.data.background import Background, received
from unit_fast.data.fetch import Fetcher, Step
from unit_fast.data.images.decoded_steps import DecodedSteps
from unit_fast.data.images.engine import engine_of, why_not_dali
from unit_fast.data.sampler import Request, requests
from unit_fast.data.workers import Workers, tells_of_a_death
from unit_fast.errors import UserError, printable
from unit_fast.tasks import get_task


class Loader:
    """Iterator over the ``Step`` of each step from ``start`` to ``stop`` - 1; a context manager that ends its workers.

    Args:
        datasets: data set key -> dataset (``get(index, key)``, ``len``; for DALI and grouping what ``dataset.Dataset``
            has).
        counts: samples of each already consumed.
        device: where the batches are wanted; they are moved there only if it is a CUDA device.
        rank, processes: see ``sampler.requests``.

    An unreadable image is replaced by ``sampler.substitute`` and reported in the ``Step``. A worker that dies is a
    ``UserError``.
    """

    def __init__(
        self,
        datasets: dict,
        config,
        start: int,
        stop: int,
        counts: dict[str, int],
        *,
        device: torch.device | None = None,
        rank: int = 0,
        processes: int = 1,
    ):
        data = self.data = config.data
        self.device = device if device is not None and device.type == "cuda" else torch.device("cpu")
        self.waiting: collections.deque[Request] = collections.deque()
        """Requests given out and not yet answered, oldest first."""
        self.images, self.read_s = 0, 0.0
        self.real: collections.Counter[str] = collections.Counter()
        self.steps_read: collections.Counter[str] = collections.Counter()
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        shapes = sort_keys(datasets, config) if data.group > 1 else {}
        requested = self._remembered(
            requests(config, sizes, start, counts, stop, shapes=shapes, rank=rank, processes=processes)
        )
        pad_text = {name: config.model.tasks[name].text_length for name in datasets} if data.pad_text else {}
        fetcher = Fetcher(datasets, config.seed, pad_text, config.model)
        with_images = any(dataset.task.has_image for dataset in datasets.values())
        self.engine = engine_of(data) if with_images else "torchvision"
        self.why_not = why_not_dali(data) if with_images and data.engine == "auto" else None
        on_gpu = self.device.type == "cuda"
        self.reader: DecodedSteps | Workers | None = None
        """Who reads, where it is not the training process."""
        if with_images and (self.engine == "dali" or on_gpu):
            most = max(config.batch_of(name) for name in datasets)
            self.reader = DecodedSteps(fetcher, requested, data, most, self.device, self.engine)
        elif data.workers:
            self.reader = Workers(fetcher, requested, data)
        self.readers = self.reader.count if isinstance(self.reader, Workers) else 1
        """Readers that work at once, each at a step of its own."""
        self.steps = iter(self.reader or map(fetcher.__getitem__, requested))
        self.background = None
        if isinstance(self.reader, DecodedSteps) or on_gpu:
            self.steps = self.background = Background(self.steps, data.prefetch, self.device)

    def describe(self) -> str:
        """One line: who reads."""
        if isinstance(self.reader, DecodedSteps):
            data = self.data
            how = f"{data.dali_graph}, {data.decoder} decoder, " if self.engine == "dali" else ""
            place = ", placed on the GPU" if self.device.type == "cuda" else ""
            text = f"images are decoded by {self.engine} ({how}{self.reader.threads} threads){place}, "
            text += f"{data.prefetch} steps ahead"
            text += f", up to {data.cache_mib} MiB of them kept decoded" if data.cache_mib else ""
        else:
            who = f"{self.readers} processes" if self.reader is not None else "the training process"
            text = f"samples are read by {who}, images torchvision's way"
        return f"{text}; not by DALI: {self.why_not}" if self.why_not else text

    def summary(self) -> str:
        """One line: how much was read so far, how fast, and how much of it was padding."""
        parts = []
        if self.images:
            parts.append(f"{self.images} images at {self.images * self.readers / max(self.read_s, 1e-9):.3g} a second")
        padding = ", ".join(f"{get_task(n).short} {1 - self.real[n] / k:.0%}" for n, k in self.steps_read.items())
        return f"loader: {'; '.join([*parts, f'padding {padding}'])}" if padding else "loader: nothing read"

    def _remembered(self, requested: Iterator[Request]) -> Iterator[Request]:
        for request in requested:
            self.waiting.append(request)
            yield request

    def __iter__(self):
        return self

    def __next__(self) -> Step:
        step = next(self.steps)
        self.waiting.popleft()
        if step.error:
            raise UserError(step.error)
        if step.ready is not None:
            received(step, self.device)
        if images := sum(len(batch) for batch in step.batches if batch.image is not None):
            self.images, self.read_s = self.images + images, self.read_s + step.read_s
        self.real[step.task] += step.real
        self.steps_read[step.task] += 1
        return step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            # A batch of a worker that just died refers to memory which nobody can hand over any more.
            died = isinstance(self.reader, Workers) and isinstance(error, (EOFError, OSError)) and self.reader.died()
            self.close()
        except RuntimeError as late:  # torch's handler of SIGCHLD, see below, ran only now
            if not tells_of_a_death(late):
                raise
            died, error = True, late
            self.close()
        # torch notices a dead worker through SIGCHLD, that is anywhere in the training step.
        if died or tells_of_a_death(error):
            what = printable((str(error) or repr(error)).splitlines()[0])
            reading = f"{self.waiting[0].task}, step {self.waiting[0].step}" if self.waiting else "nothing"
            raise UserError(
                f"a loader process died; being read: {reading} ({what}). "
                "Often memory ran out or /dev/shm is full: try fewer --data.workers or a smaller --data.prefetch. "
                "--resume auto goes on from the last checkpoint"
            ) from error

    def close(self):
        """End the workers."""
        if self.background:
            self.background.close()
        if isinstance(self.reader, Workers):
            self.reader.close()


def sort_keys(datasets: dict, config) -> dict[str, Callable[[int, int], tuple]]:
    """Data set -> what its visits are sorted by, by index and key (``sampler.requests``): the image as ``Buckets.rank``
    has it, or the number of tokens."""
    buckets = buckets_of(config)

    def by_image(dataset):
        return lambda index, key: buckets.rank(*dataset.shape(index, key))

    return {
        name: by_image(dataset) if dataset.task.has_image else dataset.shape
        for name, dataset in datasets.items()
        if hasattr(dataset, "shape")
    }
