"""Softmax attention with a key-padding mask and dropout on the probabilities.

    P = softmax(q k^T / sqrt(D) + mask),  out = dropout(P) v

Shapes: q [B,Sq,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), out [B,Sq,H,D]. A row whose keys are
all masked gives zeros, and zero gradients.

Replaces ``softmax(q @ k.T)``, ``F.dropout`` and ``@ v``, which keep several matrices of B H Sq Sk numbers. Here they
stay in registers; saved for the backward are out, the logsumexp [B,H,Sq] and the list of real keys: it computes the
probabilities again and draws the same decisions from the seed. The kernels run over the real keys alone, wherever they
stand (``blocks``): padding costs nothing, whether it fills whole tiles or the end of every image row.

Two regimes (``parameters.splits_keys``). In tiles of queries (``kernels``: self-attention), the backward has one pass
for q and one for k and v. With the keys split over programs (``split_kernels``: few queries over many keys, the
decoder's cross-attention) k and v are read once each way, dk and dv written once, and only the parts of out (each with
its logsumexp) and of dq are joined, in the order of the splits. Both are deterministic.

Bytes: q, k, v, out once each, forward; those and the gradients, backward, in tiles twice. FLOPs: 4 B H Sq Sk D forward,
10 backward (14 in tiles: each pass has its own scores). Limits: float32 (exact products), bfloat16, float16; D <= 128;
B H < 2^16; Sq <= 2^17.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from unit_fast_kernels.attention.blocks import dropout_unfit, key_list_reference
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.attention.launch import attention_fused, fwd_fake
from unit_fast_kernels.attention.parameters import candidates as candidates
from unit_fast_kernels.attention.parameters import query_tile, splits_keys
from unit_fast_kernels.attention.reference import attention_reference
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import DTYPES
from unit_fast_kernels.shared.validation import check_dropout, check_floating, check_one_device, check_shape, refuse

WIDEST = 128


def _validate(op: str) -> Callable[..., tuple]:
    def validate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple:
        """softmax(q k^T / sqrt(D)) v with dropout on the probabilities.

        q [B,Sq,H,D], k v [B,Sk,H,D], any strides, one floating dtype; key_padding_mask [B,Sk] bool (True = ignore);
        seed int64[2] where dropout_p > 0: the same seed drops the same. Returns [B,Sq,H,D]; rows whose keys are all
        masked are zero. ``ValueError`` on arguments that do not fit. ``attention`` and ``cross_attention`` are two
        names of one operator: its launcher splits the keys where the queries are few.
        """
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

    return validate


def _why_not(q: Tensor, *_) -> str | None:
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}: the kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    if q.shape[-1] > WIDEST:
        return f"heads are {q.shape[-1]} wide: at most {WIDEST}"
    return dropout_unfit(q.shape[0], q.shape[2], q.shape[1])


def _declared(name: str) -> Operator:
    return Operator(
        name=name,
        validate=_validate(name),
        reference=attention_reference,
        cpu=attention_cpu,
        fused=attention_fused,
        why_not=_why_not,
    )


ATTENTION, CROSS_ATTENTION = _declared("attention"), _declared("cross_attention")


# --- Shapes and work ------------------------------------------------------------------------------------------------

SELF_SHAPES: dict[str, tuple[int, int, int, int, int, bool, float]] = {
    "unit_encoder": (2, 4201, 4201, 8, 32, True, 0.1),
    "unit_encoder_eval": (2, 4201, 4201, 8, 32, True, 0.0),
    "unit_decoder": (2, 100, 100, 8, 96, False, 0.1),
    "detr_r50_encoder": (2, 1050, 1050, 8, 32, True, 0.1),
    "bert_base": (8, 128, 128, 12, 64, True, 0.1),
    "head128": (2, 1024, 1024, 8, 128, True, 0.1),
}
"""B, Sq, Sk, H, D, whether there is a mask, dropout_p."""
CROSS_SHAPES: dict[str, tuple[int, int, int, int, int, bool, float]] = {
    "unit_detection": (2, 100, 4200, 8, 96, True, 0.1),
    "unit_detection_b8": (8, 100, 4200, 8, 96, True, 0.1),
    "unit_detection_eval": (2, 100, 4200, 8, 96, True, 0.0),
    "unit_vqa": (2, 25, 4225, 8, 96, True, 0.1),
    "unit_vqa_b8": (8, 25, 4225, 8, 96, True, 0.1),
    "detr_r50": (2, 100, 1050, 8, 32, True, 0.1),
    "cross_head64": (2, 100, 1050, 8, 64, True, 0.1),
    "cross_head128": (2, 100, 1050, 8, 128, False, 0.1),
}
SHAPES = SELF_SHAPES | CROSS_SHAPES
_LAYERS, _ROW = 6, 42


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``attention_fused``. The last batch entry is padded like an image of four fifths of the width, at
    the end of each row of 42 keys. With as many keys as queries, q and k are slices of one product; else k and v are
    those of products over six layers."""
    batch, queries, keys, heads, width, masked, dropout_p = shape
    options = {"dtype": dtype, "device": device}
    if queries == keys:
        q, k = torch.randn(batch, keys, 2, heads, width, **options).unbind(2)
        v = torch.randn(batch, keys, heads, width, **options)
    else:
        k, v = (torch.randn(batch, keys, _LAYERS, heads, width, **options)[:, :, 2] for _ in range(2))
        q = torch.randn(batch, queries, heads, width, **options)
    mask = None
    if masked:
        mask = torch.zeros(batch, keys, dtype=torch.bool, device=device)
        mask[-1] = torch.arange(keys, device=device) % _ROW >= _ROW * 4 // 5
    seed = torch.tensor([1234567890123, -42], device=device) if dropout_p else None
    return {"q": q, "k": k, "v": v, "key_padding_mask": mask, "dropout_p": dropout_p, "seed": seed}


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    q, k, v, mask, dropout_p, seed = make(shape, dtype, device).values()
    listed, order, count = [], None, None
    if mask is not None:
        listed = [("attention_key_list", (mask,))]
        order, count = key_list_reference(mask)
    rest = order, count, seed, dropout_p
    out, lse = fwd_fake(q, k, v, *rest)
    backward = (out.normal_(), q, k, v, torch.randn_like(out), lse.fill_(20.0), *rest)
    return [*listed, ("attention_fwd", (q, k, v, *rest)), ("attention_bwd", backward)]


