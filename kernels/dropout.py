"""Elementwise dropout: y = x * keep / (1 - p_eff), 16 random bits a decision.

Shapes: x of any shape, y the same. Replaces ``F.dropout(x, p)``, whose random numbers on a CPU cost ten times what
these do, and which saves a mask of the size of x. ``dropout_cpu`` saves the random numbers of a smaller x for the
backward, 2 bytes each, and draws those of a large one again from the seed. Fused, one launch each way draws the
decisions from the seed and saves nothing. Bytes: reads x, writes y. Limits of the fused path: float32, bfloat16,
float16.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.philox import keep_elements, keep_rows, limit
from unit_fast_kernels.shared.random import RandomBits, SavedBits, cut, draw, keep_mask, keep_scale
from unit_fast_kernels.shared.registration import DTYPES, register
from unit_fast_kernels.shared.triton import cdiv, jit, tl
from unit_fast_kernels.shared.tuned import candidates_of, launch_parameters
from unit_fast_kernels.shared.validation import check_dropout, check_floating

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


# --- Fused ----------------------------------------------------------------------------------------------------------


@jit
def _dropout_kernel(
    x_ptr,  # [N]
    seed_ptr,  # int64 [2]
    y_ptr,  # [N]
    size,  # N
    scale,
    limit,
    BLOCK: tl.constexpr,
):
    # The elements as rows of BLOCK, so that neighbours share a call of Philox.
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    element = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    y = tl.where(keep_rows(row, 0, BLOCK, BLOCK, limit, seed_ptr), x * scale, 0.0)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=element < size)


def _default() -> dict[str, int]:
    return {"block": 1024, "warps": 4}


def _output(x, *_) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(x, dropout_p, seed):
    y = _output(x)
    size = x.numel()
    if size == 0:
        return y
    tune = launch_parameters("dropout_apply", "any", _default(), x.device)
    _dropout_kernel[(cdiv(size, tune["block"]),)](
        x.contiguous(),
        seed.contiguous(),
        y,
        size,
        keep_scale(dropout_p),
        limit(dropout_p),
        BLOCK=tune["block"],
        num_warps=tune["warps"],
    )
    return y


def _apply_reference(x, dropout_p, seed):
    kept = keep_elements(x.shape, dropout_p, seed) * keep_scale(dropout_p)
    return _output(x).copy_(x.float() * kept)


_apply = register(
    "dropout_apply",
    "(Tensor x, float dropout_p, Tensor seed) -> Tensor",
    reference=_apply_reference,
    launch=_launch,
    fake=_output,
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        ctx.save_for_backward(seed)
        ctx.dropout_p = dropout_p
        return _apply(x, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _apply(grad, ctx.dropout_p, *ctx.saved_tensors), None, None


def dropout_fused(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``dropout_reference`` with the decisions of ``keep_elements``; x itself where dropout_p is 0."""
    return x if dropout_p == 0.0 else _Dropout.apply(x, dropout_p, seed)


def why_not(x: Tensor, *_) -> str | None:
    """Why the kernel cannot take x, or None."""
    return None if x.dtype in DTYPES else f"x is {x.dtype}; the kernel takes float32, bfloat16, float16"


# --- The operator ----------------------------------------------------------------------------------------------------


def validate(x: Tensor, dropout_p: float, seed: Tensor | None) -> tuple:
    """x with elements zeroed with probability dropout_p and the rest scaled by 1/(1 - p_eff), |p_eff - p| <= 2^-17.

    x of any shape, floating; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not fit.
    """
    check_floating("dropout", x=x)
    check_dropout("dropout", dropout_p, seed)
    return x, dropout_p, seed


DROPOUT = Operator(
    name="dropout",
    validate=validate,
    reference=dropout_reference,
    cpu=dropout_cpu,
    fused=dropout_fused,
    why_not=why_not,
)


SHAPES: dict[str, tuple[int, ...]] = {
    "bert_base_embeddings": (32, 129, 768),
    "unit_classifier": (64, 768),
    "unit_glue_single_key": (64, 25, 8, 1),
}
"""Any sizes."""


def make(shape: tuple[int, ...], dtype: torch.dtype, device) -> dict:
    """Arguments of ``dropout_fused`` with dropout 0.1."""
    x = torch.randn(shape, dtype=dtype, device=device)
    return {"x": x, "dropout_p": 0.1, "seed": torch.tensor([1234567890123, -42], device=device)}


def launches(shape: tuple[int, ...], dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operator of the forward and of the backward pass, with arguments."""
    return [("dropout_apply", tuple(make(shape, dtype, device).values()))] * 2


def candidates(shape: tuple[int, ...]) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the default first."""
    others = [{"block": block, "warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]
    return candidates_of(["dropout_apply"], "any", (_default(), *others))


def bytes_moved(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """x read, y written."""
    return 2 * torch.Size(shape).numel() * dtype.itemsize


bytes_moved_bwd = bytes_moved


def flops(shape: tuple[int, ...]) -> int:
    """One product an element."""
    return torch.Size(shape).numel()


flops_bwd = flops
