"""Cheap random decisions for dropout on a CPU: 16 random bits each, exact to 2^-17, replayed from a seed.

Formula: keep = (bits16 >= round(65536 p)), so p_eff = round(65536 p) / 65536, |p_eff - p| <= 2^-17, and kept values are
scaled by 1 / (1 - p_eff).

The bits are one stream that depends on the seed and on how many decisions the call makes, on nothing else: element i of
a call, in row-major order of the tensor it drops, uses bits 16 i .. 16 i + 15. So a reference that draws all of them at
once and an implementation that draws them block by block decide alike, and a backward can draw them again.
"""

import math

import torch
from torch import Tensor

# murmur-like step on 64-bit words: x <- M (x xor (x >> 32)), with arithmetic shift because torch has no logical one.
_MULTIPLIER = 0xD6E8FEB86659FD93 - 2**64
_FEW, _MANY = 1 << 14, 1 << 16


def threshold(p: float) -> int:
    """The 16-bit number below which a value is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """1 / (1 - p_eff)."""
    return 65536.0 / (65536 - threshold(p))


def cut(p: float) -> float:
    """The number that a kept draw of ``RandomBits.fill`` is above and a dropped one below (never equal)."""
    return threshold(p) - 32768 - 0.5


class RandomBits:
    """The stream of 16-bit numbers for ``size`` decisions of one call. ``seed`` int64[2] is read on the host.

    The first ``lanes`` words of 64 bits come from torch's Mersenne Twister (2.6 ns a word, one thread); each later word
    is a mixing step of the word ``lanes`` before it, in vector operations (0.5 ns). Every lane is so a short sequence
    (thousands of steps at most) of a 64-bit map from a random start.
    """

    def __init__(self, seed: Tensor, size: int):
        words = (size + 3) // 4
        lanes = min(words, _FEW if words < 4 * _MANY else _MANY)
        first, second = seed.tolist()
        mixed = (first * 0x9E3779B97F4A7C15 + second * 0xC2B2AE3D27D4EB4F) & (2**64 - 1)
        mixed ^= mixed >> 31
        rng = torch.Generator().manual_seed(mixed & (2**63 - 1))
        self._words = torch.empty(lanes, dtype=torch.int64).random_(-(2**63), None, generator=rng)
        self._shifted = torch.empty_like(self._words) if words > lanes else None
        self._numbers = self._words.view(torch.int16)
        self._used = 0

    def fill(self, out: Tensor) -> Tensor:
        """Write the next ``out.numel()`` numbers, -32768..32767, into contiguous ``out`` of any dtype; returns it."""
        flat = out.view(-1)
        done, size = 0, flat.numel()
        while done < size:
            if self._used == self._numbers.numel():
                torch.bitwise_right_shift(self._words, 32, out=self._shifted)
                torch.mul(self._shifted.bitwise_xor_(self._words), _MULTIPLIER, out=self._words)
                self._used = 0
            n = min(size - done, self._numbers.numel() - self._used)
            flat[done : done + n].copy_(self._numbers[self._used : self._used + n])
            self._used += n
            done += n
        return out


class SavedBits:
    """The same interface over numbers that were drawn before, an int16 tensor [size]."""

    def __init__(self, numbers: Tensor):
        self._numbers, self._used = numbers, 0

    def fill(self, out: Tensor) -> Tensor:
        """Write the next ``out.numel()`` numbers into contiguous ``out`` of any dtype; returns it."""
        start, self._used = self._used, self._used + out.numel()
        out.view(-1).copy_(self._numbers[start : self._used])
        return out


def draw(seed: Tensor, size: int) -> Tensor:
    """The whole stream of ``size`` numbers, int16."""
    return RandomBits(seed, size).fill(torch.empty(size, dtype=torch.int16))


def keep_mask(shape, p: float, seed: Tensor) -> Tensor:
    """bool of ``shape`` on the device of ``seed``, False where a value is dropped."""
    if torch.compiler.is_compiling():  # one operator to the compiler, which cannot look into what reads the seed
        return torch.ops.unit_fast.keep_mask(list(shape), p, seed)
    return _keep_mask(shape, p, seed)


def _keep_mask(shape, p: float, seed: Tensor) -> Tensor:
    return (draw(seed, math.prod(shape)) >= threshold(p) - 32768).view(shape).to(seed.device)


_LIBRARY = torch.library.Library("unit_fast", "FRAGMENT")
_LIBRARY.define("keep_mask(SymInt[] shape, float p, Tensor seed) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("keep_mask", _keep_mask, _device)
torch.library.register_fake(
    "unit_fast::keep_mask", lambda shape, p, seed: seed.new_empty(shape, dtype=torch.bool), lib=_LIBRARY
)
