"""Attention in plain PyTorch: the specification, and what the launchers compute."""

import math

import torch
from torch import Tensor
from unit_fast_kernels.attention.blocks import attention_keep
from unit_fast_kernels.shared.random import keep_mask, keep_scale, threshold

LOG2E = math.log2(math.e)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The specification. ``keep`` [B,H,Sq,Sk] bool overrides the random mask."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
        # A row without any key has no softmax: make it uniform here and zero below.
        empty = key_padding_mask.all(1)[:, None, None, None]
        probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    else:
        probabilities = scores.softmax(-1)
    if dropout_p > 0.0:
        if keep is None:
            keep = keep_mask(probabilities.shape, dropout_p, seed)
        probabilities = probabilities * keep * keep_scale(dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


# --- What the launchers compute: their decisions, their logsumexp of base 2 -----------------------------------------


def _scores_and_keep(q, k, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor | float]:
    """Scores in units of log 2, -inf on padded keys, and keep times its scale: [B,H,Sq,Sk] each."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * (LOG2E / math.sqrt(q.shape[-1]))
    mask = None
    if order is not None:
        padded = torch.arange(order.shape[1], device=order.device) >= count[:, None]
        mask = torch.empty_like(padded).scatter_(1, order.long(), padded)
        scores = scores.masked_fill(mask[:, None, None, :], -math.inf)
    if threshold(dropout_p) == 0:
        return scores, 1.0
    batch, queries, heads, _ = q.shape
    keep = attention_keep(batch, heads, queries, k.shape[1], dropout_p, seed, mask)
    return scores, keep.to(wide) * keep_scale(dropout_p)


def fwd_reference(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(out [B,Sq,H,D], logsumexp [B,H,Sq] of base 2, inf where there is no key)."""
    scores, kept = _scores_and_keep(q, k, order, count, seed, dropout_p)
    top = scores.amax(-1, keepdim=True).nan_to_num(nan=math.nan, neginf=0.0) if k.shape[1] else 0.0
    p = (scores - top).exp2()
    total = p.sum(-1, keepdim=True)
    lse = torch.where(total == 0, math.inf, top + total.log2())
    out = torch.einsum("bhqk,bkhd->bqhd", p * kept / torch.where(total == 0, 1.0, total), v.to(scores.dtype))
    return out.to(q.dtype).contiguous(), lse[..., 0].contiguous()


def bwd_reference(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    scores, kept = _scores_and_keep(q, k, order, count, seed, dropout_p)
    dtype = q.dtype
    grad, q, k, v, out = (x.to(scores.dtype) for x in (grad, q, k, v, out))
    p = (scores - lse[..., None]).exp2()
    delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
    grad_s = p * (torch.einsum("bqhd,bkhd->bhqk", grad, v) * kept - delta) / math.sqrt(q.shape[-1])
    grads = (
        torch.einsum("bhqk,bkhd->bqhd", grad_s, k),
        torch.einsum("bhqk,bqhd->bkhd", grad_s, q),
        torch.einsum("bhqk,bqhd->bkhd", p * kept, grad),
    )
    return tuple(x.to(dtype).contiguous() for x in grads)
