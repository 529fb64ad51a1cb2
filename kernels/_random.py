"""Cheap random keep masks for dropout: 16 random bits a decision, exact to 2^-17.

Formula: keep = (bits16 >= round(65536 p)), so p_eff = round(65536 p) / 65536, |p_eff - p| <= 2^-17, and kept values are
scaled by 1 / (1 - p_eff).
"""

import torch
from torch import Tensor


def threshold(p: float) -> int:
    """The 16-bit number below which a value is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (1 - p_eff)."""
    return 65536.0 / (65536 - threshold(p))


def generator(seed: Tensor, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on ``seed`` (int64[2]) and ``stream`` only; reads the seed on the host."""
    first, second = seed.tolist()
    mixed = (first * 0x9E3779B97F4A7C15 + second * 0xC2B2AE3D27D4EB4F + stream * 0x165667B19E3779F9) & (2**64 - 1)
    mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & (2**63 - 1))


def keep_mask(shape, p: float, rng: torch.Generator) -> Tensor:
    """bool of ``shape``, False where a value is dropped. One 64-bit draw makes four decisions."""
    size = 1
    for n in shape:
        size *= n
    words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=rng)
    bits = words.view(torch.int16)[:size]
    return (bits >= threshold(p) - 32768).view(shape)
