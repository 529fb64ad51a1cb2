"""The whole training step as CUDA graphs, one for each task and bucket of shapes.

A step of ours reads nothing on the host (``tests/run/test_no_host_read.py``), so forward, matching, losses, backward,
clip and optimiser are captured together and replayed with one launch. A batch is copied into static tensors that all
buckets share (``input_arena``); the first batch of a bucket runs eagerly on the capturing stream, which is the warm-up
that capture wants and trains as any other step; then the step is captured and from there on replayed. Dropout's numbers
come from the default generator, whose offset a replay advances; the learning rate comes from a step counter on the
device.

Memory: all graphs and the eager steps between them take it from one pool, so that together they need little more than
the largest. Replays overwrite whatever lies in it. So what outlives a step is made outside (``MaskedAdamW.prepare``,
``ops.reserve``), and what a replay reads it writes before, or it was made before the capture
(``tests/run/test_capture.py`` proves both for every task).

Where a step cannot be captured, its bucket runs eagerly and one line says why. A counter inside the step proves that
replays happen: ``check`` compares it with the host's.
"""

import contextlib
import dataclasses
import gc
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.buckets import Buckets, BucketSpec, fill, real_share
from unit_fast.errors import UserError
from unit_fast.run.input_arena import InputArena
from unit_fast.tasks import get_task

WARM_UP = 1
"""Eager steps of a bucket before it is captured: they initialise libraries and compile kernels for its shapes."""
TRIES = 2
"""Captures of a bucket that may fail; between two of them it runs eagerly once more."""
MOST_GRAPHS = 96
"""Buckets captured at most; more take longer to capture than they save."""

_log = logging.getLogger("unit_fast.step_graph")


class Graphs:
    """What ``StepGraphs`` asks of what captures. This one has only eager steps; it is for other devices to build on."""

    def eager(self, step: Callable):
        """The result of ``step()``, in memory that no replay overwrites."""
        return step()

    def left_behind(self) -> str | None:
        """What the last eager step left in the memory of graphs, all of which must be given up then; None: nothing."""
        return None

    def capture(self, step: Callable) -> tuple[Callable[[], None], object]:
        """(replay, the result whose tensors each replay fills); ``step`` is recorded, not run."""
        raise NotImplementedError

    def random_state(self) -> Tensor:
        """The state of the default generator, which the host knows."""
        return torch.get_rng_state()

    def release(self, random_state: Tensor) -> None:
        """After the last reference to every graph is gone: give their memory back, and draw again from that state."""
        torch.set_rng_state(random_state)


class CudaGraphs(Graphs):
    """Capture and replay on a CUDA device; one memory pool for all graphs and for the eager steps between them."""

    def __init__(self, device: torch.device):
        # By its number: counters are kept by device, and memory pools are not given to "cuda".
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device)
        self.pool = self._new_pool()
        self.pooled = True
        """Whether eager steps take their memory from the pool."""
        self.left = 0
        """Bytes that the last eager step left there."""
        with torch.cuda.stream(self.stream):  # workspaces of the libraries last: they are not to lie in the pool
            for dtype in (torch.float32, torch.bfloat16):
                a = torch.ones(64, 64, dtype=dtype, device=self.device)
                torch.nn.functional.linear(a, a, a[0])
                a @ a

    def eager(self, step: Callable):
        """On the stream that captures, in the pool, from which the result is copied."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            ops.reserve(self.device)
            before = self._live_bytes()
            with self._memory():
                result = step()
        current.wait_stream(self.stream)
        result = copied(result)
        self.left = self._live_bytes() - before
        if self.left > 0:
            gc.collect()
            self.left = self._live_bytes() - before
        return result

    def left_behind(self) -> str | None:
        """Replays would overwrite it. It keeps the pool's memory, and graphs get another pool from now on."""
        if self.left <= 0:
            return None
        self.pool, self.pooled, left, self.left = self._new_pool(), False, self.left, 0
        return f"an eager step left {left:,} bytes in the graphs' memory; eager steps take theirs elsewhere from now on"

    def _new_pool(self):
        with torch.cuda.device(self.device):
            return torch.cuda.MemPool()

    @contextlib.contextmanager
    def _memory(self):
        if not self.pooled:
            yield
            return
        # Backward passes run in this thread, since only its allocations go to the pool.
        with (
            torch.cuda.use_mem_pool(self.pool, self.device),
            torch.autograd.set_multithreading_enabled(False),
            ops.graph_memory(),
        ):
            yield

    def _live_bytes(self) -> int:
        if not self.pooled:
            return 0
        blocks = (b for segment in self.pool.snapshot() for b in segment["blocks"])
        return sum(b["size"] for b in blocks if b["state"] == "active_allocated")

    def capture(self, step: Callable) -> tuple[Callable[[], None], object]:
        with torch.cuda.stream(self.stream):
            ops.reserve(self.device)
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may pin memory meanwhile: only what this thread does is forbidden.
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def release(self, random_state: Tensor) -> None:
        self.pool = self._new_pool()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_rng_state(random_state, self.device)


def copied(result):
    """A dataclass with its tensors copied."""
    tensors = {f.name: v for f in dataclasses.fields(result) if isinstance(v := getattr(result, f.name), Tensor)}
    return dataclasses.replace(result, **{name: value.clone() for name, value in tensors.items()})


