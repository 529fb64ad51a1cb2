"""What a step does to the host, counted on fake tensors; and what the source of device code must not contain.

``counting`` is a dispatch mode under a fake mode without a ``ShapeEnv``: what needs a value raises there
(``.item()``, ``if tensor:``, ``nonzero``), and what merely copies to the host, or may, is counted.
"""

import ast
import contextlib
import inspect
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READ = (DataDependentOutputException, DynamicOutputShapeException)
"""What a fake tensor raises when its value is asked for."""

_aten = torch.ops.aten
_ALWAYS = (_aten._local_scalar_dense, _aten.randperm, _aten.multinomial, _aten._linalg_check_errors, _aten.nonzero)
_VIEWS = ("view", "reshape", "expand", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "detach",
          "alias", "t", "split", "unbind", "chunk", "as_strided", "unfold", "movedim", "_unsafe_view", "lift_fresh",
          "split_with_sizes", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "result_type",
          "_reshape_alias", "narrow", "diagonal", "is_same_size", "sym_size", "stride", "resize_")  # fmt: skip


@dataclass
class Counts:
    """Operators of a step."""

    reads: Counter = field(default_factory=Counter)
    """What reads the host, or may: operator and why -> how often."""
    ops: Counter = field(default_factory=Counter)
    """Operators that launch work -> how often; views and allocations are left out."""
    to_device: int = 0
    """Copies from the host."""

    @property
    def launches(self) -> int:
        """Kernels a step launches, about: one an operator, and what an operator of ours or a multi-tensor one adds is
        not seen."""
        return self.ops.total()


class CountingMode(TorchDispatchMode):
    """Counts every operator into ``counts``. Enter it inside the fake mode."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        after = {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        if packet in (_aten._to_copy, _aten.copy_):
            source = args[1] if packet is _aten.copy_ else args[0]
            target = args[0] if packet is _aten.copy_ else result
            if source.device.type != "cpu" and target.device.type == "cpu":
                self.counts.reads[f"{name}: a copy to the host"] += 1
            elif source.device.type == "cpu" and target.device.type != "cpu":
                self.counts.to_device += 1
        elif packet in _ALWAYS:
            self.counts.reads[f"{name}: reads the host or may"] += 1
        elif packet in (_aten.index, _aten.index_put, _aten.index_put_) and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.counts.reads[f"{name}: a boolean index"] += 1
        elif before - {"cpu"} and after == {"cpu"}:
            self.counts.reads[f"{name}: a result on the host"] += 1
        if name not in _VIEWS:
            self.counts.ops[name] += 1
        return result


@contextlib.contextmanager
def counting():
    """Fake tensors and the counts of what is done to them; nothing but fake tensors may take part."""
    counts = Counts()
    with FakeTensorMode(allow_non_fake_inputs=False), CountingMode(counts):
        yield counts


# ---------------------------------------------------------------------------------------------------- the source

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "data_ptr", "synchronize")
"""Methods that read the host, or an address that a captured step must not depend on."""
FUNCTIONS = ("nonzero", "unique", "masked_select", "randperm", "multinomial", "bincount", "allclose", "equal")
"""Functions of torch that do."""
CONVERSIONS = ("int", "float", "bool")
"""Builtins that read a tensor; allowed on what is plainly no tensor (a literal, ``len``, ``round``, a shape)."""


def host_reads(function) -> list[str]:
    """The lines of a Python function (or of a class, or a file's path) that read the host, or may."""
    if isinstance(function, Path):
        name, text, first = function.name, function.read_text(encoding="utf-8"), 1
    else:
        lines, first = inspect.getsourcelines(function)
        indent = len(lines[0]) - len(lines[0].lstrip())
        name, text = function.__qualname__, "".join(line[indent:] if line.strip() else line for line in lines)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (what := _reads(node)):
            found.append(f"{name}:{first + node.lineno - 1}: {what}")
    return found


def _reads(call: ast.Call) -> str | None:
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = ast.unparse(function.value)
        if owner.startswith("torch.cuda") or owner == "torch" and function.attr in FUNCTIONS:
            return f"{owner}.{function.attr}()"
        if function.attr in METHODS and owner not in ("np", "numpy", "math"):
            return f"{owner}.{function.attr}()"
        host = [a for a in call.args if isinstance(a, ast.Constant) and a.value == "cpu"]
        if function.attr == "to" and host:
            return f'{owner}.to("cpu")'
    if isinstance(function, ast.Name) and function.id in CONVERSIONS and len(call.args) == 1:
        argument = call.args[0]
        plain = isinstance(argument, ast.Constant | ast.Compare | ast.BoolOp) or (
            isinstance(argument, ast.Call) and isinstance(argument.func, ast.Name)
        )
        if not plain:
            return f"{function.id}({ast.unparse(argument)})"
    return None
