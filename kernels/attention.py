"""Softmax attention with a key-padding mask and dropout on the probabilities.

    P = softmax(q k^T / sqrt(D) + mask),  out = dropout(P) v

Shapes: q [B,Sq,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), out [B,Sq,H,D]. A row whose keys are
all masked gives zeros.

Replaces ``softmax(q @ k.T)``, ``F.dropout`` and ``@ v``, which keep four matrices of B H Sq Sk numbers for the backward.
``attention_cpu`` keeps none: it works on blocks of queries whose scores stay in cache, and its backward computes them
again and draws the same dropout decisions from the seed. FLOPs: 4 B H Sq Sk D forward, 10 backward.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unit_fast_kernels._random import RandomBits, cut, keep_mask, keep_scale

# Scores of one block: 1 MiB in float32, so that scores, gradients and random numbers share the second-level cache.
BLOCK = 1 << 18


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


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,S,H,D] -> contiguous [B*H,S,D] of ``dtype``."""
    batch, length, heads, width = x.shape
    copy = x.new_empty(batch, heads, length, width, dtype=dtype)
    return copy.copy_(x.transpose(1, 2)).view(batch * heads, length, width)


def _blocks(heads: int, queries: int, keys: int):
    """(first head, last, first query, last) of each block, in row-major order of [heads, queries, keys]."""
    if queries * keys <= BLOCK:
        step = max(1, BLOCK // max(1, queries * keys))
        for head in range(0, heads, step):
            yield head, min(heads, head + step), 0, queries
    else:
        parts = math.ceil(queries / max(1, BLOCK // keys))
        step = math.ceil(queries / parts)
        for head in range(heads):
            for query in range(0, queries, step):
                yield head, head + 1, query, min(queries, query + step)


class _Workspace:
    """Buffers of one block, cut to the shape of the block at hand."""

    def __init__(self, count: int, size: int, dtype: torch.dtype):
        self._buffers = [torch.empty(size, dtype=dtype) for _ in range(count)]

    def __getitem__(self, index_and_shape) -> Tensor:
        index, shape = index_and_shape
        return self._buffers[index][: math.prod(shape)].view(shape)


def _mask_bias(key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """[B*H,1,Sk]: 0 on real keys, a number below every score on padding; None where nothing is padded."""
    if key_padding_mask is None or not key_padding_mask.any():
        return None
    bias = torch.zeros(key_padding_mask.shape, dtype=dtype).masked_fill_(key_padding_mask, -math.inf)
    # No softmax of nothing: rows without a key see every key here; the callers zero them.
    bias.masked_fill_(key_padding_mask.all(1, keepdim=True), 0.0)
    return bias.repeat_interleave(heads, 0).unsqueeze(1)


class _AttentionCpu(torch.autograd.Function):
    """Saves q, k, v, the mask and the seed, nothing of the size Sq x Sk."""

    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, dropout_p, seed):
        ctx.save_for_backward(q, k, v, key_padding_mask, seed)
        ctx.dropout_p = dropout_p
        with torch.autocast("cpu", enabled=False):
            return _forward(q, k, v, key_padding_mask, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast("cpu", enabled=False):
            return *_backward(grad, *ctx.saved_tensors, ctx.dropout_p), None, None, None


def _forward(q, k, v, key_padding_mask, dropout_p, seed) -> Tensor:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_h, k_h, v_h = (_heads_first(x, dtype) for x in (q, k, v))
    bias = _mask_bias(key_padding_mask, heads, dtype)
    out_h = torch.empty_like(q_h)
    blocks = list(_blocks(batch * heads, queries, keys))
    size = max(((h1 - h0) * (r1 - r0) * keys for h0, h1, r0, r1 in blocks), default=0)
    work = _Workspace(3 if dropout_p > 0.0 else 2, size, dtype)
    bits = RandomBits(seed, batch * heads * queries * keys) if dropout_p > 0.0 else None
    for h0, h1, r0, r1 in blocks:
        shape = (h1 - h0, r1 - r0, keys)
        scores, weights = work[0, shape], work[1, shape]
        torch.baddbmm(
            scores, q_h[h0:h1, r0:r1], k_h[h0:h1].transpose(1, 2), beta=0, alpha=1 / math.sqrt(width), out=scores
        )
        if bias is not None:
            scores += bias[h0:h1]
        torch._softmax(scores, -1, False, out=weights)
        if bits is not None:
            # One pass over the block: weights where the random number is above the cut, else 0.
            random = bits.fill(work[2, shape])
            torch.ops.aten.threshold_backward.grad_input(weights, random, cut(dropout_p), grad_input=weights)
        target = out_h[h0:h1, r0:r1]
        torch.baddbmm(target, weights, v_h[h0:h1], beta=0, alpha=keep_scale(dropout_p), out=target)
    out = q.new_empty(q.shape)
    out.copy_(out_h.view(batch, heads, queries, width).transpose(1, 2))
    if bias is not None:
        out.masked_fill_(key_padding_mask.all(1)[:, None, None, None], 0.0)
    return out


def _backward(grad, q, k, v, key_padding_mask, seed, dropout_p) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = _mask_bias(key_padding_mask, heads, dtype)
    if bias is not None:
        grad = grad.masked_fill(key_padding_mask.all(1)[:, None, None, None], 0.0)
    q_h, k_h, v_h, grad_h = (_heads_first(x, dtype) for x in (q, k, v, grad))
    grad_q = torch.empty_like(q_h)
    # Transposed, [B*H,D,Sk]: the products that add to them over the blocks of queries are faster so.
    grad_k, grad_v = (q_h.new_zeros(batch * heads, width, keys) for _ in "kv")
    blocks = list(_blocks(batch * heads, queries, keys))
    size = max(((h1 - h0) * (r1 - r0) * keys for h0, h1, r0, r1 in blocks), default=0)
    work = _Workspace(4 if dropout_p > 0.0 else 3, size, dtype)
    bits = RandomBits(seed, batch * heads * queries * keys) if dropout_p > 0.0 else None
    scale, kept = 1 / math.sqrt(width), keep_scale(dropout_p)
    for h0, h1, r0, r1 in blocks:
        shape = (h1 - h0, r1 - r0, keys)
        q_b, k_b, v_b, grad_b = q_h[h0:h1, r0:r1], k_h[h0:h1], v_h[h0:h1], grad_h[h0:h1, r0:r1]
        scores, weights = work[0, shape], work[1, shape]
        torch.baddbmm(scores, q_b, k_b.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if bias is not None:
            scores += bias[h0:h1]
        torch._softmax(scores, -1, False, out=weights)
        grad_weights = torch.baddbmm(scores, grad_b, v_b.transpose(1, 2), beta=0, alpha=kept, out=scores)
        if bits is not None:
            random = bits.fill(work[3, shape])
            torch.ops.aten.threshold_backward.grad_input(grad_weights, random, cut(dropout_p), grad_input=grad_weights)
        grad_scores = torch.ops.aten._softmax_backward_data.out(
            grad_weights, weights, -1, dtype, grad_input=work[2, shape]
        )
        if bits is not None:
            torch.ops.aten.threshold_backward.grad_input(weights, random, cut(dropout_p), grad_input=weights)
        g_v, g_k, g_q = grad_v[h0:h1], grad_k[h0:h1], grad_q[h0:h1, r0:r1]
        torch.baddbmm(g_v, grad_b.transpose(1, 2), weights, alpha=kept, out=g_v)
        torch.baddbmm(g_k, q_b.transpose(1, 2), grad_scores, alpha=scale, out=g_k)
        torch.baddbmm(g_q, grad_scores, k_b, beta=0, alpha=scale, out=g_q)
    grad_q = grad_q.view(batch, heads, queries, width).transpose(1, 2).to(q.dtype)
    grad_k, grad_v = (g.view(batch, heads, width, keys).permute(0, 3, 1, 2).to(q.dtype) for g in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The same result as ``attention_reference``, dropout decisions included. Arithmetic in at least float32."""
    return _AttentionCpu.apply(q, k, v, key_padding_mask, dropout_p, seed)
