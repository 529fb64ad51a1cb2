"""Softmax self-attention with a key-padding mask and dropout on the probabilities.

    P = softmax(q k^T / sqrt(D) + mask),  out = dropout(P) v

Shapes: q [B,Sq,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), out [B,Sq,H,D]. A row whose keys are
all masked gives zeros, and zero gradients.

Replaces ``softmax(q @ k.T)``, ``F.dropout`` and ``@ v``, which keep several matrices of B H Sq Sk numbers. Here
they stay in registers; the backward computes them again from the logsumexp [B,H,Sq] and draws the same decisions from
the seed. The kernels run over the real keys alone, wherever they stand
(``_attention_blocks``): padding costs nothing, whether it fills whole tiles or the end of every image row.

Bytes: q, k, v, out once each, forward; twice that and the gradients, backward. FLOPs: 4 B H Sq Sk D forward, 14
backward (two passes, deterministic, each with its own scores). Limits: float32 (exact products), bfloat16, float16;
D <= 128; B H < 2^16; Sq <= 2^17.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.attention.blocks import (
    _key_list_reference,
    attention_keep,
    dropout_unfit,
    key_blocks,
    key_list,
    packed,
)
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.attention.kernels import (
    _attention_bwd_kv_kernel,
    _attention_bwd_q_kernel,
    _attention_fwd_kernel,
)
from unit_fast_kernels.attention.reference import attention_reference
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.random import keep_scale, threshold
from unit_fast_kernels.shared.registration import DTYPES, register
from unit_fast_kernels.shared.triton import INTERPRETING, cdiv, power_of_two
from unit_fast_kernels.shared.tuned import card, launch_parameters
from unit_fast_kernels.shared.validation import check_dropout, check_floating, check_one_device, check_shape, refuse

WIDEST = 128
LOG2E = math.log2(math.e)


# --- Launch parameters ----------------------------------------------------------------------------------------------

# (kernel, padded head) -> by architecture BM, BN, warps, stages, cap of registers (0: none): no spills, then the fewest
# instructions per score. The cap lets three blocks of the forward share a multiprocessor.
_DEFAULTS = {
    ("fwd", 32): {"sm_80": (64, 128, 4, 2, 168), "sm_90": (64, 128, 4, 2, 168)},
    ("fwd", 64): {"sm_80": (64, 128, 4, 2, 0), "sm_90": (64, 128, 4, 2, 0)},
    ("fwd", 128): {"sm_80": (64, 32, 4, 2, 0), "sm_90": (128, 64, 8, 2, 0)},
    ("bwd_q", 32): {"sm_80": (128, 64, 4, 2, 0), "sm_90": (128, 64, 4, 2, 0)},
    ("bwd_q", 64): {"sm_80": (64, 64, 4, 2, 0), "sm_90": (64, 64, 4, 2, 0)},
    ("bwd_q", 128): {"sm_80": (64, 32, 4, 1, 0), "sm_90": (128, 64, 8, 2, 0)},
    ("bwd_kv", 32): {"sm_80": (32, 128, 4, 2, 0), "sm_90": (32, 128, 4, 2, 0)},
    ("bwd_kv", 64): {"sm_80": (32, 64, 4, 1, 0), "sm_90": (32, 64, 4, 2, 0)},
    ("bwd_kv", 128): {"sm_80": (32, 32, 4, 2, 0), "sm_90": (32, 32, 4, 2, 0)},
}
# The same where nothing is dropped, where it differs: the former would spill.
_UNDROPPED = {
    ("fwd", 32): {"sm_80": (64, 128, 4, 2, 0), "sm_90": (64, 128, 4, 2, 0)},
    ("bwd_q", 32): {"sm_80": (128, 64, 8, 2, 0), "sm_90": (128, 64, 4, 2, 0)},
}
_NAMES = ("BM", "BN", "warps", "stages", "registers")


def _padded(width: int) -> int:
    return max(16, power_of_two(width))


def _bucket(width: int, dtype: torch.dtype, dropout_p: float) -> str:
    fp32, drop = "_fp32" if dtype == torch.float32 else "", "_drop" if threshold(dropout_p) else ""
    return f"head{_padded(width)}{fp32}{drop}"


def _default(kernel: str, width: int, dtype: torch.dtype, dropout_p: float, card_name: str) -> dict[str, int]:
    if dtype == torch.float32:  # exact products keep their operands in registers: small tiles for wide heads
        return dict(zip(_NAMES, (16, 32, 8, 1, 0) if _padded(width) > 64 else (32, 32, 4, 1, 0)))
    key = kernel, max(32, _padded(width))
    values = _DEFAULTS[key] if threshold(dropout_p) else _UNDROPPED.get(key, _DEFAULTS[key])
    return dict(zip(_NAMES, values["sm_80" if card_name == "a100" else "sm_90"]))


def _launching(kernel: str, q: Tensor, dropout_p: float) -> tuple[dict, dict]:
    """(blocks, options of the launch) of a kernel."""
    width = q.shape[-1]
    default = _default(kernel, width, q.dtype, dropout_p, card(q.device))
    found = launch_parameters(f"attention_{kernel}", _bucket(width, q.dtype, dropout_p), default, q.device)
    options = {"num_warps": found["warps"], "num_stages": found["stages"], "maxnreg": found["registers"] or None}
    return {"BM": found["BM"], "BN": found["BN"]}, options


# --- Launchers ------------------------------------------------------------------------------------------------------


def _rowwise(x: Tensor | None) -> Tensor | None:
    """x with unit stride in the last dimension."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, order: Tensor | None, p: float) -> dict:
    drop = 0 if threshold(p) == 0 else 2 if packed(q.dtype, p) and not INTERPRETING else 1
    width = q.shape[-1]
    return {"D": width, "DP": _padded(width), "LISTED": order is not None, "DROP": drop, "INTERPRET": INTERPRETING}


