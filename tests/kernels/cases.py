"""What an operator's test file gives the suite of all operators (``test_operators``): its sizes, settings and refusals.

A problem is made in float64 of values that bfloat16 and float16 hold exactly, so that every precision starts alike.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from unit_fast_kernels.shared import tuned
from unit_fast_kernels.shared.operator import Operator

from tests.kernels.common import assert_as_good_as_eager
from unit_fast import ops

LOW = (torch.float32, torch.float16, torch.bfloat16)
CASES: dict[str, "Cases"] = {}


def exact(*shape: int, rng: torch.Generator) -> Tensor:
    """Normal numbers, float64, that bfloat16 and float16 hold."""
    return torch.randn(shape, generator=rng, dtype=torch.float64).bfloat16().half().double()


@dataclass(frozen=True)
class Problem:
    """The arguments of one call by name."""

    inputs: dict[str, Tensor]
    """float64; calls convert them to their dtype."""
    others: dict[str, Any] = field(default_factory=dict)
    """As they are, but floating tensors are float32 in every precision below float64."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """Inputs whose dtype is this in every precision below float64."""

    def to(self, device: str) -> "Problem":
        def moved(arguments):
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}

        return Problem(moved(self.inputs), moved(self.others), self.dtypes)


def patched(module, **values) -> Callable:
    """A way: the module's names have these values."""

    @contextlib.contextmanager
    def way(size):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setattr(module, name, value)
            yield

    return way


def launched(**parameters: int) -> Callable:
    """A way: launches take these parameters, as far as they have them."""

    def try_(op, bucket, default):
        return default | {k: v for k, v in parameters.items() if k in default}

    return lambda size: tuned.trying(try_)


def as_it_is(size):
    """The way that users have."""
    return contextlib.nullcontext()


def both(*ways: Callable) -> Callable:
    """A way: all of these."""

    @contextlib.contextmanager
    def way(size):
        with contextlib.ExitStack() as stack:
            for one in ways:
                stack.enter_context(one(size))
            yield

    return way


@dataclass(frozen=True, kw_only=True)
class Cases:
    """What ``test_operators`` must know of an operator."""

    op: str
    sizes: dict[str, Any]
    """By why they are there: row, odd, tail, many, empty, no_targets, all_padded, crowd ..."""
    make: Callable[..., Problem]
    """(size, **setting) -> problem"""
    settings: dict[str, dict] = field(default_factory=lambda: {"default": {}})
    main: tuple[str, ...] = ()
    """The settings that memory, strides, registration and compilation are checked with; all if none is named."""
    takes: tuple[torch.dtype, ...] = LOW
    gives: torch.dtype | None = None
    """The dtype of results, if not that of the inputs."""
    leaves: tuple[str, ...] | None = None
    """The inputs that get a gradient; None: all that there are."""
    out: Callable[[Any], Tensor] = lambda result: result
    """One tensor of what the operator returns, so that all results and their gradients count."""
    keep: Callable[..., Tensor | None] | None = None
    """(**arguments) -> the mask that the reference takes for ``keep`` where the kernels' decisions are not its own."""
    dropped: Callable[[Callable, Tensor], Tensor] | None = None
    """(implementation, seed) -> bool: what is dropped of a million elements, with probability 0.1."""
    ways: dict[str, dict[str, Callable]] = field(default_factory=dict)
    """Implementation -> name -> how to make it take each of its paths on small inputs; by default as it is."""
    close: dict[str, float] = field(default_factory=dict)
    """rtol and atol of the CPU's implementation against the reference in float64."""
    cpu_low: tuple[str, ...] | None = None
    """The sizes for the CPU's implementation in low precision; None: all."""
    skip: Callable[[str, str, str, torch.dtype], bool] = lambda way, size, setting, dtype: False
    """Which of all combinations of way, size, setting and dtype are too many."""
    also: Callable[[dict, list[Tensor]], None] = lambda arguments, found: None
    """(arguments, results and gradients): what else must hold of the kernels' results."""
    memory: tuple[str, ...] = ("odd", "tail", "empty")
    """Sizes whose memory is watched."""
    dynamic: tuple[str, str] = ("odd", "tail")
    """Two sizes for one compiled function."""
    card: dict[str, Any] = field(default_factory=dict)
    """Sizes of models, for the run on a card."""
    valid: Callable[[], dict]
    """Arguments that fit; the refusals change them."""
    refusals: list[tuple[dict, str]]
    """(changed arguments, what the message says after the operator's name)"""
    unfit: list[tuple[dict, str]]
    """The same where only the kernels cannot take them."""

    def __post_init__(self):
        CASES[self.op] = self

    @property
    def operator(self) -> Operator:
        return ops.OPERATORS[self.op]

    def ways_of(self, implementation: str) -> dict[str, Callable]:
        return self.ways.get(implementation, {"as_it_is": as_it_is})

    def mains(self) -> tuple[str, ...]:
        return self.main or tuple(self.settings)

    def coarse(self, size: str) -> bool:
        """Whether the CPU's implementation takes low precision at this size."""
        return self.cpu_low is None or size in self.cpu_low

    def problem(self, size: str, setting: str) -> Problem:
        return self.make(self.sizes[size], **self.settings[setting])


class Call:
    """The arguments of a problem: floating inputs in ``dtype``, tensors through ``wrap``, leaves with a gradient."""

    def __init__(self, cases: Cases, problem: Problem, dtype: torch.dtype, wrap: Callable = lambda x: x):
        self.cases, self.wrap, self.arguments, self.upstream = cases, wrap, {}, None
        self.leaves = [name for name in problem.inputs if cases.leaves is None or name in cases.leaves]
        for name, value in (problem.inputs | problem.others).items():
            if isinstance(value, Tensor):
                if name in problem.inputs:
                    value = value.to(dtype if dtype == torch.float64 else problem.dtypes.get(name, dtype))
                elif value.is_floating_point() and dtype != torch.float64:
                    value = value.float()
                value = wrap(value).detach().requires_grad_(name in self.leaves)
            self.arguments[name] = value

    def __call__(self, implementation: Callable, **keywords) -> list[Tensor]:
        """What ``cases.out`` makes of the results, and the gradient of every leaf."""
        out = self.cases.out(implementation(*self.cases.operator.validate(**self.arguments), **keywords))
        if not self.leaves:
            return [out]
        upstream = torch.empty_like(out.detach()).copy_(exact(*out.shape, rng=torch.Generator().manual_seed(1)))
        self.upstream = self.wrap(upstream)
        return [out.detach(), *torch.autograd.grad(out, [self.arguments[name] for name in self.leaves], self.upstream)]

    def dtypes(self) -> list[torch.dtype]:
        """What results and gradients must have: the widest of the leaves' and each leaf's, if nothing else is said."""
        of_leaves = [self.arguments[name].dtype for name in self.leaves]
        return [self.cases.gives or functools.reduce(torch.promote_types, of_leaves), *of_leaves]


def check(cases: Cases, problem: Problem, implementation: str, dtype: torch.dtype) -> list[Tensor]:
    """Assert the bound of ``assert_as_good_as_eager``, all with the same decisions of dropout; our results."""
    ours, keep = Call(cases, problem, dtype), {}
    if implementation == "fused" and cases.keep:
        keep["keep"] = cases.keep(**ours.arguments)
    eager, wide = (Call(cases, problem, d)(cases.operator.reference, **keep) for d in (dtype, torch.float64))
    found = ours(cases.operator.implementations[implementation])
    assert_as_good_as_eager(found, eager, wide, *ours.dtypes())
    if implementation == "fused":
        cases.also(ours.arguments, found)
    return found
