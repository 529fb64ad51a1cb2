"""What an operator's test file gives the suite of all operators (``test_operators``): its sizes, settings and refusals.

A problem is made in float64 of values that bfloat16 and float16 hold exactly, so that every precision starts alike.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from unit_fast_kernels.shared import tuned
from unit_fast_kernels.shared.operator import OPERATORS, Operator

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

    def to(self, device: str) -> "Problem":
        moved = ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in d.items()} for d in vars(self).values())
        return Problem(*moved)


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
    """The settings that memory, registration and compilation are checked with; all if none is named."""
    takes: tuple[torch.dtype, ...] = LOW
    gives: torch.dtype | None = None
    """The dtype of results, if not that of the inputs."""
    leaves: tuple[str, ...] | None = None
    """The inputs that get a gradient; None: all."""
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
        return OPERATORS[self.op]

    def ways_of(self, implementation: str) -> dict[str, Callable]:
        return self.ways.get(implementation, {"as_it_is": as_it_is})

    def mains(self) -> tuple[str, ...]:
        return self.main or tuple(self.settings)

    def problem(self, size: str, setting: str) -> Problem:
        return self.make(self.sizes[size], **self.settings[setting])


class Call:
    """The arguments of a problem, floating inputs in ``dtype``, tensors through ``wrap``, leaves with a gradient."""

    def __init__(self, cases: Cases, problem: Problem, dtype: torch.dtype, wrap: Callable[[Tensor], Tensor] = lambda x: x):
        self.cases, self.wrap, self.arguments = cases, wrap, {}
        leaves = cases.leaves if cases.leaves is not None else tuple(problem.inputs)
        self.leaves = [name for name in leaves if name in problem.inputs and cases.operator.grad]
        for name, value in (problem.inputs | problem.others).items():
            if isinstance(value, Tensor):
                if name in problem.inputs:
                    value = value.to(dtype)
                elif value.is_floating_point() and dtype != torch.float64:
                    value = value.float()
                value = wrap(value).detach().requires_grad_(name in self.leaves)
            self.arguments[name] = value

    def __call__(self, implementation: Callable, **keywords) -> list[Tensor]:
        """What ``cases.out`` makes of the results, and the gradient of every leaf."""
        out = self.cases.out(implementation(*self.cases.operator.validate(**self.arguments), **keywords))
        if not self.leaves:
            return [out]
        rng = torch.Generator().manual_seed(1)
        upstream = torch.empty_like(out.detach()).copy_(exact(*out.shape, rng=rng))
        leaves = [self.arguments[name] for name in self.leaves]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.wrap(upstream))]


def bound(cases: Cases, problem: Problem, implementation: str, dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """(ours, eager, exact) for ``assert_as_good_as_eager``, all with the same decisions of dropout."""
    ours = Call(cases, problem, dtype)
    keep = {}
    if implementation == "fused" and cases.keep:
        keep["keep"] = cases.keep(**ours.arguments)
    reference = cases.operator.reference
    eager, wide = (Call(cases, problem, d)(reference, **keep) for d in (dtype, torch.float64))
    return ours(cases.operator.implementations[implementation]), eager, wide
