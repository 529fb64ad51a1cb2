"""Time: one step by phase, rounds in which providers take turns, and whole steps back to back.

A small kernel timed from the host tells what its launch costs, not what the card does: its replays are timed too
(``capture.py``).
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from benchmarks.runner.cases import Provider
from benchmarks.runner.marks import Marks

T = TypeVar("T")


class L2Flush:
    """Overwrites the L2 cache of a CUDA device; does nothing elsewhere."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def one_step(step: Callable[[Marks], object], device: torch.device) -> dict[str, float]:
    """Milliseconds by phase of one step, and their sum under ``total``."""
    marks = Marks(device)
    marks.skip()
    step(marks)
    if not marks.used:
        marks("total")
    return marks.milliseconds()


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The providers' turn in a round: every round starts with the next one."""
    start = round_number % max(1, len(names))
    return [*names[start:], *names[:start]]


def in_turns(timers: Mapping[str, Callable[[], T]], rounds: int, flush: Callable[[], None]) -> dict[str, list[T]]:
    """What the timers give, by name and round; ``flush`` runs before each."""
    out: dict[str, list[T]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in order(list(timers), number):
            flush()
            out[name].append(timers[name]())
    return out


def measure(
    providers: Mapping[str, Provider], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds by provider, round and phase, from the host."""
    flush = L2Flush(device)
    timers = {name: functools.partial(one_step, provider.step, device) for name, provider in providers.items()}
    for timer in timers.values():
        for _ in range(warmup):
            timer()
    return in_turns(timers, rounds, flush)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def back_to_back(
    step: Callable[[], object], device: torch.device, *, rounds: int, warmup: int, least_ms: float = 200.0
) -> list[float]:
    """Milliseconds a step in each of ``rounds`` rounds, as a training loop runs them; a round is as many steps as take
    about ``least_ms``, with a wait for the device before the first and after the last only."""
    for _ in range(max(1, warmup)):
        step()
    synchronize(device)

    def timed(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        return (time.perf_counter() - begun) * 1e3 / steps

    steps = max(1, round(least_ms / timed(1)))
    return [timed(steps) for _ in range(rounds)]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % points (linear between neighbours)."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(float(p) for p in points)
