"""Steps captured in a CUDA graph, whose replay has no launches of its own."""

import contextlib
from collections.abc import Callable, Mapping

import torch

from benchmarks.runner.cases import Provider
from benchmarks.runner.marks import Marks, NoMarks
from benchmarks.runner.timing import in_turns, synchronize

_WARM_UP = 3
"""Runs before a capture: libraries allocate in the first, Triton compiles."""


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
    providers: Mapping[str, Provider], device: torch.device, rounds: int, flush: Callable[[], None]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """(milliseconds by provider, round and phase of replayed steps; why a provider has none).

    The providers take turns; ``flush`` runs before each replay.
    """
    graphs, why = {}, {}
    for name, provider in providers.items():
        try:
            graphs[name] = Captured(provider.step, device)
        except NoCapture as error:
            why[name] = str(error)
    return in_turns(graphs, rounds, flush), why


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
