"""What a step does to the host, counted on fake tensors; and what the source of device code must not contain.

``counting`` is a dispatch mode under a fake mode without a ``ShapeEnv``: what needs a value raises there
(``.item()``, ``if tensor:``, ``nonzero``), and what merely copies to the host, or may, is counted.
"""

import ast
import contextlib
from collections import Counter
from dataclasses import dataclass, field

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
        """Operators that launch work; most are one kernel."""
        return self.ops.total()

    def clear(self) -> None:
        """Begin again."""
        self.reads, self.ops, self.to_device = Counter(), Counter(), 0

    def taken(self) -> "Counts":
        """What was counted so far; counting begins again."""
        found = Counts(self.reads, self.ops, self.to_device)
        self.clear()
        return found


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
        if packet._qualified_op_name.partition("::")[0] != "prim" and name not in _VIEWS:
            self.counts.ops[packet._qualified_op_name] += 1
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


@dataclass(frozen=True)
class Found:
    """A call in the source that reads the host, or may."""

    file: str
    function: str
    """``Class.method`` or ``function``; empty at module level."""
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function or 'the module'}: {self.what}"


def host_reads(text: str, file: str = "") -> list[Found]:
    """The calls in Python source that read the host, or may."""
    found = []

    def walk(node, names):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (*names, node.name)
        if isinstance(node, ast.Call) and (what := _reads(node)):
            found.append(Found(file, ".".join(names), node.lineno, what))
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    walk(ast.parse(text), ())
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
