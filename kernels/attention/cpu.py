"""Softmax attention on a CPU: the result of ``attention_reference``, dropout decisions included, several times faster.

Works on blocks of queries whose scores stay in cache. One matrix of B H Sq Sk numbers is kept for the backward where it
is small, and none where it would be large: the backward then computes the probabilities again and draws the same
dropout decisions from the seed. FLOPs: 4 B H Sq Sk D forward, 8 (or 10) backward. Arithmetic in at least float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.attention.reference import attention_reference
from unit_fast_kernels.shared.random import RandomBits, cut, keep_mask, keep_scale

# Scores of one block: 2 MiB in float32, so that scores, gradients and random numbers share the second-level cache.
BLOCK = 1 << 19
# Up to this many scores the weights are saved for the backward (24 MiB in float32); beyond, they are computed again.
SAVED = 6 << 20
# Below this many scores the overhead of blocks outweighs what they save: plain products under autograd are taken.
FEW = 1 << 18


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,S,H,D] -> contiguous [B*H,S,D] of ``dtype``."""
    batch, length, heads, width = x.shape
    copy = x.new_empty(batch, heads, length, width, dtype=dtype)
    return copy.copy_(x.transpose(1, 2)).view(batch * heads, length, width)


def _blocks(heads: int, queries: int, keys: int) -> list[tuple[int, int, int, int]]:
    """(first head, last, first query, last) of each block, in row-major order of [heads, queries, keys]."""
    if queries * keys <= BLOCK:
        step = max(1, BLOCK // max(1, queries * keys))
        return [(head, min(heads, head + step), 0, queries) for head in range(0, heads, step)]
    parts = math.ceil(queries / max(1, BLOCK // keys))
    step = math.ceil(queries / parts)
    return [(h, h + 1, r, min(queries, r + step)) for h in range(heads) for r in range(0, queries, step)]


def _largest(blocks) -> int:
    """Rows of scores in the largest block (the first)."""
    return (blocks[0][1] - blocks[0][0]) * (blocks[0][3] - blocks[0][2]) if blocks else 0


class _Workspace:
    """Buffers of one block, cut to the shape of the block at hand."""

    def __init__(self, count: int, size: int, dtype: torch.dtype):
        self._buffers = [torch.empty(size, dtype=dtype) for _ in range(count)]

    def __call__(self, index: int, shape: tuple[int, int, int]) -> Tensor:
        return self._buffers[index][: math.prod(shape)].view(shape)


def _mask_bias(key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """[B*H,1,Sk]: 0 on real keys, -inf on padding; None where nothing is padded."""
    if key_padding_mask is None or not key_padding_mask.any():
        return None
    bias = torch.zeros(key_padding_mask.shape, dtype=dtype).masked_fill_(key_padding_mask, -math.inf)
    # No softmax of nothing: rows without a key see every key here; the callers zero them.
    bias.masked_fill_(key_padding_mask.all(1, keepdim=True), 0.0)
    return bias.repeat_interleave(heads, 0).unsqueeze(1)


def _softmax_scores(q: Tensor, k: Tensor, bias: Tensor | None, scores: Tensor, weights: Tensor) -> None:
    """weights <- softmax(q k^T / sqrt(D) + bias) for one block; ``scores`` is overwritten."""
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(q.shape[-1]), out=scores)
    if bias is not None:
        scores += bias
    torch._softmax(scores, -1, False, out=weights)


def _where_above(values: Tensor, numbers: Tensor, limit: float, out: Tensor) -> Tensor:
    """out <- values where numbers > limit, else 0, in one vectorised pass (a bool mask takes four times as long)."""
    return torch.ops.aten.threshold_backward.grad_input(values, numbers, limit, grad_input=out)


class _AttentionCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, dropout_p, seed):
        with torch.autocast("cpu", enabled=False):
            return _forward(ctx, q, k, v, key_padding_mask, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast("cpu", enabled=False):
            return *_backward(ctx, grad), None, None, None


def _forward(ctx, q, k, v, key_padding_mask, dropout_p, seed) -> Tensor:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_h, k_h, v_h = (_heads_first(x, dtype) for x in (q, k, v))
    bias = _mask_bias(key_padding_mask, heads, dtype)
    dropping = dropout_p > 0.0
    bits = RandomBits(seed, batch * heads * queries * keys) if dropping else None
    limit, kept = cut(dropout_p), keep_scale(dropout_p)
    blocks = _blocks(batch * heads, queries, keys)
    work = _Workspace(2 + dropping, _largest(blocks) * keys, dtype)
    needs_grad = any(ctx.needs_input_grad)
    saved = None
    if needs_grad and batch * heads * queries * keys <= SAVED:
        saved = torch.empty(batch * heads, queries, keys, dtype=dtype)
    out_h = torch.empty_like(q_h)
    for h0, h1, r0, r1 in blocks:
        shape = (h1 - h0, r1 - r0, keys)
        scores = work(0, shape)
        weights = work(1, shape) if saved is None else saved[h0:h1, r0:r1]
        _softmax_scores(q_h[h0:h1, r0:r1], k_h[h0:h1], None if bias is None else bias[h0:h1], scores, weights)
        dropped = weights
        if dropping:
            dropped = _where_above(weights, bits.fill(work(2, shape)), limit, out=scores)
            if saved is not None:
                torch.lerp(weights, dropped, 2.0, out=weights)  # 2 dropped - weights: negative where dropped
        target = out_h[h0:h1, r0:r1]
        torch.baddbmm(target, dropped, v_h[h0:h1], beta=0, alpha=kept, out=target)
    if needs_grad:
        ctx.save_for_backward(q_h, k_h, v_h, key_padding_mask if bias is not None else None, bias, saved, seed)
        ctx.dropout_p, ctx.batch, ctx.dtype = dropout_p, batch, q.dtype
    out = torch.empty(q.shape, dtype=q.dtype).copy_(out_h.view(batch, heads, queries, width).transpose(1, 2))
    if bias is not None:
        out.masked_fill_(key_padding_mask.all(1)[:, None, None, None], 0.0)
    return out


def _backward(ctx, grad) -> tuple[Tensor, Tensor, Tensor]:
    q_h, k_h, v_h, key_padding_mask, bias, saved, seed = ctx.saved_tensors
    (all_heads, queries, width), keys = q_h.shape, k_h.shape[1]
    if key_padding_mask is not None:
        grad = grad.masked_fill(key_padding_mask.all(1)[:, None, None, None], 0.0)
    grad_h = _heads_first(grad, q_h.dtype)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_h, k_h, v_h))
    dropping = ctx.dropout_p > 0.0
    bits = RandomBits(seed, all_heads * queries * keys) if dropping and saved is None else None
    limit, kept, scale = cut(ctx.dropout_p), keep_scale(ctx.dropout_p), 1 / math.sqrt(width)
    blocks = _blocks(all_heads, queries, keys)
    work = _Workspace(3 + dropping, _largest(blocks) * keys, q_h.dtype)
    for h0, h1, r0, r1 in blocks:
        shape = (h1 - h0, r1 - r0, keys)
        q_b, k_b, v_b, grad_b = q_h[h0:h1, r0:r1], k_h[h0:h1], v_h[h0:h1], grad_h[h0:h1, r0:r1]
        grad_weights, grad_scores = work(0, shape), work(1, shape)
        if saved is None:
            weights = work(2, shape)
            _softmax_scores(q_b, k_b, None if bias is None else bias[h0:h1], grad_weights, weights)
        else:
            weights = saved[h0:h1, r0:r1]
        torch.baddbmm(grad_weights, grad_b, v_b.transpose(1, 2), beta=0, alpha=kept, out=grad_weights)
        dropped = weights
        if dropping:
            if saved is None:
                numbers = bits.fill(work(3, shape))
            else:
                # The sign of a saved weight says whether it was dropped.
                numbers, limit, weights = weights, 0.0, torch.abs(weights, out=work(2, shape))
            _where_above(grad_weights, numbers, limit, out=grad_weights)
            dropped = _where_above(weights, numbers, limit, out=work(3, shape))
        torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, q_h.dtype, grad_input=grad_scores)
        g_v, g_k, g_q = grad_v[h0:h1], grad_k[h0:h1], grad_q[h0:h1, r0:r1]
        more = float(r0 > 0)  # the first block of a head writes its gradients, the others add to them
        torch.baddbmm(g_v, dropped.transpose(1, 2), grad_b, beta=more, alpha=kept, out=g_v)
        torch.baddbmm(g_k, grad_scores.transpose(1, 2), q_b, beta=more, alpha=scale, out=g_k)
        torch.baddbmm(g_q, grad_scores, k_b, beta=0, alpha=scale, out=g_q)
    grads = (g.view(ctx.batch, -1, *g.shape[1:]).transpose(1, 2) for g in (grad_q, grad_k, grad_v))
    return tuple(g.to(ctx.dtype) for g in grads)


