"""One way to register an operator: ``torch.ops.unit_fast.<name>`` with a CPU reference, a CUDA launcher and a fake.

Autograd stays outside, in a plain ``torch.autograd.Function`` that calls the registered forward and backward: 18 us a
call on a CPU against 47 with a custom_op and its own autograd formula. Every backward is a registered operator too, so
that fake tensors and ``torch.compile`` can trace the whole step without a launch.
"""

import functools
from collections.abc import Callable

import torch
from unit_fast_kernels.shared.triton import INTERPRETING

_LIBRARY = torch.library.Library("unit_fast", "FRAGMENT")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""
REGISTERED: dict[str, "Registered"] = {}
"""Name -> what ``register`` was given, for the tests and for the assembly table."""


class Registered:
    """One operator: ``reference``, ``launch`` and ``fake`` as given, ``op`` the callable overload."""

    def __init__(self, name: str, reference: Callable, launch: Callable, fake: Callable, op: Callable):
        self.name, self.reference, self.launch, self.fake, self.op = name, reference, launch, fake, op


def _without_grad(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args, **keywords):
        with torch.no_grad():
            return function(*args, **keywords)

    return wrapped


def register(name: str, schema: str, *, reference: Callable, launch: Callable, fake: Callable) -> Callable:
    """Define ``unit_fast::<name><schema>`` and return its overload.

    ``reference`` (plain PyTorch) serves CPU tensors, or ``launch`` under Triton's interpreter; ``launch`` serves CUDA
    tensors; ``fake`` allocates outputs of the shapes, dtypes and strides that both return, without reading data. None
    of the three may return an input, read the device from the host, or write to an input that the schema does not
    mark (``Tensor(a!)``).
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, launch if INTERPRETING else _without_grad(reference), "CPU")
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"unit_fast::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.unit_fast, name).default
    REGISTERED[name] = Registered(name, reference, launch, fake, op)
    return op
