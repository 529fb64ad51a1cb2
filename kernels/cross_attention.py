"""Attention of few queries over many keys: the decoder's cross-attention, split over the keys both ways.

    P = softmax(q k^T / sqrt(D) + mask),  out = dropout(P) v

Shapes: q [B,Q,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), out [B,Q,H,D]. A row whose keys are
all masked gives zeros, and zero gradients.

Replaces ``softmax(q @ k.T)``, ``F.dropout`` and ``@ v``, which keep matrices of B H Q Sk numbers. All queries are one
tile, so k and v are read once each way and dk and dv are written once; only the parts of out (each with its logsumexp)
and of dq are joined, in the order of the splits, so that two runs give the same bits. Saved for the backward: out, the
logsumexp, the list of real keys. Padded keys are not visited (``_attention_blocks``), wherever they stand.

Bytes: k and v forward; k, v, dk and dv backward; q, out and their gradients are small beside them. FLOPs: 4 B H Q Sk D
forward, 10 backward. Limits: those of ``attention``, whose kernels take over where the queries are more than a tile
(128; float32: 32); any strides, with a copy only where the head is not contiguous (slices of one product over all
layers are taken as they are).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.attention import (
    LOG2E,
    _bwd_fake,
    _bwd_reference,
    _fwd_fake,
    _fwd_reference,
    _key_list_reference,
    _rowwise,
    attention_fused,
    attention_reference,
    validated,
    why_not,
)
from unit_fast_kernels.attention.blocks import key_blocks, key_list, packed
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.attention.split_kernels import (
    _cross_attention_bwd_kernel,
    _cross_attention_fwd_kernel,
    _cross_attention_join_kernel,
)
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.random import keep_scale, threshold
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.triton import INTERPRETING, cdiv, power_of_two
from unit_fast_kernels.shared.tuned import card, launch_parameters, multiprocessors

MOST_QUERIES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
"""Queries of one tile. Exact float32 products keep their operands in registers: a tile of 128 would spill."""


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The specification: that of ``attention``, of which this is the case of few queries. ``keep`` [B,H,Q,Sk] bool
    overrides the random mask."""
    return attention_reference(q, k, v, key_padding_mask, dropout_p, seed, keep)


# --- Launch parameters ----------------------------------------------------------------------------------------------


def _query_tile(queries: int) -> int:
    return max(32, power_of_two(queries))


def bucket(queries: int, width: int, dtype: torch.dtype) -> str:
    """The shape bucket of the launch tables."""
    return f"queries{_query_tile(queries)}_width{width}" + ("_fp32" if dtype == torch.float32 else "")


