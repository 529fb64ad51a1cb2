"""The attribute loss of Visual Genome for all decoder layers at once: cross-entropy of each object's attributes.

Per layer, over the objects n that have a query and k_n > 0 attributes:

    loss = mean_n of scale / k_n sum_slots -log_softmax(logits_n)[attribute of the slot]

a mean over the process, or per image (0 without such objects) and then of the images.

Shapes: L decoder layers, B images, N padded objects, A attributes, M slots. logits [L,B,N,A], of the query of each
object; query int64 [L,B,N] (-1 = none), attributes int64 [B,N,M] (-1 = empty slot; one twice counts twice). Replaces
``log_softmax``, a gather of the slots, masks and means, some 20 operators, and 10 of their backward.

Fused: the forward reads the logits once and keeps a log-sum-exp an object; the backward reads them again and writes
their gradient. Each is one launch: the last program of a layer adds the partial sums of its blocks of objects in a
fixed order (``ticket``). Bytes: the logits once, and in the backward twice; FLOPs: about 5 a logit forward, 5 + M
backward; memory-bound. Limits of the fused path: float32, bfloat16, float16; M <= 64.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.attribute_loss.kernels import (
    SUM_BLOCKS,
    _attribute_loss_bwd_kernel,
    _attribute_loss_fwd_kernel,
)
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.ticket import counters
from unit_fast_kernels.shared.triton import cdiv, power_of_two
from unit_fast_kernels.shared.tuned import candidates_of, launch_parameters
from unit_fast_kernels.shared.validation import (
    NORMALISATIONS,
    check_floating,
    check_int64,
    check_known,
    check_one_device,
    check_shape,
    unfit_dtype,
)

SCALE = 0.5
"""Constant factor of the authors' attribute loss (SPEC quirk 7)."""
MAX_SLOTS = 64


