"""A stand-in for CUDA's graphs that captures operators, on any machine, and finds what a card would only corrupt.

``Recorded`` is what ``StepGraphs`` takes for ``CudaGraphs``: while a step is captured it notes every operator with its
tensors, and a replay runs those operators again on the same tensors, without the Python between them. As on a card,

* what a capture allocates belongs to the graph: before each replay it is filled with garbage, for the replays of all
  graphs and the eager steps between them share this memory;
* so nobody else may write to it (a table that the host fills after the capture), no replayed operator may read of it
  what the replay has not written, and nothing of it may outlive the step but its result (moments made inside);
* no operator may read a tensor that came from the host within the capture (a constant uploaded inside), nor give the
  host a value;
* an eager step takes its memory from there too, and may leave nothing in it.

Each of these is a ``Violation`` where it happens. ``watching`` must be around all of it, the making of the model too.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from unit_fast_kernels.shared import capture as _capture

from tests.models import small_config
from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.buckets import Buckets, fill
from unit_fast.model.unit import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.setup import used_masks
from unit_fast.run.step import train_step
from unit_fast.run.step_graph import Graphs, StepGraphs, copied
from unit_fast.schedule import lr_multiplier_tensor
from unit_fast.tasks import TASKS

CPU = torch.device("cpu")
_aten = torch.ops.aten
_FILLS = {"fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
"""Operators that write without reading what was there."""
_FROM_HOST = {_aten.lift_fresh, _aten.lift_fresh_copy, _aten.lift}
"""What ``torch.tensor`` and its like call on a tensor made of the host's numbers."""
_TO_HOST = {_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.nonzero}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}


class Violation(AssertionError):
    """What would be wrong numbers, or a crash, on a card."""