@dataclass
class _Captured:
    """What is known of one task and bucket."""

    batches: list[Batch]
    """The static tensors, one batch a forward pass."""
    eager_steps: int = 0
    replays: int = 0
    failures: int = 0
    """Captures that failed."""
    replay: Callable[[], None] | None = None
    result: object = None
    refused: str | None = None
    """Why it stays eager."""


class StepGraphs:
    """Runs ``step(task, batches, done)``, captured where it can be.

    ``step`` is one whole update: it reads only its batches and what lives on the device, leaves no tensor behind but
    what it returns (gradients are dropped), and returns a dataclass of tensors (and of what never changes), which the
    next call may overwrite. ``done``: updates before this one, int64 on the device, counted by the steps themselves
    from the number given here. ``backend``: a ``Graphs``; ``CudaGraphs`` unless told otherwise.

    ``torch.cuda.OutOfMemoryError`` in an eager step gives back the memory of the graphs and runs the step again; when
    it happens a second time, no more graphs are made, and without graphs it is the caller's.
    """

    def __init__(
        self,
        step: Callable[[str, list[Batch], Tensor], object],
        buckets: Buckets,
        device: torch.device,
        *,
        done: int = 0,
        backend=None,
        warm_up: int = WARM_UP,
        most: int = MOST_GRAPHS,
    ):
        self.step, self.buckets, self.device = step, buckets, device
        self.backend = CudaGraphs(device) if backend is None else backend
        self.warm_up, self.most = warm_up, most
        self.arena = InputArena(buckets, device)
        self.captured: dict[tuple[str, BucketSpec, int], _Captured] = {}
        self.done = torch.full((), done, dtype=torch.int64, device=device)
        """Updates that really ran."""
        self.expected = done
        self.releases = 0
        """How often graphs were given up for their memory."""
        self.real: Counter[str] = Counter()
        self.padded: Counter[str] = Counter()

    def __call__(self, task: str, batches: Sequence[Batch]):
        """One update on ``batches`` of ``task``, wherever they lie; what ``step`` returned."""
        bucket = self.buckets.of(batches)
        key = task, bucket, len(batches)
        known = self.captured.get(key)
        if known is None:
            known = self.captured[key] = _Captured(self.arena.place(bucket, batches))
        for static, batch in zip(known.batches, batches, strict=True):
            fill(static, batch)
            if batch.sizes:
                self.real[task] += real_share(batch, bucket)
                self.padded[task] += 1
        self.expected += 1
        # An eager step after each capture that failed, and one more for whatever the first left to be made.
        if known.replay is None and known.refused is None and known.eager_steps >= self.warm_up + known.failures:
            self._capture(task, bucket, known)
        if known.replay is None:
            known.eager_steps += 1
            return self._eager(task, bucket, known)
        known.replays += 1
        known.replay()
        return known.result

    def _run(self, task: str, batches: list[Batch]):
        result = self.step(task, batches, self.done)
        self.done.add_(1)
        return result

    def _eager(self, task: str, bucket: BucketSpec, known: _Captured):
        state = self.backend.random_state()
        try:
            return self._warmed(task, known.batches)
        except torch.cuda.OutOfMemoryError as error:
            if not self._graphs():
                raise
            message = str(error).splitlines()[0]
        # Here, for the exception held the tensors of the step. It has changed nothing: what an update changes comes
        # last, and takes its memory before.
        known.refused = f"out of memory ({message})"
        self.releases += 1
        if self.releases > 1:
            self.most = 0
        _log.warning(
            "%s, %s: out of memory in an eager step: all graphs give theirs back%s; this shape stays eager (%s)",
            task, bucket, " and no more are captured" if not self.most else "", message,
        )  # fmt: skip
        self._forget_graphs()
        self.backend.release(state)
        return self._warmed(task, known.batches)

    def _warmed(self, task: str, batches: list[Batch]):
        """The result of an eager step; graphs that it made unsafe are given up."""
        result = self.backend.eager(lambda: self._run(task, batches))
        if left := self.backend.left_behind():
            _log.warning("%s", left)
            self._forget_graphs()
        return result

    def _graphs(self) -> int:
        return sum(known.replay is not None for known in self.captured.values())

    def _forget_graphs(self) -> None:
        for known in self.captured.values():
            known.replay = known.result = None

    def _capture(self, task: str, bucket: BucketSpec, known: _Captured) -> None:
        count = self._graphs()
        if count >= self.most:
            known.refused = f"{count} graphs exist already" if self.most else "graphs were given up: out of memory"
        else:
            try:
                known.replay, known.result = self.backend.capture(lambda: self._run(task, known.batches))
            except torch.cuda.OutOfMemoryError as error:
                known.refused = f"out of memory ({str(error).splitlines()[0]})"
            except RuntimeError as error:  # what CUDA and torch raise when something cannot be captured
                known.failures += 1
                message = str(error).splitlines()[0]
                if known.failures >= TRIES:
                    known.refused = f"capture failed {TRIES} times ({message})"
                else:
                    _log.info("%s, %s: capture failed (%s); tried again after another step", task, bucket, message)
        if known.refused:
            _log.warning("%s, %s: stays eager: %s", task, bucket, known.refused)
        elif known.replay:
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
