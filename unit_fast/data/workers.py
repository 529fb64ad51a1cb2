"""Steps read by processes of torch's ``DataLoader``."""

import multiprocessing.connection
import signal
from collections.abc import Iterable

import torch

from unit_fast.config import DataConfig


class Workers:
    """``fetcher[request]`` of each request, in order, read by ``data.workers`` processes."""

    def __init__(self, fetcher: torch.utils.data.Dataset, requested: Iterable, data: DataConfig):
        self.count = data.workers
        self._steps = iter(
            torch.utils.data.DataLoader(
                fetcher,
                sampler=requested,
                batch_size=None,
                num_workers=data.workers,
                prefetch_factor=data.prefetch,
                worker_init_fn=_start,
                # The DataLoader seeds its workers from a generator: with one of its own it leaves the default one,
                # which dropout draws from, untouched.
                generator=torch.Generator(),
            )
        )
        self.processes = list(self._steps._workers)

    def __iter__(self):
        return self._steps

    def died(self) -> bool:
        """Whether one of the processes is gone; its connections break a moment before it is."""
        return bool(multiprocessing.connection.wait([process.sentinel for process in self.processes], 2))

    def close(self) -> None:
        """End the processes."""
        self._steps._shutdown_workers()
        for process in self.processes:  # those that hang in a read; SIGTERM they ignore
            if process.is_alive():
                process.kill()


def tells_of_a_death(error) -> bool:
    """Whether torch raised ``error`` because a worker process died."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _start(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the training process decides what to do, and its
    # workers must live until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