class _SingleKeyCpu(torch.autograd.Function):
    """Sk = 1: the softmax is 1 whatever q and k are, so the result is v under an independent dropout for every batch
    entry, query and head, and the gradients of q and k are exactly zero."""

    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, dropout_p, seed):
        batch, queries, heads, _ = q.shape
        kept = torch.ones(batch, heads, queries, 1, dtype=v.dtype)
        if dropout_p > 0.0:
            kept = keep_mask(kept.shape, dropout_p, seed).to(v.dtype).mul_(keep_scale(dropout_p))
        if key_padding_mask is not None:
            kept.masked_fill_(key_padding_mask[:, None, None, :], 0.0)
        kept = kept.transpose(1, 2)
        ctx.save_for_backward(kept)
        ctx.shapes = q.shape, k.shape
        return v * kept

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        zeros = (grad.new_zeros(shape) if wanted else None for shape, wanted in zip(ctx.shapes, ctx.needs_input_grad))
        return *zeros, (grad * kept).sum(1, keepdim=True), None, None, None


def _attention_few(q, k, v, key_padding_mask, dropout_p, seed) -> Tensor:
    """All scores at once, backward by autograd."""
    batch, queries, heads, width = q.shape
    q_h, k_h, v_h = (x.transpose(1, 2).reshape(batch * heads, -1, width) for x in (q, k, v))
    scores = torch.bmm(q_h * (1 / math.sqrt(width)), k_h.transpose(1, 2))
    bias = _mask_bias(key_padding_mask, heads, scores.dtype)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    if dropout_p > 0.0:
        kept = keep_mask(weights.shape, dropout_p, seed).to(weights.dtype)
        weights = weights * kept.mul_(keep_scale(dropout_p))
    out = torch.bmm(weights, v_h).view(batch, heads, queries, width).transpose(1, 2)
    return out if bias is None else out.masked_fill(key_padding_mask.all(1)[:, None, None, None], 0.0)


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The same result as ``attention_reference``, dropout decisions included. Arithmetic in at least float32."""
    if q.numel() == 0 or k.numel() == 0:
        return attention_reference(q, k, v, key_padding_mask, dropout_p, seed)
    padded = key_padding_mask is not None and bool(key_padding_mask.any())
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if dropout_p == 0.0 and not padded and not wants_grad:
        # torch's own blocks: 0.7 of the time of those below, but they know no dropout and are slower where trained.
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    if k.shape[1] == 1:
        return _SingleKeyCpu.apply(q, k, v, key_padding_mask, dropout_p, seed)
    if q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] < FEW:
        return _attention_few(q, k, v, key_padding_mask, dropout_p, seed)
    return _AttentionCpu.apply(q, k, v, key_padding_mask, dropout_p, seed)
