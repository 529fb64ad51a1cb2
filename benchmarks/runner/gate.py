"""The gate of every benchmark: a provider's outputs against the reference's, before any figure is printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.runner.cases import Case, Provider


@dataclass(frozen=True)
class Check:
    key: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN compares false


def relative_error(value: Tensor | None, expected: Tensor, norm: str = "max") -> float:
    """Norm of the difference over the norm of what is expected; infinite on a missing value, another shape or NaN."""
    if value is None or value.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    value = value.detach().double().to(expected.device)
    if not bool(value.isfinite().all()):
        return float("inf")
    degree = {"max": float("inf"), "l2": 2}[norm]
    difference, scale = (float(torch.linalg.vector_norm(x, degree)) for x in (value - expected, expected))
    return difference / scale if scale > 0 else difference


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerances: Mapping[str, float], norm: str = "max"
) -> list[Check]:
    """One check an output. A key that only one side has is an infinite error."""
    checks = []
    for key in [*expected, *(k for k in found if k not in expected)]:
        prefix = max((p for p in tolerances if key.startswith(p)), key=len)
        error = relative_error(found.get(key), expected[key], norm) if key in expected else float("inf")
        checks.append(Check(key, error, tolerances[prefix]))
    return checks


def tell(console: Console, who: str, checks: Sequence[Check], *, to: str = "", allowed: str = ".0e") -> bool:
    """Print whether all checks hold, and the worst. ``allowed``: the form of what is allowed."""
    bad = sum(not check.ok for check in checks)
    worst = max(checks, key=lambda c: (not c.ok, c.error / c.allowed if c.allowed else c.error))
    console.print(
        f"gate {who} {f'DIFFERS in {bad} outputs' if bad else 'equal'}{to}: {len(checks)} outputs, worst "
        f"{worst.error:.1e} (allowed {worst.allowed:{allowed}}) at {worst.key}",
        highlight=False,
        soft_wrap=True,
    )
    return not bad


def gate(case: Case, providers: Mapping[str, Provider], console: Console) -> bool:
    """Compare every provider with the reference; print one line each. False when one differs."""
    if case.reference in providers:
        reference = providers[case.reference]
    else:
        reference = case.references[case.reference]()
    expected, fine = dict(reference.outputs()), True
    for name, provider in providers.items():
        if provider is reference:
            continue
        checks = compare(expected, dict(provider.outputs()), case.tolerances, case.error)
        fine &= tell(console, f"{case.name}: {name}", checks, to=f" to {case.reference}")
    return fine
