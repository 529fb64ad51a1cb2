"""Elementwise dropout: y = x * keep / (1 - p_eff), 16 random bits a decision.

Shapes: x of any shape, y the same. Replaces ``F.dropout(x, p)``, whose random numbers on a CPU cost ten times what
these do, and which saves a mask of the size of x. ``dropout_cpu`` saves the random numbers of a smaller x for the
backward, 2 bytes each, and draws those of a large one again from the seed. Bytes: reads x, writes y.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels._random import RandomBits, SavedBits, cut, draw, keep_mask, keep_scale

# Elements worked on at a time, so that their random numbers stay in cache.
CHUNK = 1 << 18
# Below this many elements the overhead of a Function outweighs what it saves: the reference is taken.
FEW = 1 << 16
# Up to this many the numbers are saved (2 MiB).
SAVED = 1 << 20


def dropout_reference(x: Tensor, dropout_p: float, seed: Tensor | None, keep: Tensor | None = None) -> Tensor:
    """The specification. ``keep`` (bool, shape of x) overrides the random mask."""
    if dropout_p == 0.0:
        return x
    if keep is None:
        keep = keep_mask(x.shape, dropout_p, seed)
    return x * keep * keep_scale(dropout_p)


def numbers_to_save(ctx, size: int, seed: Tensor) -> Tensor | None:
    """The random numbers of ``size`` decisions, where a backward will want them and they are few."""
    return draw(seed, size) if size <= SAVED and any(ctx.needs_input_grad) else None


def drop(
    x: Tensor,
    dropout_p: float,
    seed: Tensor,
    numbers: Tensor | None = None,
    base: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """dropout(x), base + dropout(x) or dropout(relu(x)), by chunks and without autograd; dropout_p > 0.

    The decisions are those of ``dropout_reference``, from ``numbers`` (what ``draw`` gave) or drawn here. The result is
    contiguous, in the wider dtype of x and ``base`` (shape of x).
    """
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype if base is None else torch.promote_types(x.dtype, base.dtype))
    size, wide = x.numel(), torch.promote_types(x.dtype, torch.float32)
    source, target = x.view(-1), out.view(-1)
    base = None if base is None else base.contiguous().view(-1)
    bits = RandomBits(seed, size) if numbers is None else SavedBits(numbers)
    limit, scale = cut(dropout_p), keep_scale(dropout_p)
    buffer = torch.empty(min(size, CHUNK), dtype=wide)
    for start in range(0, size, CHUNK):
        part = slice(start, min(start + CHUNK, size))
        kept = bits.fill(buffer[: part.stop - start])
        # One vectorised pass: x where the number is above the limit, else 0 (a bool mask takes four times as long).
        torch.ops.aten.threshold_backward.grad_input(source[part].to(wide), kept, limit, grad_input=kept)
        if relu:
            kept.clamp_min_(0.0)
        if base is None:
            torch.mul(kept, scale, out=target[part])
        else:
            torch.add(base[part], kept, alpha=scale, out=target[part])
    return out


class _DropoutCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        numbers = numbers_to_save(ctx, x.numel(), seed)
        ctx.save_for_backward(seed, numbers)
        ctx.dropout_p = dropout_p
        return drop(x, dropout_p, seed, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return drop(grad, ctx.dropout_p, *ctx.saved_tensors), None, None


def dropout_cpu(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The same result as ``dropout_reference``, decisions included."""
    if dropout_p == 0.0 or x.numel() < FEW:
        return dropout_reference(x, dropout_p, seed)
    return _DropoutCpu.apply(x, dropout_p, seed)
