"""The public operators: validate, choose an implementation, call. The only door to the kernels.

An operator has a ``reference`` (its specification, plain PyTorch) and may have ``cpu`` (same result, fast on a CPU) and
``fused`` (Triton). ``UNIT_FAST_KERNELS=auto|fused|reference``, or ``with kernels("fused"):``, chooses:

- ``auto``: fused on CUDA where it supports the arguments, cpu on a CPU, else the reference;
- ``fused``: fused on CUDA, under Triton's interpreter (``TRITON_INTERPRET=1``) and on fake tensors; else it raises;
- ``reference``: the reference everywhere.

What was taken, and why, is logged once. Arguments that do not fit raise ``ValueError`` with the operator's and the
argument's name and the remedy.
"""

import contextlib
import contextvars
import functools
import inspect
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from unit_fast_kernels.adamw import ADAMW, Tables, prepare
from unit_fast_kernels.adamw import step as adamw_step
from unit_fast_kernels.assignment import ASSIGNMENT
from unit_fast_kernels.attention import ATTENTION, CROSS_ATTENTION
from unit_fast_kernels.attribute_loss import ATTRIBUTE_LOSS
from unit_fast_kernels.bias_act_dropout import BIAS_ACT_DROPOUT
from unit_fast_kernels.dropout import DROPOUT
from unit_fast_kernels.frozen_bn_act import FROZEN_BN_ACT
from unit_fast_kernels.match_cost import MATCH_COST
from unit_fast_kernels.residual_norm import RESIDUAL_NORM
from unit_fast_kernels.set_loss import SET_LOSS
from unit_fast_kernels.shared import ticket
from unit_fast_kernels.shared.capture import graph_memory as graph_memory
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.triton import INTERPRETING

from unit_fast.errors import UserError, nearest

MODES = ("auto", "fused", "reference")
OPERATORS: dict[str, Operator] = {}
"""By name, in the order below."""
_log = logging.getLogger("unit_fast.ops")
_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("unit_fast_kernels", default=None)
_logged: set[tuple[str, str, str]] = set()


def mode() -> str:
    """The mode in force: the innermost ``kernels(...)`` block, else ``UNIT_FAST_KERNELS``, else ``auto``."""
    return _mode.get() or _checked(os.environ.get("UNIT_FAST_KERNELS", "auto"))


# What ``torch.compiler.assume_constant_result`` sets, without importing the compiler (1.4 s): a compiled function keeps
# the mode that it was compiled in.
mode._dynamo_marked_constant = True


def _checked(name: str) -> str:
    if name not in MODES:
        raise UserError(f"UNIT_FAST_KERNELS: {name!r} is not a mode; {nearest(name, MODES)}")
    return name


@contextlib.contextmanager
def kernels(name: str):
    """Within the block operators run as ``name`` says: ``auto``, ``fused`` or ``reference``."""
    token = _mode.set(_checked(name))
    try:
        yield
    finally:
        _mode.reset(token)


class Implementation(NamedTuple):
    """A row of ``implementations()``."""

    op: str
    implementations: tuple[str, ...]
    """What exists."""
    taken: str
    """What a call would take now."""
    why: str


def _choose(operator: Operator, device_type: str, arguments: tuple | None = None) -> tuple[str, str]:
    """(implementation, reason); without the implementations' ``arguments``, for such as fit."""
    known, now = operator.implementations, mode()
    if now == "reference":
        return "reference", "the mode is reference"
    if "fused" in known and (now == "fused" or device_type == "cuda"):
        why_not = None if arguments is None else operator.why_not(*arguments)
        if why_not is None and device_type != "cuda" and not (INTERPRETING or _fake(operator, arguments)):
            why_not = f"tensors are on {device_type}: move them to CUDA, or start Python with TRITON_INTERPRET=1"
        if why_not is None:
            return "fused", f"tensors on {device_type}"
        if now == "fused":
            raise ValueError(f"{operator.name}: the mode is fused, but {why_not}")
        return "reference", why_not
    if device_type in known:
        if torch.compiler.is_compiling():
            return "reference", f"torch.compile cannot look into the one for {device_type}"
        why_not = None if arguments is None else operator.why_not_cpu(*arguments)
        return (device_type, f"tensors on {device_type}") if why_not is None else ("reference", why_not)
    return "reference", f"no other for {device_type}"


