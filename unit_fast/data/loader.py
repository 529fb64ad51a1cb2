"""Batches in the order of ``sampler.requests``, read by DALI or by torchvision's way, in the background.

What a step gets depends on its request and the engine alone, never on who reads it: the same batches with any number of
workers. On a CUDA device batches are copied there on a stream of their own while the step before computes.
"""

import collections
import contextlib
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from unit_fast.batch import Batch, real_places
from unit_fast.buckets import buckets_of
from unit_fast.data import BadImage, collate
from unit_fast.data.background import Background, Move, received
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.reader import DecodedSteps
from unit_fast.data.images.transforms import Picture, engine_of, why_not_dali
from unit_fast.data.sampler import Request, Visit, requests, substitute
from unit_fast.data.store.cache import open_cache
from unit_fast.errors import UserError, printable
from unit_fast.tasks import get_task

MOST_TRIES = 50
"""Substitutes tried for one unreadable image before the data set is given up."""
MOST_THREADS = 8
"""Threads that decode unless told otherwise. A core decodes some 400 photographs a second."""


@dataclass
class Step:
    """What one step trains on."""

    request: Request
    batches: list[Batch]
    """One a forward pass."""
    images_read: int = 0
    """Images tried, unreadable ones included."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and message of each unreadable image."""
    error: str | None = None
    """Message of a user error met by a worker; raised in the training process."""
    read_s: float = 0.0
    """Seconds of one reader that it took."""
    ready: object = None
    """CUDA event after which the batches are on the device."""

    @property
    def task(self) -> str:
        return self.request.task

    @property
    def real(self) -> float:
        """Share of the images' area, or of the texts' places, that is not padding."""
        places = [b.pixel_mask if b.pixel_mask is not None else b.input_ids for b in self.batches]
        return sum(map(real_places, self.batches)) / max(sum(mask.numel() for mask in places), 1)


class Fetcher(torch.utils.data.Dataset):
    """Reads a request's samples and collates them. Runs in the worker processes of torchvision's engine."""

    def __init__(self, datasets: dict, seed: int, pad_text: dict[str, int], model=None):
        self.datasets, self.seed, self.pad_text, self.model = datasets, seed, pad_text, model

    def __getitem__(self, request: Request) -> Step:
        """The step with its pixels, read by the reference engine."""
        begun = time.monotonic()
        step, _ = self._step(request, self.datasets[request.task].get)
        step.read_s = time.monotonic() - begun
        return step

    def describe(self, request: Request, checked: CheckedImages) -> tuple[Step, list[list[Picture]]]:
        """The step without pixels, and what is to be read for each of its batches."""
        dataset = self.datasets[request.task]
        if not dataset.task.has_image:
            step, _ = self._step(request, dataset.get)
            return step, []
        return self._step(request, lambda index, key: dataset.describe(index, key, checked))

    def image_paths(self, request: Request) -> list:
        """The images of a request, as far as their names are usable."""
        dataset, found = self.datasets[request.task], []
        if dataset.task.has_image:
            for visit in (visit for micro in request.micro for visit in micro):
                with contextlib.suppress(BadImage):
                    found.append(dataset.image_path(visit.index))
        return found

    def _step(self, request: Request, get) -> tuple[Step, list[list[Picture]]]:
        step, pictures = Step(request, []), []
        dataset, pad_text = self.datasets[request.task], self.pad_text.get(request.task, 0)
        try:
            for micro in request.micro:
                samples = [self._sample(dataset, get, visit, step) for visit in micro]
                step.batches.append(collate(request.task, samples, pad_text_to=pad_text, model=self.model))
                pictures.append([sample["picture"] for sample in samples if "picture" in sample])
        except UserError as error:
            step.error = str(error)
        return step, pictures[: len(step.batches)]

    def _sample(self, dataset, get, visit: Visit, step: Step) -> dict:
        task = step.task
        for attempt in range(1, MOST_TRIES + 1):
            step.images_read += dataset.task.has_image
            try:
                return get(visit.index, visit.key)
            except BadImage as error:
                step.bad.append((str(error.path), str(error)))
                visit = substitute(self.seed, task, len(dataset), visit, attempt)
        raise UserError(
            f"{task}: {MOST_TRIES} images in a row could not be read, the last {step.bad[-1][1]}; "
            "check the images with `unit-fast data check ROOT --decode`"
        )