def _tensors(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """All the memory that a tensor lies in, uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor object on the same memory: what a recording may hold without keeping the step's own alive."""
    return tensor.detach()


def _written(func, args, kwargs) -> list[Tensor]:
    """The arguments that an operator writes, by its schema."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else args[i] if i < len(args) else None
            found += _tensors(value)
    return found


class _Operator:
    """One recorded call."""

    def __init__(self, func, args, kwargs, outputs):
        self.func = func
        self.args, self.kwargs = tree_map_only(Tensor, _alias, (args, kwargs))
        given = {_key(t) for t in _tensors((args, kwargs))}
        self.outputs = [_alias(t) for t in _tensors(outputs)]
        self.fresh = [_key(t) not in given for t in self.outputs]
        self.writes = _written(func, self.args, self.kwargs)
        name = func.overloadpacket.__name__
        self.allocates = name in _ALLOCATES
        kept = {id(t) for t in self.writes} if name in _FILLS or "out" in func._overloadname.split("_") else set()
        views = any(not fresh for fresh in self.fresh) and not self.writes
        self.reads = [] if views else [t for t in _tensors((self.args, self.kwargs)) if id(t) not in kept]

    def __str__(self) -> str:
        return f"{self.func} {[list(t.shape) for t in _tensors((self.args, self.kwargs))]}"

    def run(self) -> None:
        """Again, on the same tensors."""
        results = _tensors(self.func(*self.args, **self.kwargs))
        if self.allocates:
            return
        for output, fresh, result in zip(self.outputs, self.fresh, results, strict=True):
            if fresh and output.numel():
                output.copy_(result)


class _Recording:
    """The operators of one capture, and whose memory they use."""

    def __init__(self):
        self.operators: list[_Operator] = []
        self.own: dict[int, Tensor] = {}
        """Storage -> a tensor on it, of all that the capture allocated."""
        self.made_by: dict[int, str] = {}
        """Storage -> the operator that allocated it."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Storage -> its bytes and a copy from before the capture, of what the step changes beyond its own memory."""

    def keep(self, tensor: Tensor) -> None:
        """Remember what is about to be written to."""
        if _key(tensor) not in self.own and _key(tensor) not in self.before:
            content = _bytes(tensor)
            self.before[_key(tensor)] = content, content.clone()

    def undo(self) -> None:
        """Put back what the capture has changed: on a card nothing runs while a step is captured."""
        for content, copy in self.before.values():
            content.copy_(copy)
        self.before.clear()

    def add(self, func, args, kwargs, outputs) -> None:
        operator = _Operator(func, args, kwargs, outputs)
        self.operators.append(operator)
        for output, fresh in zip(operator.outputs, operator.fresh, strict=True):
            if fresh:
                self.own[_key(output)] = output
                self.made_by[_key(output)] = f"{func} {list(output.shape)}"

    def left(self) -> dict[int, str]:
        """What of its own memory others than the recording hold: storage -> what made it."""
        held = Counter(_key(t) for o in self.operators for t in _tensors((o.args, o.kwargs, o.outputs)))
        # One reference a tensor, and one of the object that ``untyped_storage`` has made.
        return {k: what for k, what in self.made_by.items() if torch._C._storage_Use_Count(k) > held[k] + 1}

    def replay(self) -> None:
        for tensor in self.own.values():
            _bytes(tensor).fill_(0xFF)
        written = set()
        for operator in self.operators:
            for tensor in operator.reads:
                if tensor.numel() and _key(tensor) in self.own and _key(tensor) not in written:
                    raise Violation(f"{operator} reads memory of the graph that this replay has not written")
            operator.run()
            written |= {_key(t) for t in operator.writes}
            if not operator.allocates:
                written |= {_key(t) for t, fresh in zip(operator.outputs, operator.fresh, strict=True) if fresh}


class Watch(TorchDispatchMode):
    """Sees every operator of a test."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()
        """Storages met outside captures."""
        self.recordings: list[_Recording] = []
        self.recording: _Recording | None = None
        """The one under way."""
        self.made: list[tuple[StorageWeakRef, str]] | None = None
        """What the eager step under way has made, in graphs' memory."""
        self.replaying = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.replaying:
            return func(*args, **kwargs)
        if self.recording is not None:
            self._check_captured(func, args, kwargs)
        else:
            for tensor in _written(func, args, kwargs):
                if any(_key(tensor) in r.own for r in self.recordings) and tensor.numel():
                    raise Violation(f"{func} writes to memory {list(tensor.shape)} of a captured graph from outside")
        outputs = func(*args, **kwargs)
        if self.recording is not None:
            self.recording.add(func, args, kwargs, outputs)
        else:
            self.seen |= {_key(t) for t in _tensors((args, kwargs, outputs))}
            if self.made is not None:
                given = {_key(t) for t in _tensors((args, kwargs))}
                self.made += [
                    (StorageWeakRef(t.untyped_storage()), f"{func} {list(t.shape)}")
                    for t in _tensors(outputs)
                    if _key(t) not in given and t.numel()
                ]
        return outputs

    def _check_captured(self, func, args, kwargs) -> None:
        packet = func.overloadpacket
        if packet in _FROM_HOST:
            raise Violation(f"numbers of the host become a tensor {list(args[0].shape)} within a capture")
        if packet in _TO_HOST:
            raise Violation(f"{func} gives the host a value within a capture")
        for tensor in _tensors((args, kwargs)):
            if tensor.numel() and _key(tensor) not in self.recording.own and _key(tensor) not in self.seen:
                raise Violation(f"{func} reads a tensor {list(tensor.shape)} made of the host's numbers in a capture")
        for tensor in _written(func, args, kwargs):
            self.recording.keep(tensor)

    @contextlib.contextmanager
    def step(self) -> Iterator[list]:
        """A step in graphs' memory; its result is appended to the list. Nothing else of it may be alive afterwards."""
        self.made, result = [], []
        try:
            yield result
            gc.collect()
            if self.recording is not None:
                alive = self.recording.left()
            else:
                alive = {ref.cdata: what for ref, what in self.made if not ref.expired()}
            kept = {_key(t) for t in _tensors([vars(r) for r in result])}
            left = [what for key, what in alive.items() if key not in kept]
            if left:
                raise Violation(f"left in memory of graphs after a step: {', '.join(left[:5])} ({len(left)} in all)")
        finally:
            self.made = None


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch everything within the block."""
    with Watch() as watch:
        yield watch


class Recorded(Graphs):
    """Captures and replays operators."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.eager_steps = self.replays = 0

    def eager(self, step):
        self.eager_steps += 1
        ops.reserve(torch.device("cpu"))
        with self.watch.step() as result, ops.graph_memory():
            result.append(step())
        return copied(result.pop())

    def capture(self, step):
        ops.reserve(torch.device("cpu"))
        recording = self.watch.recording = _Recording()
        before, state = _capture.capturing, torch.get_rng_state()
        _capture.capturing = lambda device: True
        try:
            with self.watch.step() as result:
                result.append(step())
        finally:
            self.watch.recording, _capture.capturing = None, before
        recording.undo()
        torch.set_rng_state(state)
        self.watch.recordings.append(recording)

        def replay():
            self.replays += 1
            self.watch.replaying = True
            try:
                with torch.no_grad():
                    recording.replay()
            finally:
                self.watch.replaying = False

        return replay, result.pop()


# ------------------------------------------------------------------------------------------ what is captured


def small_step(backend: Graphs, change=lambda model, optimizer: None, device=CPU, **options):
    """Model, optimiser, the step that a run captures, and ``StepGraphs`` around it; ``change`` may plant something."""
    torch.manual_seed(0)
    model = UniT(small_config()).train().to(device)
    optimizer = MaskedAdamW(model.parameter_groups(1e-3, 1e-3), unused="skip", max_norm=0.5)
    masks = used_masks(model, optimizer, TASKS)
    optimizer.prepare()
    change(model, optimizer)

    def step(task, batches, done):
        optimizer.scale_lr(lr_multiplier_tensor(done, 2, 100))
        update = train_step(model, optimizer, task, batches, used=masks[task])
        optimizer.zero_grad(set_to_none=True)
        return update

    buckets = Buckets(short_side=64, max_side=96, heights=1, widths=2)
    return model, optimizer, step, StepGraphs(step, buckets, device, backend=backend, **options)


def assert_as_eager(captured, eager, work: list[tuple[str, list[Batch]]], device=CPU, within=contextlib.nullcontext):
    """Captured updates are eager ones on padded batches, bit for bit, dropout and schedule included.

    captured, eager: two of ``small_step``. within: a context around each eager step, by its number.
    """
    (model, optimizer, _, graphs), (other, second, step, _) = captured, eager
    torch.manual_seed(7)
    updates = [copied(graphs(task, batches)) for task, batches in work]
    graphs.check()
    torch.manual_seed(7)
    done = torch.zeros((), dtype=torch.int64, device=device)
    for i, ((task, batches), update) in enumerate(zip(work, updates, strict=True)):
        static = [graphs.buckets.of(batches).empty(batch, device) for batch in batches]
        for empty, batch in zip(static, batches, strict=True):
            fill(empty, batch)
        with within(i):
            expected = step(task, static, done)
        done += 1
        assert expected.names == update.names
        assert torch.equal(expected.terms, update.terms), i
        assert torch.equal(expected.grad_norm, update.grad_norm)
        assert not update.nonfinite
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(optimizer.step_counts(), second.step_counts())
