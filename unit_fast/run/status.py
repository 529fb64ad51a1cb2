"""The line that says where a run is: what is looked for first stands first, and what a terminal has no room for is
left out whole."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from unit_fast.tasks import get_task

SEPARATOR = " | "


class Pace:
    """Speed, waiting and what is left of ``steps`` updates, from what the host knows of each: no device is read."""

    def __init__(self, steps: int):
        self.steps = steps
        self.recent: deque[tuple[float, int, float]] = deque(maxlen=50)
        """Seconds, samples and seconds of waiting of the newest updates."""
        self.done = 0
        """The newest update."""
        self.since = self.began = time.monotonic()
        self.first: int | None = None

    def restart(self) -> None:
        """Time from here on is training's."""
        self.since = time.monotonic()

    def add(self, step: int, samples: int, wait_s: float) -> None:
        """Count update ``step``, which has just ended."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.began = step, self.since
        self.recent.append((max(now - self.since, 1e-9), samples, wait_s))
        self.since, self.done = now, step

    def pieces(self) -> list[str]:
        """Step, time left (evaluations and saves so far counted in), speed, waiting, memory."""
        found = [f"step {self.done}/{self.steps}"]
        if self.recent:
            seconds, samples, wait_s = map(sum, zip(*self.recent))
            speed = samples / seconds
            per_step = (time.monotonic() - self.began) / (self.done + 1 - self.first)
            found += [
                f"{duration(per_step * (self.steps - self.done))} left",
                f"{speed:,.0f} samples/s" if speed >= 1000 else f"{speed:.3g} samples/s",
                f"wait {wait_s / seconds:.0%}",
            ]
        return [*found, f"{peak_memory_gib():.1f} GiB"]


def fitted(pieces: Iterable[str], width: int) -> str:
    """As many of ``pieces``, from the first on, as ``width`` columns hold."""
    text = ""
    for piece in pieces:
        longer = f"{text}{SEPARATOR}{piece}" if text else piece
        if len(longer) > width:
            break
        text = longer
    return text or next(iter(pieces), "")[:width]


def loss_text(task: str, losses: Sequence[float], terms: Sequence[dict[str, float]] = ()) -> str:
    """``coco 12.41``; with the terms of each update ``coco 12.41 (ce 1.02 bbox 0.41 giou 0.88)``, the last decoder
    layer's. Means over the updates."""
    text = f"{get_task(task).short} {mean(losses):.4g}"
    parts = []
    for name in terms[-1] if terms else ():
        short = name.rsplit("/", 1)[-1].removeprefix("loss_")
        if not short[-1].isdigit():
            parts.append(f"{short} {mean([values[name] for values in terms]):.4g}")
    return f"{text} ({' '.join(parts)})" if parts else text


def mean(values: Sequence[float]) -> float:
    """Their mean, NaN of none."""
    return sum(values) / len(values) if values else math.nan


def peak_memory_gib() -> float:
    """Peak memory: the card's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def duration(seconds: float) -> str:
    """``42s``, ``7m03s``, ``3h12m`` or ``5d04h``."""
    seconds = max(0, round(seconds))
    for unit, small, size, smaller in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // smaller:02d}{small}"
    return f"{seconds}s"
