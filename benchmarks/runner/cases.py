"""What a benchmark describes: its problems, and the providers that solve them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from torch import Tensor

from benchmarks.runner.marks import Marks


class Provider:
    """One way to solve a case. Subclasses hold whatever they need between steps."""

    def step(self, marks: Marks) -> None:
        """Solve once, calling ``marks(phase)`` at the end of each phase. Without any call the whole is "total"."""
        raise NotImplementedError

    def outputs(self) -> Mapping[str, Tensor]:
        """Results for the gate, by name, computed without randomness."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem."""

    name: str
    """Short, as ``--case`` takes it."""
    shape: str
    """For the table, e.g. ``2 x 320x426``."""
    dtype: str = "float32"
    device: str = "cpu"
    providers: Mapping[str, Callable[[], Provider]]
    """Name -> factory. Built once, before the gate, in this order."""
    reference: str
    """Name of the provider the others are compared with, or of an entry of ``references``."""
    references: Mapping[str, Callable[[], Provider]] = field(default_factory=dict)
    """Providers that are compared with but not timed."""
    tolerances: Mapping[str, float]
    """Largest relative error allowed, by prefix of the output's name; the longest prefix counts, "" is the default."""
    error: Literal["max", "l2"] = "max"
    """How outputs differ: by their largest element, or in the 2-norm (where single elements may be far off and right,
    as gradients behind a ReLU whose input is near zero)."""
    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What ``main.run`` runs."""

    name: str
    """The module within ``benchmarks`` (child processes are started so), and the stem of the results file."""
    title: str
    quick: str = "small shapes"
    """What a quick run measures, for the title."""
    method: Sequence[str]
    """Lines for the box printed first."""
    excluded: str
    """What the figures leave out."""
    cases: Sequence[Case]
    ours: str = "ours"
    summary: Callable[[Sequence[dict], Console], None] | None = None
    """Prints something of its own after the table, given the rows."""