class BadImages:
    """Counts unreadable images and stops the run when they are certainly more than a share of those read."""

    JUDGED_FROM = 100
    """So many images are taken as read when fewer were: one bad image in the first twenty is no share yet."""

    def __init__(self, max_share: float, read: int = 0, by_task: dict[str, int] | None = None):
        self.max_share, self.read, self.by_task = max_share, read, collections.Counter(by_task or {})
        self.paths: dict[str, str] = {}

    def add(self, step: Step) -> list[str]:
        """Count ``step``. Returns one message for each path not met before. ``UserError`` above the share."""
        self.read += step.images_read
        self.by_task[step.task] += len(step.bad)
        new = {path: message for path, message in step.bad if path not in self.paths}
        self.paths.update(new)
        count = self.by_task.total()
        if count > self.tolerated():
            first = "; ".join(printable(message) for message in list(self.paths.values())[:3])
            raise UserError(
                f"{count} of {self.read} images read could not be decoded, more than the share of {self.max_share:g} "
                f"allowed (first: {first}). Repair them (`unit-fast data check ROOT --decode` lists them all) or raise "
                "--data.max-bad-share"
            )
        return [f"{printable(message)}; replaced by another sample of {step.task}" for message in new.values()]

    def tolerated(self) -> float:
        """Bad images among those read that ``max_share`` explains: so many are expected, and four deviations more.

        Images come at random: of a root with just that share bad, every second stretch has more.
        """
        expected = self.max_share * max(self.read, self.JUDGED_FROM)
        return expected + 4 * expected**0.5

    def state(self) -> dict:
        return {"read": self.read, "by_task": {k: v for k, v in self.by_task.items() if v}}


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
        data = config.data
        pad_text = {}
        if data.pad_text:
            pad_text = {name: config.model.tasks[name].text_length for name in datasets}
        self.fetcher = Fetcher(datasets, config.seed, pad_text, config.model)
        self.device = device if device is not None and device.type == "cuda" else torch.device("cpu")
        on_gpu = self.device.type == "cuda"
        self.waiting: collections.deque[Request] = collections.deque()
        """Requests given out and not yet answered, oldest first."""
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        shapes = _shapes(datasets, config) if data.group > 1 else {}
        requested = self._remembered(
            requests(config, sizes, start, counts, stop, shapes=shapes, rank=rank, processes=processes)
        )
        with_images = [dataset for dataset in datasets.values() if dataset.task.has_image]
        self.engine = engine_of(data) if with_images else "torchvision"
        self.why_not = why_not_dali(data) if with_images and data.engine == "auto" else None
        self.readers = 1
        """Readers that work at once, each at a step of its own."""
        self.reader = self.background = None
        self.images, self.read_s = 0, 0.0
        self.real: collections.Counter[str] = collections.Counter()
        self.steps_read: collections.Counter[str] = collections.Counter()
        if with_images and (self.engine == "dali" or on_gpu):
            threads = decoding_threads(data)
            checked = CheckedImages(open_cache(data).folder, data.max_pixels)
            most = max(config.batch_of(name) for name in datasets)
            self.reader = DecodedSteps(self.fetcher, requested, data, checked, most, threads, self.device, self.engine)
            steps = iter(self.reader)
        elif data.workers:
            self.readers = data.workers
            self.reader = torch.utils.data.DataLoader(
                self.fetcher,
                sampler=_Once(requested),
                batch_size=None,
                num_workers=data.workers,
                prefetch_factor=data.prefetch,
                worker_init_fn=_start_worker,
                # The DataLoader seeds its workers from a generator: with one of its own it leaves the default one,
                # which dropout draws from, untouched.
                generator=torch.Generator(),
            )
            steps = self.reader = iter(self.reader)
        else:
            steps = map(self.fetcher.__getitem__, requested)
        if isinstance(self.reader, DecodedSteps) or on_gpu:
            move = Move(self.device) if on_gpu else None
            steps = self.background = Background(
                steps, data.prefetch, move, move.on_stream if move else contextlib.nullcontext
            )
        self.steps = steps

    def describe(self) -> str:
        """One line: who reads."""
        if isinstance(self.reader, DecodedSteps):
            data, threads = self.reader.data, self.reader.threads
            how = f"{data.dali_graph}, {data.decoder} decoder, " if self.engine == "dali" else ""
            place = ", placed on the GPU" if self.device.type == "cuda" else ""
            text = f"images are decoded by {self.engine} ({how}{threads} threads){place}, {data.prefetch} steps ahead"
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
            sentinels = [worker.sentinel for worker in getattr(self.reader, "_workers", ())]
            # its connections break a moment before it is gone
            died = isinstance(error, (EOFError, OSError)) and bool(multiprocessing.connection.wait(sentinels, 2))
            self.close()
        except RuntimeError as late:  # torch's handler of SIGCHLD, see below, ran only now
            if not _tells_of_a_death(late):
                raise
            died, error = True, late
            self.close()
        # torch notices a dead worker through SIGCHLD, that is anywhere in the training step.
        if died or _tells_of_a_death(error):
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
        workers = getattr(self.reader, "_workers", ())
        if workers:
            self.reader._shutdown_workers()
        for worker in workers:  # those that hang in a read; SIGTERM they ignore
            if worker.is_alive():
                worker.kill()


def decoding_threads(data) -> int:
    """Threads that decode images: ``data.workers``, or one a core and at most ``MOST_THREADS``."""
    return data.workers or min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _tells_of_a_death(error) -> bool:
    """Whether torch raised ``error`` because a worker process died."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _shapes(datasets: dict, config) -> dict:
    """Data set -> what its visits are sorted by: the image as ``Buckets.rank`` has it, or the number of tokens."""
    buckets = buckets_of(config)

    def by_image(dataset):
        return lambda index, key: buckets.rank(*dataset.shape(index, key))

    return {
        name: by_image(dataset) if dataset.task.has_image else dataset.shape
        for name, dataset in datasets.items()
        if hasattr(dataset, "shape")
    }


class _Once:
    """What torch's DataLoader wants of a sampler: an iterable; it is taken once."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def _start_worker(worker: int):
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the training process decides what to do, and its
    # workers must live until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
