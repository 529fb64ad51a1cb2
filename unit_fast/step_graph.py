"""The whole training step as CUDA graphs, one for each task and bucket of shapes.

A step of ours reads nothing on the host (``tests/test_no_host_read.py``), so forward, matching, losses, backward, clip
and optimiser are captured together and replayed with one launch. A batch is copied into the static tensors of its
bucket; the first batches of a bucket run eagerly on a side stream, which is the warm-up that capture wants and trains
as any other step; then the step is captured and from there on replayed. Dropout's numbers come from the default
generator, whose offset a replay advances; the learning rate comes from a step counter on the device. All graphs share
one memory pool, so that together they need little more than the largest.

Where a step cannot be captured, its bucket runs eagerly and one line says why. A counter inside the step proves that
replays happen: ``check`` compares it with the host's.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unit_fast.batch import Batch, Buckets, BucketSpec, fill, real_share
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

WARM_UP = 2
"""Eager steps of a bucket before it is captured: the first initialises libraries and optimiser state."""
MOST_GRAPHS = 64
"""Buckets captured at most; more would hold too many static inputs and take longer to capture than they save."""

_log = logging.getLogger("unit_fast.step_graph")


class CudaGraphs:
    """Capture and replay on a CUDA device, one memory pool for all graphs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def eager(self, step: Callable):
        """``step()`` on the stream that captures."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = step()
        current.wait_stream(self.stream)
        return result

    def capture(self, step: Callable) -> tuple[Callable[[], None], object]:
        """(replay, the result whose tensors each replay fills); ``step`` is recorded, not run."""
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may pin memory meanwhile: only what this thread does is forbidden.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


@dataclass
class _Captured:
    """What is known of one task and bucket."""

    batches: list[Batch]
    """The static tensors, one batch a forward pass."""
    eager_steps: int = 0
    replays: int = 0
    replay: Callable[[], None] | None = None
    result: object = None
    refused: str | None = None
    """Why it stays eager."""


class StepGraphs:
    """Runs ``step(task, batches, done)``, captured where it can be.

    ``step`` is one whole update: it reads only its batches and what lives on the device, and returns a dataclass of
    tensors (and of what never changes), which the next call may overwrite. ``done``: updates before this one, int64 on
    the device, counted by the steps themselves from the number given here. ``between`` is called on the host after each
    capture. ``backend``: ``CudaGraphs``, or what does the same (tests).
    """

    def __init__(
        self,
        step: Callable[[str, list[Batch], Tensor], object],
        buckets: Buckets,
        device: torch.device,
        *,
        done: int = 0,
        between: Callable[[], None] = lambda: None,
        backend=None,
        warm_up: int = WARM_UP,
        most: int = MOST_GRAPHS,
    ):
        self.step, self.buckets, self.device, self.between = step, buckets, device, between
        self.backend = CudaGraphs(device) if backend is None else backend
        self.warm_up, self.most = warm_up, most
        self.captured: dict[tuple[str, BucketSpec, int], _Captured] = {}
        self.done = torch.full((), done, dtype=torch.int64, device=device)
        """Updates that really ran."""
        self.expected = done
        self.real: Counter[str] = Counter()
        self.padded: Counter[str] = Counter()

    def __call__(self, task: str, batches: Sequence[Batch]):
        """One update on ``batches`` of ``task``, wherever they lie; what ``step`` returned."""
        bucket = self.buckets.of(batches)
        key = task, bucket, len(batches)
        known = self.captured.get(key)
        if known is None:
            known = self.captured[key] = _Captured([bucket.empty(b, self.device) for b in batches])
        for static, batch in zip(known.batches, batches, strict=True):
            fill(static, batch)
            if batch.sizes:
                self.real[task] += real_share(batch, bucket)
                self.padded[task] += 1
        self.expected += 1
        if known.replay is None and known.refused is None and known.eager_steps >= self.warm_up:
            self._capture(task, bucket, known)
        if known.replay is None:
            known.eager_steps += 1
            return self.backend.eager(lambda: self._run(task, known.batches))
        known.replays += 1
        known.replay()
        return known.result

    def _run(self, task: str, batches: list[Batch]):
        result = self.step(task, batches, self.done)
        self.done.add_(1)
        return result

    def _capture(self, task: str, bucket: BucketSpec, known: _Captured) -> None:
        count = sum(c.replay is not None for c in self.captured.values())
        if count >= self.most:
            known.refused = f"{count} graphs exist already"
        else:
            try:
                known.replay, known.result = self.backend.capture(lambda: self._run(task, known.batches))
            except torch.cuda.OutOfMemoryError as error:
                known.refused = f"out of memory ({str(error).splitlines()[0]})"
            except RuntimeError as error:  # what CUDA and torch raise when something cannot be captured
                known.refused = f"capture failed ({str(error).splitlines()[0]})"
            finally:
                self.between()
        if known.refused:
            _log.warning("%s, %s: stays eager: %s", task, bucket, known.refused)
        else:
            _log.info("%s, %s: captured (graph %d)", task, bucket, count + 1)

    def check(self) -> None:
        """``RuntimeError`` unless every step and every replay so far has run on the device. Reads the device."""
        ran = int(self.done)
        if ran != self.expected:
            raise RuntimeError(
                f"{self.expected} steps were asked for, {ran} ran on the device: a graph did not replay; "
                "use --graph off and report it"
            )

    def rows(self) -> list[dict]:
        """One row a task and bucket: how it ran so far."""
        return [
            {"task": task, "bucket": str(bucket), "eager": k.eager_steps, "replays": k.replays, "refused": k.refused}
            for (task, bucket, _), k in self.captured.items()
        ]

    def waste(self) -> dict[str, float]:
        """Task -> share of its padded image area, or of its padded text, that was padding."""
        return {task: 1 - self.real[task] / count for task, count in self.padded.items()}

    def summary(self) -> str:
        """One line: how much was captured and replayed, and what the padding cost."""
        rows = self.rows()
        graphs, replays = sum(r["replays"] > 0 for r in rows), sum(r["replays"] for r in rows)
        steps = replays + sum(r["eager"] for r in rows)
        waste = ", ".join(f"{get_task(task).short} {share:.0%}" for task, share in self.waste().items())
        return (
            f"CUDA graphs: {graphs} of {len(rows)} shapes, {replays} of {steps} steps replayed; "
            f"padding: {waste or 'not known'}"
        )


def wanted(mode: str, device: torch.device) -> str | None:
    """Why no graphs are used for ``mode`` "auto", "on" or "off", or None where they are.

    ``UserError`` where they are demanded and cannot be.
    """
    if mode == "off":
        return "--graph off"
    if device.type == "cuda":
        return None
    if mode == "on":
        raise UserError(f"--graph on: the run is on {device}, graphs need a CUDA device; take --graph auto")
    return f"the run is on {device}"