def _slots(query: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(valid bool [L,B,N,M], slots [L,B,N,M] with 0 where not valid, k [L,B,N])."""
    valid = (attributes >= 0) & (query >= 0)[..., None]
    return valid, attributes.clamp(min=0).expand(valid.shape), valid.sum(-1)


def _factors(k: Tensor, normalisation: str, dtype: torch.dtype) -> Tensor:
    """[L,B,N]: what the sum of an object's cross-entropies is multiplied with."""
    counted = (k > 0).to(dtype)
    if normalisation == "per_process":
        number = counted.sum((1, 2), keepdim=True).clamp(min=1)
    else:
        number = counted.sum(2, keepdim=True).clamp(min=1) * k.shape[1]
    return SCALE / (k.clamp(min=1) * number)


def attribute_loss_reference(
    logits: Tensor, query: Tensor, attributes: Tensor, normalisation: str = "per_image", weight: float = 1.0
) -> Tensor:
    """The specification: [L], times ``weight``, in the dtype of the logits, at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    valid, slots, k = _slots(query, attributes)
    ce = -log_p.gather(-1, slots).masked_fill(~valid, 0).sum(-1)
    return weight * (_factors(k, normalisation, wide) * ce).sum((1, 2))


# --- Launchers, their references and fakes ---------------------------------------------------------------------------


def defaults(attributes: int) -> dict[str, int]:
    """Rows and columns of a block, warps: 16 logits to a thread of one warp, so that no row is more than one warp's."""
    block = min(power_of_two(attributes), 512)
    return {"rows": min(16, 512 // block), "block": block, "warps": 1}


def _parameters(op: str, logits: Tensor) -> dict[str, int]:
    width = logits.shape[-1]
    return launch_parameters(op, f"attributes{power_of_two(width)}", defaults(width), logits.device)


def _constants(logits: Tensor, attributes: Tensor, tune: dict[str, int], per_process: bool) -> dict:
    slots = attributes.shape[-1]
    return {
        "A": logits.shape[-1], "SLOTS": slots, "R": tune["rows"], "BLOCK": tune["block"], "MB": power_of_two(slots),
        "NB": max(1, 1024 // power_of_two(slots)) if per_process else 32, "PER_PROCESS": per_process,
        "num_warps": tune["warps"],
    }  # fmt: skip


def _fwd_outputs(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    """loss [L], lse [L,B,N]; float32."""
    return tuple(
        torch.empty(s, dtype=torch.float32, device=logits.device) for s in (logits.shape[:1], logits.shape[:3])
    )


def _fwd_launch(logits, query, attributes, per_process, weight):
    loss, lse = outputs = _fwd_outputs(logits)
    layers, images, objects, _ = logits.shape
    if lse.numel() == 0 or attributes.numel() == 0:
        loss.zero_()
        lse.zero_()
        return outputs
    tune = _parameters("attribute_loss_fwd", logits)
    blocks = cdiv(objects, tune["rows"])
    _attribute_loss_fwd_kernel[(blocks, images, layers)](
        logits.contiguous(),
        query.contiguous(),
        attributes.contiguous(),
        lse,
        torch.empty((layers, images, blocks), dtype=torch.float32, device=logits.device),
        counters(logits, layers),
        loss,
        images,
        objects,
        weight * SCALE,
        **_constants(logits, attributes, tune, per_process),
        SB=SUM_BLOCKS,
    )
    return outputs


def _fwd_reference(logits, query, attributes, per_process, weight):
    loss, lse = _fwd_outputs(logits)
    normalisation = "per_process" if per_process else "per_image"
    found = attribute_loss_reference(logits.float(), query, attributes, normalisation=normalisation, weight=weight)
    return loss.copy_(found), lse.copy_(logits.float().logsumexp(-1))


def _bwd_output(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _bwd_launch(by_loss, logits, query, attributes, lse, per_process, weight):
    dlogits = _bwd_output(logits)
    layers, images, objects, _ = logits.shape
    if logits.numel() == 0 or attributes.numel() == 0:
        return dlogits.zero_()
    tune = _parameters("attribute_loss_bwd", logits)
    _attribute_loss_bwd_kernel[(cdiv(objects, tune["rows"]), images, layers)](
        by_loss.contiguous(),
        logits.contiguous(),
        query.contiguous(),
        attributes.contiguous(),
        lse,
        dlogits,
        images,
        objects,
        weight * SCALE,
        **_constants(logits, attributes, tune, per_process),
    )
    return dlogits


def _bwd_reference(by_loss, logits, query, attributes, lse, per_process, weight):
    valid, slots, k = _slots(query, attributes)
    each = _factors(k, "per_process" if per_process else "per_image", torch.float32)
    each = (weight * each * by_loss[:, None, None])[..., None]
    grad = k[..., None] * (logits.float() - lse[..., None]).exp()
    grad.scatter_add_(-1, slots, -valid.float())
    return _bwd_output(logits).copy_(each * grad)


_forward = register(
    "attribute_loss_fwd",
    "(Tensor logits, Tensor query, Tensor attributes, bool per_process, float weight) -> (Tensor loss, Tensor lse)",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=_fwd_outputs,
)
_backward = register(
    "attribute_loss_bwd",
    "(Tensor by_loss, Tensor logits, Tensor query, Tensor attributes, Tensor lse, bool per_process, float weight) "
    "-> Tensor dlogits",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=lambda by_loss, logits, *_: _bwd_output(logits),
)


# --- The fused operator ---------------------------------------------------------------------------------------------


class _AttributeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, query, attributes, per_process, weight):
        loss, lse = _forward(logits, query, attributes, per_process, weight)
        ctx.save_for_backward(logits, query, attributes, lse)
        ctx.settings = per_process, weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss):
        return _backward(by_loss, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def why_not(logits: Tensor, query: Tensor, attributes: Tensor, *_) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if reason := unfit_dtype(logits=logits):
        return reason
    if attributes.shape[-1] > MAX_SLOTS:
        return f"there are {attributes.shape[-1]} slots: kernels exist for up to {MAX_SLOTS}"
    if max(logits.shape[:2]) > 65535:
        return f"there are {logits.shape[0]} layers of {logits.shape[1]} images: a grid has 65535 of each"
    return None


def attribute_loss_fused(
    logits: Tensor, query: Tensor, attributes: Tensor, normalisation: str = "per_image", weight: float = 1.0
) -> Tensor:
    """``attribute_loss_reference`` by the kernels: float32, the gradient in the dtype of the logits."""
    return _AttributeLoss.apply(logits, query, attributes, normalisation == "per_process", weight)


def validate(
    logits: Tensor, query: Tensor, attributes: Tensor, *, normalisation: str = "per_image", weight: float = 1.0
) -> tuple:
    """Visual Genome's attribute loss for all decoder layers at once: [L].

    logits [L,B,N,A], floating, those of the query of each object, get a gradient; query int64 [L,B,N] (-1 = none);
    attributes int64 [B,N,M] (-1 = empty slot). An object counts if it has a query and attributes, with 0.5 of the mean
    cross-entropy of its attributes; the loss is the mean over the objects that count, ``normalisation`` "per_image"
    (then over images) or "per_process", times ``weight``; zero and still connected where none does. In the dtype of
    the logits, at least float32. ``ValueError`` on arguments that do not fit.
    """
    op = "attribute_loss"
    check_shape(op, "logits", logits, (None,) * 4, "[L,B,N,A]")
    check_shape(op, "query", query, tuple(logits.shape[:3]), "[L,B,N]")
    check_shape(op, "attributes", attributes, (*logits.shape[1:3], None), "[B,N,M]")
    check_floating(op, logits=logits)
    check_int64(op, query=query, attributes=attributes)
    check_one_device(op, logits, query=query, attributes=attributes)
    check_known(op, "normalisation", normalisation, NORMALISATIONS)
    return logits, query, attributes, normalisation, weight


ATTRIBUTE_LOSS = Operator(
    name="attribute_loss",
    validate=validate,
    reference=attribute_loss_reference,
    fused=attribute_loss_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "unit_vg": (6, 8, 20, 401, 16),
    "unit_vg_one_image": (6, 1, 20, 401, 16),
    "crowded": (6, 8, 100, 401, 16),
}
"""(L, B, N, A, M)."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``attribute_loss_fused``: one slot in four holds an attribute, every object has a query."""
    layers, images, objects, attributes, slots = shape
    wanted = torch.randint(0, attributes, (images, objects, slots), device=device)
    wanted.masked_fill_(torch.rand(images, objects, slots, device=device) > 0.25, -1)
    query = torch.rand(layers, images, max(100, objects), device=device).argsort(-1)[..., :objects]
    return {
        "logits": torch.randn(layers, images, objects, attributes, dtype=dtype, device=device),
        "query": query.contiguous(),
        "attributes": wanted,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    inputs = tuple(make(shape, dtype, device).values())
    loss, lse = _fwd_outputs(inputs[0])
    return [
        ("attribute_loss_fwd", (*inputs, False, 1.0)),
        ("attribute_loss_bwd", (torch.ones_like(loss), *inputs, torch.zeros_like(lse), False, 1.0)),
    ]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    attributes = shape[3]
    width = power_of_two(attributes)
    tried = [defaults(attributes)] + [
        {"rows": rows, "block": block, "warps": warps}
        for block in dict.fromkeys(min(width, b) for b in (128, 256, 512))
        for rows in (1, 2, 4, 8, 16, 32)
        for warps in (1, 2, 4, 8, 16)
        if 4 <= rows * block // (32 * warps) <= 32
    ]
    return candidates_of(["attribute_loss_fwd", "attribute_loss_bwd"], f"attributes{width}", tried)


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: logits, query and attributes read, log-sum-exps written."""
    layers, images, objects, attributes, slots = shape
    return layers * images * objects * (attributes * dtype.itemsize + 12) + 8 * images * objects * slots


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the same read, the gradient of the logits written."""
    layers, images, objects, attributes, _ = shape
    return bytes_moved(shape, dtype) + layers * images * objects * attributes * dtype.itemsize


def flops(shape: tuple) -> int:
    """Forward, counted on the formula: 5 a logit."""
    return 5 * shape[0] * shape[1] * shape[2] * shape[3]


def flops_bwd(shape: tuple) -> int:
    """Backward: 5 a logit, and one for each slot."""
    return (5 + shape[4]) * shape[0] * shape[1] * shape[2] * shape[3]