def score_tile(kernel: str, constants: dict) -> int | None:
    """Scores of one step of a kernel's inner loop; None for those that have none."""
    return constants["BM"] * constants["BN"] if "BN" in constants else None


def scores(shape: tuple) -> int:
    """Scores that a pass over every key computes: with split keys the tile of queries is filled up."""
    batch, queries, keys, heads = shape[:4]
    if splits_keys(queries, keys, torch.bfloat16):
        queries = query_tile(queries)
    return batch * heads * queries * keys


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: q, k, v read, out and the logsumexp written; the mask read and the list written and read."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * 2 * (queries + keys) + 4 * queries)
    return batch * (values + 9 * keys * masked)


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the gradient, q, k, v, out and the logsumexp read, three gradients written; the list read. In tiles q,
    k, v and the list twice, with a float32 pair for every query written between the passes and read."""
    batch, queries, keys, heads, width, masked, _ = shape
    values = heads * (width * dtype.itemsize * 4 * (queries + keys) + 4 * queries) + 4 * keys * masked
    if not splits_keys(queries, keys, torch.bfloat16):
        values += heads * (width * dtype.itemsize * 2 * (queries + keys) + 16 * queries) + 4 * keys * masked
    return batch * values


def flops(shape: tuple) -> int:
    """Two products of B H Sq Sk D multiply-adds."""
    return 4 * math.prod(shape[:5])


def flops_bwd(shape: tuple) -> int:
    """Five products; in tiles the kernels do seven."""
    return 10 * math.prod(shape[:5])
