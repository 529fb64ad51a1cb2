"""The cards whose launch parameters are tabled, and the peaks that their makers give."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card. Rates are the maker's dense peaks of the SXM form; cycles are those of a warp's instruction on one of
    the four schedulers of a multiprocessor."""

    arch: str
    multiprocessors: int
    clock: float
    """Cycles a second."""
    bandwidth: float
    """Bytes a second."""
    flops: Mapping[str, float]
    """FLOP/s by dtype; float32 without TF32."""
    tensor_fmas: int
    """bf16 multiply-adds a cycle and scheduler."""
    fp32_cycles: int

    @property
    def cycles_per_us(self) -> float:
        """Scheduler cycles in a microsecond, of the whole card."""
        return 4 * self.multiprocessors * self.clock * 1e-6


def _hopper(clock: float, bandwidth: float) -> Card:
    return Card(
        arch="sm_90", multiprocessors=132, clock=clock, bandwidth=bandwidth, tensor_fmas=512, fp32_cycles=1,
        flops={"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    )  # fmt: skip


CARDS = {
    "a100": Card(
        arch="sm_80", multiprocessors=108, clock=1.41e9, bandwidth=2.039e12, tensor_fmas=256, fp32_cycles=2,
        flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    ),
    "h100": _hopper(1.755e9, 3.35e12),
    "h200": _hopper(1.83e9, 4.8e12),
}  # fmt: skip
