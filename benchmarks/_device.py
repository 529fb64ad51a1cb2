"""Measuring on a card: steps back to back, one operator replayed in a graph, and the profiler's view of a step.

A small kernel timed from the host tells what its launch costs, not what the card does. So single operators have two
figures: from the host (``_run.measure``), and captured in a CUDA graph, whose replay has no launches of its own
(``Captured``). Whole steps are timed back to back, as a training loop runs them (``back_to_back``).
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks._kernels import STEP, Event, Profile
from benchmarks._marks import Marks, NoMarks

PROFILED = 2
"""Steps under the profiler."""
_WARM_UP = 3
"""Runs before a capture: libraries allocate in the first, Triton compiles."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def back_to_back(
    step: Callable[[], object], device: torch.device, *, rounds: int, warmup: int, least_ms: float = 200.0
) -> list[float]:
    """Milliseconds a step in each of ``rounds`` rounds; a round is as many steps as take about ``least_ms``, with a
    wait for the device before the first and after the last only."""
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


# ------------------------------------------------------------------------------------------------------------ captured


class NoCapture(RuntimeError):
    """Why a step cannot be captured."""


class Captured:
    """``step(marks)`` in a CUDA graph; a call replays it and gives milliseconds by phase.

    ``NoCapture`` with the reason where the step waits for the card (found out beforehand, because a capture that fails
    half-way leaves torch's generators behind in a state of its own) or cannot be captured for another.
    """

    def __init__(self, step: Callable[[object], None], device: torch.device):
        if device.type != "cuda":
            raise NoCapture(f"graphs need a CUDA device, this is {device}")
        self.device = device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step(NoMarks())
            synchronize(device)
            with _waits_raise():
                step(NoMarks())
        synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=stream):
                self.marks = Marks(device, captured=True)
                step(self.marks)
                if not self.marks.used:
                    self.marks("total")
            self()  # a replay that fails here has no figure, instead of ending the run later
        except RuntimeError as error:
            raise NoCapture(first_line(error)) from error

    def __call__(self) -> dict[str, float]:
        self.graph.replay()
        synchronize(self.device)
        return self.marks.milliseconds()


def captured_rounds(
    providers: Mapping[str, object], device: torch.device, rounds: int, flush: Callable[[], None]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """(milliseconds by provider, round and phase of replayed steps; why a provider has none).

    providers: name -> ``_run.Provider``. They take turns; ``flush`` runs before each replay.
    """
    graphs, why = {}, {}
    for name, provider in providers.items():
        try:
            graphs[name] = Captured(provider.step, device)
        except NoCapture as error:
            why[name] = str(error)
    out: dict[str, list[dict[str, float]]] = {name: [] for name in graphs}
    for number in range(rounds):
        for name in order(list(graphs), number):
            flush()
            out[name].append(graphs[name]())
    return out, why


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The providers' turn in a round: every round starts with the next one."""
    start = round_number % max(1, len(names))
    return [*names[start:], *names[:start]]


@contextlib.contextmanager
def _waits_raise():
    """What waits for the card raises ``NoCapture``."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise NoCapture(f"it waits for the card ({first_line(error)})") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------ profile


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
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    step()
    synchronize(device)
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(steps):
            with record_function(STEP):
                step()
        synchronize(device)
    return Profile.of(events_of(found.events()), steps)