def _say_once(op: str, name: str, why: str) -> None:
    if (op, name, why) not in _logged:
        _logged.add((op, name, why))
        _log.info("%s: %s (%s)", op, name, why)


_say_once._dynamo_marked_constant = True


def _fake(operator: Operator, arguments: tuple | None) -> bool:
    return arguments is not None and isinstance(operator.tensor(*arguments), FakeTensor)


def implementations(device_type: str = "cpu") -> list[Implementation]:
    """Every operator: what exists, what a call with tensors on ``device_type`` that fit takes now, and why."""
    return [
        Implementation(name, tuple(operator.implementations), *_choose(operator, device_type))
        for name, operator in OPERATORS.items()
    ]


def fuses(op: str, *arguments) -> bool:
    """Whether ``op`` would run its kernels on arguments like these; of a pointwise operator the first will do.

    A product or convolution before "bias_act_dropout" or "frozen_bn_act" then leaves its bias to the kernel, which adds
    it in passing and sums its gradient likewise; elsewhere the product adds it for nothing. ``ValueError`` as the
    operator.
    """
    operator = OPERATORS[op]
    return _choose(operator, operator.tensor(*arguments).device.type, arguments)[0] == "fused"


def _tensor_parameters(operator: Operator) -> dict[str, bool]:
    """Parameter that takes a tensor -> whether it may be None."""
    parameters = inspect.signature(operator.validate).parameters.values()
    return {p.name: p.annotation != Tensor for p in parameters if p.annotation in (Tensor, Tensor | None)}


def _check_tensor(op: str, argument: str, value, tensors: dict[str, bool]) -> None:
    """``ValueError`` on a ``value`` that is no tensor; None is left to parameters that take it."""
    if value is None and tensors[argument]:
        return
    found = "None" if value is None else f"of type {type(value).__module__}.{type(value).__name__}"
    raise ValueError(f"{op}: {argument} is {found.replace('builtins.', '')}; give a torch.Tensor, see torch.as_tensor")


def _door(operator: Operator) -> Callable:
    """The public function of an operator, which is one of OPERATORS then."""
    OPERATORS[operator.name] = operator

    tensors = _tensor_parameters(operator)
    positions = dict(enumerate(inspect.signature(operator.validate).parameters))

    @functools.wraps(operator.validate)
    def run(*arguments, **keywords):
        for place, value in enumerate(arguments):
            if not isinstance(value, Tensor) and positions.get(place) in tensors:
                _check_tensor(operator.name, positions[place], value, tensors)
        for argument, value in keywords.items():
            if not isinstance(value, Tensor) and argument in tensors:
                _check_tensor(operator.name, argument, value, tensors)
        arguments = operator.validate(*arguments, **keywords)
        name, why = _choose(operator, operator.tensor(*arguments).device.type, arguments)
        _say_once(operator.name, name, why)
        return operator.implementations[name](*arguments)

    run.__name__ = run.__qualname__ = operator.name
    run.__module__ = __name__
    results = inspect.signature(operator.reference).return_annotation
    run.__signature__ = inspect.signature(operator.validate).replace(return_annotation=results)
    return run


attention = _door(ATTENTION)
cross_attention = _door(CROSS_ATTENTION)
dropout = _door(DROPOUT)
residual_norm = _door(RESIDUAL_NORM)
bias_act_dropout = _door(BIAS_ACT_DROPOUT)
frozen_bn_act = _door(FROZEN_BN_ACT)
match_cost = _door(MATCH_COST)
assignment = _door(ASSIGNMENT)
set_loss = _door(SET_LOSS)
attribute_loss = _door(ATTRIBUTE_LOSS)
adamw = _door(ADAMW)


def prepare_adamw(step: adamw_step.Step, tables: Callable[[], Tables]) -> bool:
    """Make what ``adamw`` keeps between calls, where its kernels would take ``step``; whether they would."""
    if fused := fuses("adamw", step, tables):
        prepare(step, tables())
    return fused


def reserve(device: torch.device) -> None:
    """Make what kernels keep between launches on the current stream of ``device``, before steps are captured there or
    run in a graph's memory pool, from which nothing that lasts may be taken."""
    ticket.reserve(device)
