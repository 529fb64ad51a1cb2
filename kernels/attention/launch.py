"""Attention's launchers, their registration, and autograd around them."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.attention.blocks import key_blocks, key_list, packed
from unit_fast_kernels.attention.kernels import (
    _attention_bwd_kv_kernel,
    _attention_bwd_q_kernel,
    _attention_fwd_kernel,
)
from unit_fast_kernels.attention.parameters import padded_head, split_launch, splits_keys, tile_launch
from unit_fast_kernels.attention.reference import LOG2E, bwd_reference, fwd_reference
from unit_fast_kernels.attention.split_kernels import (
    _cross_attention_bwd_kernel,
    _cross_attention_fwd_kernel,
    _cross_attention_join_kernel,
)
from unit_fast_kernels.shared.random import keep_scale, threshold
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.triton import INTERPRETING, cdiv, power_of_two

# --- Forward --------------------------------------------------------------------------------------------------------


def fwd_fake(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(out, logsumexp) as the forward allocates them."""
    batch, queries, heads, _ = q.shape
    statistics = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, queries, dtype=statistics, device=q.device)


def _fwd_launch(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    out, lse = fwd_fake(q, k, v, order, count, seed, dropout_p)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(math.inf)
    launch = _fwd_split if splits_keys(q.shape[1], k.shape[1], q.dtype) else _fwd_tiles
    launch(*(rowwise(x) for x in (q, k, v)), order, count, rowwise(seed), out, lse, dropout_p)
    return out, lse


def _fwd_tiles(q, k, v, order, count, seed, out, lse, dropout_p: float) -> None:
    batch, queries, heads, width = q.shape
    blocks, options = tile_launch("fwd", q, dropout_p)
    if order is None:
        options["maxnreg"] = None  # plain addresses take more registers: the cap would spill
    _attention_fwd_kernel[cdiv(queries, blocks["BM"]), batch * heads](
        q, k, v, out, lse, order, count, seed, *q.stride()[:3], *_outer(k), *_outer(v), heads, queries, k.shape[1],
        LOG2E / math.sqrt(width), threshold(dropout_p), keep_scale(dropout_p), K_S=k.stride(1), V_S=v.stride(1),
        DP=padded_head(width), DROP=_drop(q.dtype, dropout_p), **_constants(q, order), **blocks, **options,
    )  # fmt: skip


def _fwd_split(q, k, v, order, count, seed, out, lse, dropout_p: float) -> None:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    splits, blocks, options = split_launch("fwd", q, keys)
    part, part_lse = out, lse
    if splits > 1:
        # In the dtype of the result: each part is a mean of values, and is rounded as the result is.
        part, part_lse = (torch.empty((splits, *x.shape), dtype=x.dtype, device=x.device) for x in (out, lse))
    _cross_attention_fwd_kernel[batch * heads, splits](
        q, k, v, order, count, seed, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, queries, keys, heads, splits, LOG2E / math.sqrt(width), keep_scale(dropout_p), threshold(dropout_p),
        DROP=_drop(q.dtype, dropout_p), **_constants(q, order), **blocks, **options,
    )  # fmt: skip
    if splits > 1:
        _join(part, part_lse, out, lse)


# --- Backward -------------------------------------------------------------------------------------------------------


def _bwd_fake(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _bwd_launch(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    grads = _bwd_fake(grad, q, k, v, out, lse, order, count, seed, dropout_p)
    if q.numel() == 0 or k.numel() == 0:
        return tuple(x.zero_() for x in grads)
    launch = _bwd_split if splits_keys(q.shape[1], k.shape[1], q.dtype) else _bwd_tiles
    inputs = (rowwise(x) for x in (grad, q, k, v, out))
    launch(*inputs, lse, order, count, rowwise(seed), *grads, dropout_p)
    return grads


def _bwd_tiles(grad, q, k, v, out, lse, order, count, seed, grad_q, grad_k, grad_v, dropout_p: float) -> None:
    batch, queries, heads, width = q.shape
    keys, padded = k.shape[1], cdiv(queries, 16) * 16
    stats = torch.empty(batch * heads, 2, padded, dtype=lse.dtype, device=lse.device)
    scales = (threshold(dropout_p), keep_scale(dropout_p), keep_scale(dropout_p) / math.sqrt(width))
    numbers = (heads, queries, keys, padded, LOG2E / math.sqrt(width), *scales)
    constants = {"DP": padded_head(width), "DROP": _drop(q.dtype, dropout_p), **_constants(q, order)}
    blocks, options = tile_launch("bwd_q", q, dropout_p)
    _attention_bwd_q_kernel[cdiv(queries, blocks["BM"]), batch * heads](
        grad, q, k, v, out, lse, order, count, seed, grad_q, stats, *grad.stride()[:3], *q.stride()[:3], *_outer(k),
        *_outer(v), *out.stride()[:3], *numbers, K_S=k.stride(1), V_S=v.stride(1), **constants, **blocks, **options,
    )  # fmt: skip
    blocks, options = tile_launch("bwd_kv", q, dropout_p)
    _attention_bwd_kv_kernel[key_blocks(keys, blocks["BN"]), batch * heads](
        grad, q, k, v, stats, order, count, seed, grad_k, grad_v, *_outer(grad), *_outer(q), *k.stride()[:3],
        *v.stride()[:3], *numbers, Q_S=q.stride(1), G_S=grad.stride(1), **constants, **blocks, **options,
    )  # fmt: skip


def _bwd_split(grad, q, k, v, out, lse, order, count, seed, grad_q, grad_k, grad_v, dropout_p: float) -> None:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    splits, blocks, options = split_launch("bwd", q, keys)
    part = grad_q
    if splits > 1:
        part = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
    scale = 1.0 / math.sqrt(width)
    _cross_attention_bwd_kernel[batch * heads, splits](
        grad, q, k, v, out, lse, order, count, seed, part, grad_k, grad_v, *grad.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], batch, queries, keys, heads, splits, scale * LOG2E, scale,
        keep_scale(dropout_p), threshold(dropout_p),
        DROP=int(threshold(dropout_p) > 0), **_constants(q, order), **blocks, **options,
    )  # fmt: skip
    if splits > 1:
        _join(part, None, grad_q, None)


# --- Both -----------------------------------------------------------------------------------------------------------


def rowwise(x: Tensor | None) -> Tensor | None:
    """x with unit stride in the last dimension."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _outer(x: Tensor) -> tuple[int, int]:
    """Strides between batch entries and heads."""
    return x.stride(0), x.stride(2)


def _constants(q: Tensor, order: Tensor | None) -> dict:
    return {"D": q.shape[-1], "LISTED": order is not None, "INTERPRET": INTERPRETING}


def _drop(dtype: torch.dtype, dropout_p: float) -> int:
    """How decisions come: 0 nothing is dropped, 1 one by one, 2 two by two."""
    return 0 if threshold(dropout_p) == 0 else 2 if packed(dtype, dropout_p) and not INTERPRETING else 1


def _join(part: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Write the joined parts [splits,B,Q,H,D] to out (and the common logsumexp to lse): weighted by their logsumexps,
    or added up where there are none."""
    splits, batch, queries, heads, width = part.shape
    blocks = {"D_BLOCK": power_of_two(width), "S_BLOCK": power_of_two(splits)}
    warps = max(1, min(8, blocks["D_BLOCK"] * blocks["S_BLOCK"] // 1024))
    _cross_attention_join_kernel[batch * queries, heads](
        part, part_lse, out, lse, queries, heads, splits,
        D=width, **blocks, WEIGHTED=part_lse is not None, num_warps=warps,
    )  # fmt: skip


# --- Registration ---------------------------------------------------------------------------------------------------

_REST = "Tensor? order, Tensor? count, Tensor? seed, float dropout_p"
attention_fwd = register(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)",
    reference=fwd_reference,
    launch=_fwd_launch,
    fake=fwd_fake,
)
"""(out, logsumexp) of q, k, v, the list of real keys (or None, None), seed and dropout_p."""
attention_bwd = register(
    "attention_bwd",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
    reference=bwd_reference,
    launch=_bwd_launch,
    fake=_bwd_fake,
)
"""The gradients of q, k and v."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, dropout_p, seed):
        order, count = (None, None) if key_padding_mask is None else key_list(key_padding_mask)
        out, lse = attention_fwd(q, k, v, order, count, seed, dropout_p)
        ctx.save_for_backward(q, k, v, out, lse, order, count, seed)
        ctx.dropout_p = dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *attention_bwd(grad, *ctx.saved_tensors, ctx.dropout_p), None, None, None


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``attention_reference`` by the kernels: one launch more for a mask (5 us, the list of keys), and one each way
    where the shares of split keys are joined.

    q [B,Sq,H,D], k v [B,Sk,H,D], float32, bfloat16 or float16, D <= 128, any strides (a copy where the head is not
    contiguous); key_padding_mask [B,Sk] bool; seed int64[2] where dropout_p > 0. Returns [B,Sq,H,D]; it and the
    gradients are contiguous. What is dropped is the same in both regimes:
    ``attention_keep(B, H, Sq, Sk, dropout_p, seed, key_padding_mask)``.
    """
    return _Attention.apply(q, k, v, key_padding_mask, dropout_p, seed)