def _default(kernel: str, queries: int, width: int, dtype: torch.dtype, card_name: str) -> dict[str, int]:
    """Without spills, the fewest instructions a score.

    ``keys`` of a step; ``second`` columns of the head in a part of their own (96 = 64 + 32, 128 = 64 + 64; 0: one
    part); ``warps``: one for every 16 queries, more would repeat each other's products; ``stages``; ``splits`` of the
    keys (0: as many as ``split_count`` says)."""
    tile, wide = _query_tile(queries), width > 96
    tight = dtype == torch.float32 or (kernel == "bwd" and card_name == "a100")  # one part of 128 spills there
    second = 32 if width == 96 else 64 if wide and tight else 0
    parameters = {"keys": 64, "second": second, "warps": tile // 16, "stages": 2, "splits": 0}
    if dtype == torch.float32:
        return parameters | {"keys": 32, "warps": 4, "stages": 1}
    if kernel == "fwd":
        return parameters | ({"keys": 128} if width <= 32 else {})
    return parameters | {"keys": 32 if wide or (width > 64 and tile < 128) else 64, "stages": 1}


def split_count(rows: int, blocks: int, places: int, most: int) -> int:
    """Splits of the keys for ``rows`` = B H programs on a card that runs ``places`` programs at once.

    The fewest whose waves are filled to 85% of what the best number fills; one where the rows alone fill 80% of the
    places. At most ``most``, and at least one block of keys each.
    """
    if rows >= 0.8 * places:
        return 1
    counts = range(1, max(1, min(most, blocks)) + 1)
    filled = [rows * n / places / cdiv(rows * n, places) for n in counts]
    return next(n for n, share in zip(counts, filled) if share >= 0.85 * max(filled))


def most_splits(queries: int, keys: int) -> int:
    """Splits whose parts stay below a tenth of the bytes that must move: of k and v forward (parts of their dtype), of
    k, v and their gradients backward (fp32 parts of 16-bit inputs)."""
    return min(64, keys // (5 * queries))


def _launching(kernel: str, q: Tensor, keys: int) -> tuple[int, dict, dict]:
    """(splits, blocks, options of the launch) of a kernel."""
    batch, queries, heads, width = q.shape
    default = _default(kernel, queries, width, q.dtype, card(q.device))
    found = launch_parameters(f"cross_attention_{kernel}", bucket(queries, width, q.dtype), default, q.device)
    whole, second, warps = max(16, power_of_two(width)), found["second"], found["warps"]
    blocks = {"DA": whole // 2 if second else whole, "DB": second, "BM": _query_tile(queries), "BN": found["keys"]}
    # Threads take up to 255 registers: eight warps fill a multiprocessor.
    places = multiprocessors(q.device) * max(1, 8 // warps)
    rule = split_count(batch * heads, key_blocks(keys, found["keys"]), places, most_splits(queries, keys))
    return found["splits"] or rule, blocks, {"num_warps": warps, "num_stages": found["stages"]}


def _constants(q: Tensor, order: Tensor | None) -> dict:
    return {"D": q.shape[-1], "LISTED": order is not None, "INTERPRET": INTERPRETING}


def _drops(dropout_p: float) -> bool:
    return threshold(dropout_p) > 0


# --- Launchers ------------------------------------------------------------------------------------------------------


def _fwd_launch(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    out, lse = _fwd_fake(q, k, v, order, count, seed, dropout_p)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(math.inf)
    q, k, v, seed = (_rowwise(x) for x in (q, k, v, seed))
    splits, blocks, options = _launching("fwd", q, keys)
    part, part_lse = out, lse
    if splits > 1:
        # In the dtype of the result: each part is a mean of values, and is rounded as the result is.
        part, part_lse = (torch.empty((splits, *x.shape), dtype=x.dtype, device=x.device) for x in (out, lse))
    drop = 0 if not _drops(dropout_p) else 2 if packed(q.dtype, dropout_p) and not INTERPRETING else 1
    _cross_attention_fwd_kernel[batch * heads, splits](
        q, k, v, order, count, seed, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, queries, keys, heads, splits, LOG2E / math.sqrt(width), keep_scale(dropout_p), threshold(dropout_p),
        **_constants(q, order), DROP=drop, **blocks, **options,
    )  # fmt: skip
    if splits > 1:
        _join(part, part_lse, out, lse)
    return out, lse


def _bwd_launch(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _bwd_fake(grad, q, k, v, out, lse, order, count, seed, dropout_p)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v, out, seed = (_rowwise(x) for x in (grad, q, k, v, out, seed))
    splits, blocks, options = _launching("bwd", q, keys)
    part = dq if splits == 1 else torch.empty((splits, *dq.shape), dtype=torch.float32, device=dq.device)
    scale = 1.0 / math.sqrt(width)
    _cross_attention_bwd_kernel[batch * heads, splits](
        grad, q, k, v, out, lse, order, count, seed, part, dk, dv, *grad.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], batch, queries, keys, heads, splits, scale * LOG2E, scale,
        keep_scale(dropout_p), threshold(dropout_p),
        **_constants(q, order), DROP=int(_drops(dropout_p)), **blocks, **options,
    )  # fmt: skip
    if splits > 1:
        _join(part, None, dq, None)
    return dq, dk, dv


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
_fwd = register(
    "cross_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=_fwd_fake,
)
_bwd = register(
    "cross_attention_bwd",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, dropout_p, seed):
        order, count = (None, None) if key_padding_mask is None else key_list(key_padding_mask)
        out, lse = _fwd(q, k, v, order, count, seed, dropout_p)
        ctx.save_for_backward(q, k, v, out, lse, order, count, seed)
        ctx.dropout_p = dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_bwd(grad, *ctx.saved_tensors, ctx.dropout_p), None, None, None


def cross_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``cross_attention_reference`` in one launch each way, two where the keys are split, and one for a mask's list.

    q [B,Q,H,D], k v [B,Sk,H,D], float32, bfloat16 or float16, D <= 128, any strides; key_padding_mask [B,Sk] bool;
    seed int64[2] where dropout_p > 0. Returns [B,Q,H,D]; it and the gradients are contiguous. More queries than
    MOST_QUERIES go to ``attention_fused``. What is dropped is the same there and here, whatever the splits:
    ``attention_keep(B, H, Q, Sk, dropout_p, seed, key_padding_mask)``. Arguments are checked in
    ``ops.cross_attention``.
    """
    if q.shape[1] > MOST_QUERIES.get(q.dtype, 0):
        return attention_fused(q, k, v, key_padding_mask, dropout_p, seed)
    return _CrossAttention.apply(q, k, v, key_padding_mask, dropout_p, seed)


# --- The operator ----------------------------------------------------------------------------------------------------


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple:
    """``attention`` for few queries and many keys (the decoder's)."""
    return validated("cross_attention", q, k, v, key_padding_mask, dropout_p, seed)


CROSS_ATTENTION = Operator(
    name="cross_attention",
    validate=validate,
    reference=cross_attention_reference,
    cpu=attention_cpu,
    fused=cross_attention_fused,
    why_not=why_not,
)


# --- Shapes and work ------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, int, bool, float]] = {
    "unit_detection": (2, 100, 4200, 8, 96, True, 0.1),
    "unit_detection_b8": (8, 100, 4200, 8, 96, True, 0.1),
    "unit_detection_eval": (2, 100, 4200, 8, 96, True, 0.0),
    "unit_vqa": (2, 25, 4225, 8, 96, True, 0.1),
    "unit_vqa_b8": (8, 25, 4225, 8, 96, True, 0.1),
    "detr_r50": (2, 100, 1050, 8, 32, True, 0.1),
    "head64": (2, 100, 1050, 8, 64, True, 0.1),
    "head128": (2, 100, 1050, 8, 128, False, 0.1),
}
"""B, Q, Sk, H, D, whether there is a mask, dropout_p."""
_LAYERS, _ROW = 6, 42


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``cross_attention_fused``: keys and values are slices of products over six layers; the last batch
    entry is padded like an image of four fifths of the width, at the end of each row of 42 keys."""
    batch, queries, keys, heads, width, masked, dropout_p = shape
    products = [torch.randn(batch, keys, _LAYERS, heads, width, dtype=dtype, device=device) for _ in range(2)]
    mask = None
    if masked:
        mask = torch.zeros(batch, keys, dtype=torch.bool, device=device)
        mask[-1] = torch.arange(keys, device=device) % _ROW >= _ROW * 4 // 5
    return {
        "q": torch.randn(batch, queries, heads, width, dtype=dtype, device=device),
        "k": products[0][:, :, 2],
        "v": products[1][:, :, 2],
        "key_padding_mask": mask,
        "dropout_p": dropout_p,
        "seed": torch.tensor([1234567890123, -42], device=device) if dropout_p else None,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments: those of ``attention`` where the
    queries are more than a tile."""
    op = "cross_attention" if shape[1] <= MOST_QUERIES[dtype] else "attention"
    a = make(shape, dtype, device)
    mask = a["key_padding_mask"]
    order, count = (None, None) if mask is None else _key_list_reference(mask)
    q, k, v, rest = a["q"], a["k"], a["v"], (order, count, a["seed"], a["dropout_p"])
    out, lse = _fwd_fake(q, k, v, *rest)
    backward = (out.normal_(), q, k, v, torch.randn_like(out), lse.fill_(20.0), *rest)
    return [(f"{op}_fwd", (q, k, v, *rest)), (f"{op}_bwd", backward)]


def score_tile(kernel: str, constants: dict) -> int | None:
    """Scores of one step of a kernel's inner loop; None for the one that joins the splits."""
    return constants["BM"] * constants["BN"] if "BN" in constants else None


def scores(shape: tuple) -> int:
    """Scores that a pass over every key computes: the tile of queries is filled up."""
    batch, queries, keys, heads = shape[:4]
    return batch * heads * _query_tile(queries) * keys


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: q, k, v read, out and the logsumexp written; the mask read and the list written and read."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * 2 * (queries + keys) + 4 * queries)
    return batch * (values + 9 * keys * masked)


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the gradient, q, k, v, out and the logsumexp read, three gradients written; the list read."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * 4 * (queries + keys) + 4 * queries)
    return batch * (values + 4 * keys * masked)


def flops(shape: tuple) -> int:
    """Two products of B H Q Sk D multiply-adds."""
    return 4 * math.prod(shape[:5])


def flops_bwd(shape: tuple) -> int:
    """Five products."""
    return 10 * math.prod(shape[:5])


def candidates(shape: tuple, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the default of an A100 first. The splits stay
    with ``split_count``, since a bucket has batches of every size."""
    queries, width = shape[1], shape[4]
    tile, out = _query_tile(queries), []
    for kernel in ("fwd", "bwd"):
        tried = [_default(kernel, queries, width, dtype, name) for name in ("a100", "h100")] + [
            {"keys": keys, "second": second, "warps": warps, "stages": stages, "splits": 0}
            for keys in (32, 64, 128)
            for second in ((0, 32) if width == 96 else (0, 64) if width > 96 else (0,))
            for warps in (tile // 16, tile // 8)
            if warps <= 8 and 16 <= tile * keys // (32 * warps) <= 64
            for stages in (1, 2, 3)
        ]
        name = bucket(queries, width, dtype)
        out += [{"op": f"cross_attention_{kernel}", "bucket": name, "parameters": p} for p in tried]
    return out
