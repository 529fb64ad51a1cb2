"""Stop watches that a provider's step is handed."""

import time

import torch


class Marks:
    """``marks("forward")`` ends the phase that began at the last mark; ``marks.skip()`` starts anew without booking the
    time since the last mark.

    On CUDA marks are events on the current stream, so that nothing waits for the device inside the step. ``captured``:
    made within a capture, every replay records its events anew.
    """

    def __init__(self, device: torch.device, *, captured: bool = False):
        self.cuda, self._captured = device.type == "cuda", captured
        self._phases: list[tuple[str, object, object]] = []
        self.skip()

    @property
    def used(self) -> bool:
        """Whether a phase was ended."""
        return bool(self._phases)

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=self._captured)
        event.record()
        return event

    def skip(self) -> None:
        self._last = self._now()

    def __call__(self, phase: str) -> None:
        now = self._now()
        self._phases.append((phase, self._last, now))
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by phase, those of the same name added up, and their sum under ``total``."""
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, float] = {}
        for phase, start, end in self._phases:
            taken = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            out[phase] = out.get(phase, 0.0) + taken
        out.setdefault("total", sum(out.values()))
        return out


class NoMarks:
    """Takes marks and keeps nothing."""

    def skip(self) -> None:
        pass

    def __call__(self, phase: str) -> None:
        pass