def _outer(x: Tensor) -> tuple[int, int]:
    """Strides between batch entries and heads."""
    return x.stride(0), x.stride(2)


def _fwd_launch(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    out, lse = _fwd_fake(q, k, v, order, count, seed, dropout_p)
    batch, queries, heads, width = q.shape
    if q.numel() == 0:
        return out, lse
    q, k, v, seed = _rowwise(q), _rowwise(k), _rowwise(v), _rowwise(seed)
    blocks, options = _launching("fwd", q, dropout_p)
    if order is None:
        options["maxnreg"] = None  # plain addresses take more registers: the cap would spill
    _attention_fwd_kernel[cdiv(queries, blocks["BM"]), batch * heads](
        q, k, v, out, lse, order, count, seed, *q.stride()[:3], *_outer(k), *_outer(v), heads, queries, k.shape[1],
        LOG2E / math.sqrt(width), threshold(dropout_p), keep_scale(dropout_p), K_S=k.stride(1), V_S=v.stride(1),
        **_constants(q, order, dropout_p), **blocks, **options,
    )  # fmt: skip
    return out, lse


def _bwd_launch(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    grads = grad_q, grad_k, grad_v = _bwd_fake(grad, q, k, v, out, lse, order, count, seed, dropout_p)
    batch, queries, heads, width = q.shape
    if q.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    grad, q, k, v, out, seed = (_rowwise(x) for x in (grad, q, k, v, out, seed))
    keys, padded = k.shape[1], cdiv(queries, 16) * 16
    stats = torch.empty(batch * heads, 2, padded, dtype=lse.dtype, device=lse.device)
    scales = (threshold(dropout_p), keep_scale(dropout_p), keep_scale(dropout_p) / math.sqrt(width))
    numbers = (heads, queries, keys, padded, LOG2E / math.sqrt(width), *scales)
    constants = _constants(q, order, dropout_p)
    blocks, options = _launching("bwd_q", q, dropout_p)
    _attention_bwd_q_kernel[cdiv(queries, blocks["BM"]), batch * heads](
        grad, q, k, v, out, lse, order, count, seed, grad_q, stats, *grad.stride()[:3], *q.stride()[:3], *_outer(k),
        *_outer(v), *out.stride()[:3], *numbers, K_S=k.stride(1), V_S=v.stride(1), **constants, **blocks, **options,
    )  # fmt: skip
    if keys == 0:
        return grads
    blocks, options = _launching("bwd_kv", q, dropout_p)
    _attention_bwd_kv_kernel[key_blocks(keys, blocks["BN"]), batch * heads](
        grad, q, k, v, stats, order, count, seed, grad_k, grad_v, *_outer(grad), *_outer(q), *k.stride()[:3],
        *v.stride()[:3], *numbers, Q_S=q.stride(1), G_S=grad.stride(1), **constants, **blocks, **options,
    )  # fmt: skip
    return grads


# --- What the launchers compute, in PyTorch -------------------------------------------------------------------------


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


def _fwd_reference(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    scores, kept = _scores_and_keep(q, k, order, count, seed, dropout_p)
    top = scores.amax(-1, keepdim=True).nan_to_num(nan=math.nan, neginf=0.0) if k.shape[1] else 0.0
    p = (scores - top).exp2()
    total = p.sum(-1, keepdim=True)
    lse = torch.where(total == 0, math.inf, top + total.log2())
    out = torch.einsum("bhqk,bkhd->bqhd", p * kept / torch.where(total == 0, 1.0, total), v.to(scores.dtype))
    return out.to(q.dtype).contiguous(), lse[..., 0].contiguous()


def _bwd_reference(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
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


def _fwd_fake(q, k, v, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    statistics = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, queries, dtype=statistics, device=q.device)


def _bwd_fake(grad, q, k, v, out, lse, order, count, seed, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


# --- Registration ---------------------------------------------------------------------------------------------------

_REST = "Tensor? order, Tensor? count, Tensor? seed, float dropout_p"
_fwd = register(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=_fwd_fake,
)
_bwd = register(
    "attention_bwd",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=_bwd_fake,
)


class _Attention(torch.autograd.Function):
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


def why_not(q: Tensor, *_) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}: the kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if q.shape[-1] > WIDEST:
        return f"heads are {q.shape[-1]} wide: at most {WIDEST}"
    return dropout_unfit(q.shape[0], q.shape[2], q.shape[1])


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``attention_reference`` in one launch, two with a mask (5 us for the list of keys); backward in two more.

    q [B,Sq,H,D], k v [B,Sk,H,D], float32, bfloat16 or float16, D <= 128, any strides (a copy where the head is not
    contiguous); key_padding_mask [B,Sk] bool; seed int64[2] where dropout_p > 0. Returns [B,Sq,H,D]. What is dropped:
    ``attention_keep(B, H, Sq, Sk, dropout_p, seed, key_padding_mask)``. Arguments are checked in ``ops.attention``.
    """
    return _Attention.apply(q, k, v, key_padding_mask, dropout_p, seed)


# --- The operator ----------------------------------------------------------------------------------------------------


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple:
    """softmax(q k^T / sqrt(D)) v with dropout on the probabilities.

    q [B,Sq,H,D], k v [B,Sk,H,D], any strides, one floating dtype; key_padding_mask [B,Sk] bool (True = ignore); seed
    int64[2] where dropout_p > 0: the same seed drops the same. Returns [B,Sq,H,D]; rows whose keys are all masked are
    zero. ``ValueError`` on arguments that do not fit.
    """
    return validated("attention", q, k, v, key_padding_mask, dropout_p, seed)


def validated(op: str, q, k, v, key_padding_mask, dropout_p, seed) -> tuple:
    """The arguments, checked, of ``attention`` or another operator with its arguments."""
    check_shape(op, "q", q, (None,) * 4, "[B,Sq,H,D]")
    batch, _, heads, width = q.shape
    check_shape(op, "k", k, (batch, None, heads, width), "[B,Sk,H,D]")
    check_shape(op, "v", v, tuple(k.shape), "[B,Sk,H,D], as k")
    check_floating(op, q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        refuse(op, "q, k, v", f"{q.dtype}, {k.dtype}, {v.dtype}", "give them one dtype")
    if key_padding_mask is not None:
        check_shape(op, "key_padding_mask", key_padding_mask, tuple(k.shape[:2]), "[B,Sk]")
        if key_padding_mask.dtype != torch.bool:
            refuse(op, "key_padding_mask", key_padding_mask.dtype, "it must be bool, True = ignore")
    check_one_device(op, q, k=k, v=v, key_padding_mask=key_padding_mask)
    check_dropout(op, dropout_p, seed)
    return q, k, v, key_padding_mask, dropout_p, seed


ATTENTION = Operator(
    name="attention",
    validate=validate,
    reference=attention_reference,
    cpu=attention_cpu,
    fused=attention_fused,
    why_not=why_not,
)


# --- Shapes and work ------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple] = {
    "unit_encoder": (2, 4201, 4201, 8, 32, True, 0.1),
    "unit_encoder_eval": (2, 4201, 4201, 8, 32, True, 0.0),
    "unit_decoder": (2, 100, 100, 8, 96, False, 0.1),
    "detr_r50_encoder": (2, 1050, 1050, 8, 32, True, 0.1),
    "bert_base": (8, 128, 128, 12, 64, True, 0.1),
    "head128": (2, 1024, 1024, 8, 128, True, 0.1),
}
"""B, Sq, Sk, H, D, whether there is a mask, dropout_p."""
_ROW = 42


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``attention_fused``: q and k are slices of one product; the last batch entry is padded like an image
    of four fifths of the width, at the end of each row of 42 keys."""
    batch, queries, keys, heads, width, masked, dropout_p = shape
    packed_qk = torch.randn(batch, max(queries, keys), 2, heads, width, dtype=dtype, device=device)
    mask = None
    if masked:
        mask = torch.zeros(batch, keys, dtype=torch.bool, device=device)
        mask[-1] = torch.arange(keys, device=device) % _ROW >= _ROW * 4 // 5
    return {
        "q": packed_qk[:, :queries, 0],
        "k": packed_qk[:, :keys, 1],
        "v": torch.randn(batch, keys, heads, width, dtype=dtype, device=device),
        "key_padding_mask": mask,
        "dropout_p": dropout_p,
        "seed": torch.tensor([1234567890123, -42], device=device) if dropout_p else None,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    a = make(shape, dtype, device)
    mask = a["key_padding_mask"]
    order, count = (None, None) if mask is None else _key_list_reference(mask)
    q, k, v, rest = a["q"], a["k"], a["v"], (order, count, a["seed"], a["dropout_p"])
    out, lse = _fwd_fake(q, k, v, *rest)
    listed = [] if mask is None else [("attention_key_list", (mask,))]
    return [
        *listed,
        ("attention_fwd", (q, k, v, *rest)),
        ("attention_bwd", (out.normal_(), q, k, v, torch.randn_like(out), lse.fill_(20.0), *rest)),
    ]


def score_tile(kernel: str, constants: dict) -> int | None:
    """Scores of one step of a kernel's inner loop."""
    return constants["BM"] * constants["BN"] if "BN" in constants else None


def scores(shape: tuple) -> int:
    """Scores of a pass over every key."""
    batch, queries, keys, heads = shape[:4]
    return batch * heads * queries * keys


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: q, k, v read, out and the logsumexp written; the mask read and the list written and read."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * 2 * (queries + keys) + 4 * queries)
    return batch * (values + 9 * keys * masked)


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the gradient, out and the logsumexp read once, q, k, v twice, three gradients written."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * (6 * queries + 6 * keys) + 20 * queries)
    return batch * (values + 8 * keys * masked)


def flops(shape: tuple) -> int:
    """Two products of B H Sq Sk D multiply-adds."""
    return 4 * scores(shape) * shape[4]


def flops_bwd(shape: tuple) -> int:
    """Five products; the kernels do seven."""
    return 10 * scores(shape) * shape[4]


def candidates(shape: tuple, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the default of an A100 first."""
    width, dropout_p, out = shape[4], shape[6], []
    bucket = _bucket(width, dtype, dropout_p)
    for kernel in ("fwd", "bwd_q", "bwd_kv"):
        tried = [_default(kernel, width, dtype, dropout_p, name) for name in ("a100", "h100")] + [
            dict(zip(_NAMES, (rows, columns, warps, stages, registers)))
            for rows, columns in ((32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
            for warps in (4, 8)
            if 32 <= rows * columns // (32 * warps) <= 64
            for stages in (1, 2, 3)
            for registers in ((0, 128, 168) if warps == 4 else (0, 128))
        ]
        out += [{"op": f"attention_{kernel}", "bucket": bucket, "parameters": p} for p in tried]
    return out
