"""Batches in the order of ``sampler.requests``, read in this process or by worker processes.

What a step gets depends on its request alone, never on who reads it: the same batches with any number of workers.
"""

import collections
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from unit_fast.batch import Batch
from unit_fast.data import BadImage, collate
from unit_fast.data.sampler import Request, Visit, requests, substitute
from unit_fast.errors import UserError, printable

MOST_TRIES = 50
"""Substitutes tried for one unreadable image before the data set is given up."""


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

    @property
    def task(self) -> str:
        return self.request.task

    def pin_memory(self) -> "Step":
        self.batches = [batch.pin_memory() for batch in self.batches]
        return self


class Fetcher(torch.utils.data.Dataset):
    """Reads a request's samples and collates them. Runs in the worker processes."""

    def __init__(self, datasets: dict, seed: int, pad_text: dict[str, int]):
        self.datasets, self.seed, self.pad_text = datasets, seed, pad_text

    def __getitem__(self, request: Request) -> Step:
        step = Step(request, [])
        dataset = self.datasets[request.task]
        try:
            for micro in request.micro:
                samples = [self._sample(dataset, request.task, visit, step) for visit in micro]
                step.batches.append(collate(request.task, samples, pad_text_to=self.pad_text.get(request.task, 0)))
        except UserError as error:
            step.error = str(error)
        return step

    def _sample(self, dataset, task: str, visit: Visit, step: Step) -> dict:
        for attempt in range(1, MOST_TRIES + 1):
            step.images_read += dataset.task.has_image
            try:
                return dataset.get(visit.index, visit.key)
            except BadImage as error:
                step.bad.append((str(error.path), str(error)))
                visit = substitute(self.seed, task, len(dataset), visit, attempt)
        raise UserError(
            f"{task}: {MOST_TRIES} images in a row could not be read, the last {step.bad[-1][1]}; "
            "check the images with `unit-fast data check ROOT --decode`"
        )


class BadImages:
    """Counts unreadable images and stops the run when they are more than a share of those read."""

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
        if count > self.max_share * max(self.read, self.JUDGED_FROM):
            first = "; ".join(printable(message) for message in list(self.paths.values())[:3])
            raise UserError(
                f"{count} of {self.read} images read could not be decoded, more than the share of {self.max_share:g} "
                f"allowed (first: {first}). Repair them (`unit-fast data check ROOT --decode` lists them all) or raise "
                "--data.max-bad-share"
            )
        return [f"{printable(message)}; replaced by another sample of {step.task}" for message in new.values()]

    def state(self) -> dict:
        return {"read": self.read, "by_task": {k: v for k, v in self.by_task.items() if v}}


class Loader:
    """Iterator over the ``Step`` of each step from ``start`` to ``stop`` - 1; a context manager that ends its workers.

    datasets: data set key -> dataset (``get(index, key)``, ``len``). counts: samples of each already consumed.
    An unreadable image is replaced by ``sampler.substitute`` and reported in the ``Step``. A worker that dies is a
    ``UserError`` that names the data set being read, wherever inside the ``with`` block it is noticed.
    """

    def __init__(self, datasets: dict, config, start: int, stop: int, counts: dict[str, int], pin: bool = False):
        pad_text = {}
        if config.data.pad_text:
            pad_text = {name: config.model.tasks[name].text_length for name in datasets}
        self.fetcher = Fetcher(datasets, config.seed, pad_text)
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        self.waiting: collections.deque[Request] = collections.deque()
        """Requests given out and not yet answered, oldest first."""
        self.pin = pin and torch.cuda.is_available()
        requested = self._remembered(requests(config, sizes, start, counts, stop))
        if config.data.workers:
            self.steps = iter(
                torch.utils.data.DataLoader(
                    self.fetcher,
                    sampler=_Once(requested),
                    batch_size=None,
                    num_workers=config.data.workers,
                    prefetch_factor=config.data.prefetch,
                    pin_memory=self.pin,
                    worker_init_fn=_start_worker,
                    # The DataLoader seeds its workers from a generator: with one of its own it leaves the default one,
                    # which dropout draws from, untouched.
                    generator=torch.Generator(),
                )
            )
        else:
            self.steps = map(self._here, requested)

    def _remembered(self, requested: Iterator[Request]) -> Iterator[Request]:
        for request in requested:
            self.waiting.append(request)
            yield request

    def _here(self, request: Request) -> Step:
        step = self.fetcher[request]
        return step.pin_memory() if self.pin else step

    def __iter__(self):
        return self

    def __next__(self) -> Step:
        step = next(self.steps)
        self.waiting.popleft()
        if step.error:
            raise UserError(step.error)
        return step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()
        # torch notices a dead worker through SIGCHLD, that is anywhere in the training step.
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            reading = f"{self.waiting[0].task}, step {self.waiting[0].step}" if self.waiting else "nothing"
            raise UserError(
                f"a loader process died; being read: {reading} ({printable(str(error).splitlines()[0])}). Often memory "
                "ran out or /dev/shm is full: try fewer --data.workers or a smaller --data.prefetch. "
                "--resume auto goes on from the last checkpoint"
            ) from error

    def close(self):
        """End the workers."""
        workers = getattr(self.steps, "_workers", ())
        if workers:
            self.steps._shutdown_workers()
        for worker in workers:  # those that hang in a read; SIGTERM they ignore
            if worker.is_alive():
                worker.kill()


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
