"""What torch's profiler sees of some steps: kernels by category, launches, copies, waits, how long the card was busy.

``Profile.of`` takes plain events, so that it can be tried without a card.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.runner.kernels import category
from benchmarks.runner.timing import synchronize

PROFILED = 2
"""Steps under the profiler."""
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch")
"""Beginnings of the host's calls that start work."""
_WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
"""The host's calls that wait for the card. ``cudaMemcpyAsync`` is none of them: it waits only where the memory is not
pinned, and then a ``cudaStreamSynchronize`` stands beside it."""
STEP = "benchmark: one step"
"""The range on the host that each step is run in."""


@dataclass(frozen=True)
class Event:
    """One line of a profiler's trace."""

    name: str
    on_card: bool
    """Whether it ran on the card; else it is a call or a range of the host."""
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one step does, as a mean over the steps that were profiled."""

    launches: float
    """Calls of the host that start work; a graph's replay is one."""
    kernels: float
    """What ran on the card besides copies and memsets."""
    waits: float
    """Calls of the host that wait for the card."""
    copies_to_host: float
    copies_to_device: float
    copies_on_device: float
    busy_ms: float
    """Time in which the card ran anything: what runs beside something else counts once."""
    categories: dict[str, dict[str, float]]
    """Category -> ``ms`` (added up) and ``kernels``; the longest first."""
    by_name: dict[str, dict[str, float]]
    """Kernel -> the same."""

    @classmethod
    def of(cls, events: Sequence[Event], steps: int) -> "Profile":
        """From the events of ``steps`` steps, each within a range of the host called ``STEP``.

        Host calls outside the ranges are the measuring's own and are not counted. ``ValueError`` where the ranges are
        not ``steps``: the trace is not what it should be.
        """
        ranges = [(e.start_us, e.end_us) for e in events if not e.on_card and e.name == STEP]
        if len(ranges) != steps or steps < 1:
            raise ValueError(f"Profile.of: {len(ranges)} ranges {STEP!r} in the trace, {steps} were expected")
        calls: Counter[str] = Counter()
        for event in events:
            if not event.on_card and any(low <= event.start_us < high for low, high in ranges):
                calls[event.name] += 1
        card = [e for e in events if e.on_card]
        kernels = [e for e in card if not e.name.startswith("Mem")]

        def copies(beginning: str) -> float:
            return sum(e.name.startswith(f"Memcpy {beginning}") for e in card) / steps

        return cls(
            launches=sum(n for name, n in calls.items() if name.startswith(_LAUNCHES)) / steps,
            kernels=len(kernels) / steps,
            waits=sum(calls[name] for name in _WAITS) / steps,
            copies_to_host=copies("DtoH"),
            copies_to_device=copies("HtoD"),
            copies_on_device=copies("DtoD"),
            busy_ms=_covered([(e.start_us, e.end_us) for e in card]) * 1e-3 / steps,
            categories=_sums(((category(e.name), e) for e in card), steps),
            by_name=_sums(((e.name, e) for e in card), steps),
        )

    def row(self) -> dict:
        """What a results file keeps: all but the single kernels."""
        found = asdict(self)
        del found["by_name"]
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def _sums(named: Iterable[tuple[str, Event]], steps: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {}
    for name, event in named:
        sums = found.setdefault(name, [0.0, 0])
        sums[0] += event.end_us - event.start_us
        sums[1] += 1
    return {
        name: {"ms": round(us * 1e-3 / steps, 5), "kernels": round(count / steps, 2)}
        for name, (us, count) in sorted(found.items(), key=lambda item: -item[1][0])
    }


def events_of(found: Sequence) -> list[Event]:
    """Torch's profiler events as plain ones. A range that torch draws on the card's line, as around an optimiser's
    step, is no work of the card: it is left out (kernels within it would count twice)."""
    ranges = {event.name for event in found if event.is_user_annotation}
    events = []
    for event in found:
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if not (on_card and event.name in ranges):
            events.append(Event(event.name, on_card, event.time_range.start, event.time_range.end))
    return events


def profile(step: Callable[[], object], device: torch.device, steps: int = PROFILED) -> Profile:
    """What a step does, as a mean over ``steps``; on a CPU there are no kernels in it."""
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(profiler.ProfilerActivity.CUDA)
    step()
    synchronize(device)
    with profiler.profile(activities=activities, acc_events=True) as found:
        for _ in range(steps):
            with profiler.record_function(STEP):
                step()
        synchronize(device)
    return Profile.of(events_of(found.events()), steps)
