"""What an operator is: one declaration, beside its formula. ``unit_fast.ops`` is the door to those declared."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator; its implementations take the same arguments and give the same results.

    ``validate`` has the signature and the docstring that users see. It raises ``ValueError`` where arguments do not
    fit, and returns the arguments for the implementations, as a tuple.
    """

    name: str
    validate: Callable[..., tuple]
    reference: Callable
    """The specification, plain PyTorch."""
    cpu: Callable | None = None
    """The same result, fast on a CPU."""
    fused: Callable | None = None
    """Triton."""
    why_not: Callable[..., str | None] = lambda *arguments: None
    """Given the implementations' arguments: why the kernels cannot take them, or None."""
    grad: bool = True
    """Whether it is differentiable; the others run under ``torch.no_grad``."""
    implementations: dict[str, Callable] = field(init=False)
    """reference, cpu, fused: those that exist."""

    def __post_init__(self):
        found = {"reference": self.reference, "cpu": self.cpu, "fused": self.fused}
        object.__setattr__(self, "implementations", {name: f for name, f in found.items() if f is not None})
        OPERATORS[self.name] = self


OPERATORS: dict[str, Operator] = {}
"""Name -> operator, in the order of their declaration."""
