"""The rows of a case: what a JSON line holds, one a provider."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.runner.capture import captured_rounds
from benchmarks.runner.cases import Case, Provider
from benchmarks.runner.machine import percent_of_peak
from benchmarks.runner.marks import NoMarks
from benchmarks.runner.profile import Profile, profile
from benchmarks.runner.timing import L2Flush, quantiles


@dataclass(frozen=True)
class OnCard:
    """What is measured on a card besides the rounds from the host, by provider."""

    captured: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    """Milliseconds by round and phase of replays."""
    why_not: Mapping[str, str] = field(default_factory=dict)
    """Why a provider is not captured."""
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    @classmethod
    def of(cls, providers: Mapping[str, Provider], device: torch.device, rounds: int) -> "OnCard":
        """Replays and profiles of the providers on CUDA; nothing elsewhere."""
        if device.type != "cuda":
            return cls()
        profiles = {name: profile(lambda p=p: p.step(NoMarks()), device) for name, p in providers.items()}
        captured, why_not = captured_rounds(providers, device, rounds, L2Flush(device))
        return cls(captured, why_not, profiles)


def rows_of(
    case: Case, times: Mapping[str, list[dict[str, float]]], memory: Mapping[str, float], stamp: Mapping, name: str,
    card: OnCard | None = None,
) -> list[dict]:  # fmt: skip
    """One row a provider. ``time_ms``: timed from the host; ``captured_ms``: of replays."""
    card = card or OnCard()
    totals = {provider: quantiles([t["total"] for t in rounds])[0] for provider, rounds in times.items()}
    replayed = {provider: quantiles([t["total"] for t in rounds])[0] for provider, rounds in card.captured.items()}
    rows = []
    for provider, rounds in times.items():
        median, low, high = quantiles([t["total"] for t in rounds])
        row = {
            "benchmark": name,
            "case": case.name,
            "shape": case.shape,
            "dtype": case.dtype,
            "device": case.device,
            "provider": provider,
            "time_ms": round(median, 4),
            "p20_ms": round(low, 4),
            "p80_ms": round(high, 4),
            "rounds": len(rounds),
            "phases_ms": _phases(rounds),
            "speedup_vs_best": _speedup(totals, provider),
            "captured_ms": round(replayed[provider], 4) if provider in replayed else None,
            "captured_phases_ms": _phases(card.captured[provider]) if provider in replayed else None,
            "captured_speedup_vs_best": _speedup(replayed, provider),
            "captured_why_not": card.why_not.get(provider),
            **_counts(card.profiles.get(provider)),
            "peak_memory_gib": memory.get(provider),
            "percent_of_peak": percent_of_peak(case, replayed.get(provider, median), stamp["gpu"]),
            **stamp,
        }
        rows.append(row)
    return rows


def _phases(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase."""
    return {phase: round(quantiles([t[phase] for t in rounds])[0], 4) for phase in rounds[0] if phase != "total"}


def _speedup(totals: Mapping[str, float], provider: str) -> float | None:
    """The best of the others over this one; None where there is no other, or this one has no time."""
    others = [t for other, t in totals.items() if other != provider]
    return round(min(others) / totals[provider], 4) if others and provider in totals else None


def _counts(found: Profile | None) -> dict:
    """What a step launches and how often it waits, by the profiler; None where nothing was profiled."""
    keys = ("launches", "kernels", "waits", "copies_to_host", "copies_to_device")
    if found is None:
        return dict.fromkeys((*keys, "kernels_by_name"))
    names = {name[:120]: sums["kernels"] for name, sums in found.by_name.items()}
    return {**{key: getattr(found, key) for key in keys}, "kernels_by_name": names}
