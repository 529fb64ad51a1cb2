"""Kernels with and without faults, for the tests of the assembly: the child process imports them from here."""

import pytest
import torch
from unit_fast_kernels.shared.triton import INTERPRETING, cdiv, jit, tl, triton

needs_compiler = pytest.mark.skipif(
    triton is None or INTERPRETING, reason="kernels are compiled in the run without TRITON_INTERPRET, with Triton"
)


@jit
def product(x, factor):
    """What ``scale`` calls."""
    return x * factor


@jit
def scale(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    """Without a fault: y = factor x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, product(x, factor), mask=i < n)


@jit
def matmul(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """One program: a [M,K] @ b [K,N]. Large tiles on few warps spill; many stages need much shared memory."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    """Does not compile: the loop variable changes its type, which the interpreter does not see."""
    total = 0
    for i in range(BLOCK):
        total += tl.load(x_ptr + i)
    tl.store(x_ptr, total)


def launch_scale(size=1000, offset=0, warps=4, dtype=torch.bfloat16):
    """To be recorded: x begins ``offset`` elements into its memory."""
    x = torch.empty(size + offset, dtype=dtype, device="cuda:0")[offset:]
    scale[(cdiv(size, 256),)](x, torch.empty_like(x), size, 0.5, BLOCK=256, num_warps=warps)


def launch_matmul(m, n, k, stages, warps=4):
    """To be recorded: one program, 4096 deep."""
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="cuda:0") for s in ((m, 4096), (4096, n)))
    c = torch.empty(m, n, device="cuda:0")
    matmul[(1,)](a, b, c, 4096, M=m, N=n, BK=k, num_warps=warps, num_stages=stages)
