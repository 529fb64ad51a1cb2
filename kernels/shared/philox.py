"""Counter-based random numbers for dropout inside kernels: Philox 4x32 with 7 rounds, one call for eight decisions.

Formula (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = the two halves of seed[0], counter =
(call, lane, halves of seed[1]); the four 32-bit results are eight 16-bit numbers, number s being bits
16 (s % 2) .. + 15 of word s // 2. A value is dropped when its number is below ``threshold(p)`` of ``random``, so that
p_eff is within 2^-17 of p. What call and lane mean is each kernel's own; they must not depend on launch parameters.

``keep_elements`` is the rule of the elementwise kernels, ``numbers`` the same Philox in PyTorch: tests hand its masks
to the references as ``keep=``. Seven rounds are the fewest that pass BigCrush (same paper, table 2).
"""

import torch
from torch import Tensor
from unit_fast_kernels.shared.random import threshold
from unit_fast_kernels.shared.triton import jit, tl

ROUNDS = 7
_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


@jit
def philox(call, lane, seed_ptr):
    """Four uint32 blocks of the shape of ``call`` (integers below 2^32), for a scalar or block ``lane``."""
    first, second = tl.load(seed_ptr), tl.load(seed_ptr + 1)
    k0, k1 = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    zero = (call * 0).to(tl.uint32)
    c0, c1 = call.to(tl.uint32), (zero + lane).to(tl.uint32)
    c2, c3 = zero + second.to(tl.uint32), zero + (second >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        # Products of 64 bits: one IMAD.WIDE each, where separate high and low products take two instructions.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def keep_rows(row, start, C: tl.constexpr, BLOCK: tl.constexpr, limit, seed_ptr):
    """bool [R,BLOCK]: the rule of ``keep_elements`` for columns start .. start + BLOCK - 1 of rows ``row`` (int64 [R])
    of a tensor of C columns. start is a multiple of 8, BLOCK a power of two, limit ``limit(p)``."""
    if C % 8 == 0 and BLOCK % 8 == 0:
        # One call serves 8 neighbours of a row. In a thread that holds all 8 the selects are by constants and cost
        # nothing: 12 instructions an element with the draw, where tl.split takes more.
        R: tl.constexpr = row.shape[0]
        call = row[:, None] * (C // 8) + (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
        c0, c1, c2, c3 = philox(call.to(tl.uint32), (call >> 32).to(tl.uint32), seed_ptr)
        slot = tl.arange(0, 8)[None, None, :]
        low = tl.where(slot < 2, c0[:, :, None], c1[:, :, None])
        word = tl.where(slot < 4, low, tl.where(slot < 6, c2[:, :, None], c3[:, :, None]))
        return tl.reshape(_kept(word, slot, limit), [R, BLOCK])
    else:
        element = row[:, None] * C + (start + tl.arange(0, BLOCK))[None, :]
        call, slot = element >> 3, (element & 7).to(tl.int32)
        c0, c1, c2, c3 = philox(call.to(tl.uint32), (call >> 32).to(tl.uint32), seed_ptr)
        word = tl.where(slot < 4, tl.where(slot < 2, c0, c1), tl.where(slot < 6, c2, c3))
        return _kept(word, slot, limit)


@jit
def _kept(word, slot, limit):
    # The low half is compared in the high half's place, so that neither needs its other half masked away.
    return tl.where(slot % 2 == 0, word << 16, word) >= limit.to(tl.uint32)


def limit(p: float) -> int:
    """What ``keep_rows`` compares with: ``threshold(p)`` in the upper half of 32 bits."""
    return threshold(p) << 16


def numbers(call: Tensor, lane: Tensor, seed: Tensor) -> Tensor:
    """The eight 16-bit numbers of each call: call, lane int64 (broadcast), seed int64[2] -> int64 [..., 8]."""
    low = 0xFFFFFFFF
    call, lane = torch.broadcast_tensors(call.to(seed.device), torch.as_tensor(lane, device=seed.device))
    k0, k1 = seed[0] & low, (seed[0] >> 32) & low
    c0, c1 = call & low, lane & low
    c2, c3 = (seed[1] & low).expand_as(c0), ((seed[1] >> 32) & low).expand_as(c0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1  # wrap modulo 2^64, as unsigned products do
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + _W0) & low, (k1 + _W1) & low
    words = torch.stack((c0, c1, c2, c3), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-2)


def keep_elements(shape, p: float, seed: Tensor) -> Tensor:
    """bool of ``shape``: the decisions of the elementwise kernels. Element i in row-major order is number i % 8 of call
    (i // 8) modulo 2^32, lane i // 2^35."""
    size = torch.Size(shape).numel()
    call = torch.arange((size + 7) // 8, device=seed.device)
    drawn = numbers(call & 0xFFFFFFFF, call >> 32, seed).flatten()[:size]
    return (drawn >= threshold(p)).view(shape)
