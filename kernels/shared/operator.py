"""What an operator is: one declaration, beside its formula. ``unit_fast.ops`` is the door to those declared."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True)
class Operator:
    """One operator; its implementations take the same arguments and give the same results."""

    name: str
    validate: Callable[..., tuple]
    """Has the parameters and the docstring that users see. Returns the implementations' arguments, in their order;
    raises ``ValueError`` where they do not fit."""
    reference: Callable
    """The specification, plain PyTorch. The annotation of its results is the one that users see."""
    cpu: Callable | None = None
    """The same result, fast on a CPU."""
    fused: Callable | None = None
    """Triton."""
    why_not: Callable[..., str | None] = lambda *arguments: None
    """Given the implementations' arguments: why ``fused`` cannot take them, or None."""
    why_not_cpu: Callable[..., str | None] = lambda *arguments: None
    """The same of ``cpu``."""
    tensor: Callable[..., Tensor] = lambda *arguments: arguments[0]
    """Given the implementations' arguments: the tensor whose device chooses."""
    implementations: dict[str, Callable] = field(init=False)
    """reference, cpu, fused: those that exist."""

    def __post_init__(self):
        found = {"reference": self.reference, "cpu": self.cpu, "fused": self.fused}
        self.implementations = {name: function for name, function in found.items() if function is not None}

    def run(self, implementation: str, *arguments, **keywords):
        """What one implementation gives for the arguments that users give."""
        return self.implementations[implementation](*self.validate(*arguments, **keywords))
