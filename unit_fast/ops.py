"""The public operators: validate, choose an implementation, call. The only door to the kernels.

An operator has a ``reference`` (its specification, plain PyTorch) and may have ``cpu`` (same result, fast on a CPU) and
``fused`` (Triton). ``UNIT_FAST_KERNELS=auto|fused|reference``, or ``with kernels("fused"):``, chooses:

- ``auto``: fused on CUDA where it supports the arguments, cpu on a CPU, else the reference;
- ``fused``: fused on CUDA, under Triton's interpreter (``TRITON_INTERPRET=1``) and on fake tensors; else it raises;
- ``reference``: the reference everywhere.

What was taken, and why, is logged once. Arguments that do not fit raise ``ValueError`` with the operator's and the
argument's name and the remedy.
"""

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from unit_fast_kernels import adamw as _adamw
from unit_fast_kernels.adamw import Tables, adamw_fused, adamw_unfit
from unit_fast_kernels.adamw import step as _adamw_step
from unit_fast_kernels.adamw.cpu import adamw_cpu, adamw_cpu_unfit
from unit_fast_kernels.adamw.step import Stats, Step, adamw_reference
from unit_fast_kernels.assignment import assignment_fused, assignment_reference, assignment_unfit
from unit_fast_kernels.attention import attention_fused, attention_reference, attention_unfit
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.attribute_loss import attribute_loss_fused, attribute_loss_reference, attribute_loss_unfit
from unit_fast_kernels.bias_act_dropout import (
    ACTIVATIONS,
    bias_act_dropout_cpu,
    bias_act_dropout_fused,
    bias_act_dropout_reference,
    bias_act_dropout_unfit,
)
from unit_fast_kernels.cross_attention import (
    cross_attention_fused,
    cross_attention_reference,
    cross_attention_unfit,
)
from unit_fast_kernels.dropout import dropout_cpu, dropout_fused, dropout_reference, dropout_unfit
from unit_fast_kernels.frozen_bn_act import frozen_bn_act_fused, frozen_bn_act_reference, frozen_bn_act_unfit
from unit_fast_kernels.match_cost import (
    match_cost_cpu,
    match_cost_fused,
    match_cost_reference,
    match_cost_unfit,
    pairwise_giou,
)
from unit_fast_kernels.residual_norm import (
    residual_norm_cpu,
    residual_norm_fused,
    residual_norm_reference,
    residual_norm_unfit,
)
from unit_fast_kernels.set_loss import NORMALISATIONS, set_loss_fused, set_loss_reference, set_loss_unfit
from unit_fast_kernels.set_loss.cpu import set_loss_cpu
from unit_fast_kernels.shared import ticket as _ticket
from unit_fast_kernels.shared import triton as _triton
from unit_fast_kernels.shared.capture import graph_memory as graph_memory

from unit_fast.errors import UserError, nearest

adamw_step = _adamw_step
"""What ``MaskedAdamW`` shares with its kernels."""
MODES = ("auto", "fused", "reference")
_IMPLEMENTATIONS = {
    "attention": {"reference": attention_reference, "cpu": attention_cpu, "fused": attention_fused},
    "cross_attention": {"reference": cross_attention_reference, "cpu": attention_cpu, "fused": cross_attention_fused},
    "dropout": {"reference": dropout_reference, "cpu": dropout_cpu, "fused": dropout_fused},
    "residual_norm": {"reference": residual_norm_reference, "cpu": residual_norm_cpu, "fused": residual_norm_fused},
    "bias_act_dropout": {
        "reference": bias_act_dropout_reference,
        "cpu": bias_act_dropout_cpu,
        "fused": bias_act_dropout_fused,
    },
    "frozen_bn_act": {"reference": frozen_bn_act_reference, "fused": frozen_bn_act_fused},
    "match_cost": {"reference": match_cost_reference, "cpu": match_cost_cpu, "fused": match_cost_fused},
    "giou": {"reference": pairwise_giou},
    "assignment": {"reference": assignment_reference, "fused": assignment_fused},
    "set_loss": {"reference": set_loss_reference, "cpu": set_loss_cpu, "fused": set_loss_fused},
    "attribute_loss": {"reference": attribute_loss_reference, "fused": attribute_loss_fused},
    "adamw": {"reference": adamw_reference, "cpu": adamw_cpu, "fused": adamw_fused},
}
_log = logging.getLogger("unit_fast.ops")
_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("unit_fast_kernels", default=None)
_logged: set[tuple[str, str, str]] = set()


# --- Which implementation -------------------------------------------------------------------------------------------


def mode() -> str:
    """The mode in force: the innermost ``kernels(...)`` block, else ``UNIT_FAST_KERNELS``, else ``auto``."""
    return _mode.get() or _checked(os.environ.get("UNIT_FAST_KERNELS", "auto"))


def _checked(name: str) -> str:
    if name not in MODES:
        raise UserError(f"UNIT_FAST_KERNELS: {name!r} is not a mode; {nearest(name, MODES)}")
    return name


@contextlib.contextmanager
def kernels(name: str):
    """Within the block operators run as ``name`` says: ``auto``, ``fused`` or ``reference``."""
    token = _mode.set(_checked(name))
    try:
        yield
    finally:
        _mode.reset(token)


class Implementation(NamedTuple):
    """A row of ``implementations()``."""

    op: str
    implementations: tuple[str, ...]
    """What exists."""
    taken: str
    """What a call would take now."""
    why: str


def _choose(op: str, device_type: str, unfit: Callable[[], str | None] = lambda: None, fake: bool = False):
    """(implementation, reason) of ``op``; ``unfit`` says why its kernels cannot take the arguments, or None."""
    known, now = _IMPLEMENTATIONS[op], mode()
    if now == "reference":
        return "reference", "the mode is reference"
    if len(known) == 1:
        return "reference", "the only one"
    if "fused" in known and (now == "fused" or device_type == "cuda"):
        why_not = unfit()
        if why_not is None and device_type != "cuda" and not (_triton.INTERPRETING or fake):
            why_not = f"tensors are on {device_type}: move them to CUDA, or start Python with TRITON_INTERPRET=1"
        if why_not is None:
            return "fused", f"tensors on {device_type}"
        if now == "fused":
            raise ValueError(f"{op}: the mode is fused, but {why_not}")
        return "reference", why_not
    if device_type in known:
        return device_type, f"tensors on {device_type}"
    return "reference", f"no other for {device_type}"


def implementations(device_type: str = "cpu") -> list[Implementation]:
    """Every operator: what exists, what a call with tensors on ``device_type`` that fit takes now, and why."""
    return [Implementation(op, tuple(known), *_choose(op, device_type)) for op, known in _IMPLEMENTATIONS.items()]


def _implementation(op: str, tensor: Tensor, unfit: Callable[[], str | None] = lambda: None):
    name, why = _choose(op, tensor.device.type, unfit, isinstance(tensor, FakeTensor))
    _say(op, name, why)
    return _IMPLEMENTATIONS[op][name]


def _say(op: str, name: str, why: str) -> None:
    """Log what was taken, once."""
    if (op, name, why) not in _logged:
        _logged.add((op, name, why))
        _log.info("%s: %s (%s)", op, name, why)


def fuses(op: str, x: Tensor) -> bool:
    """Whether ``op`` would run its kernels on a tensor like x, "bias_act_dropout" or "frozen_bn_act".

    A product or convolution before it then leaves its bias to the kernel, which adds it in passing and sums its
    gradient likewise; elsewhere the product adds it for nothing. ``ValueError`` as the operator.
    """
    unfit = {
        "bias_act_dropout": lambda: bias_act_dropout_unfit(x, None),
        "frozen_bn_act": lambda: frozen_bn_act_unfit(x),
    }
    return _choose(op, x.device.type, unfit[op], isinstance(x, FakeTensor))[0] == "fused"


# --- Checks ---------------------------------------------------------------------------------------------------------


def _fail(op: str, argument: str, found, remedy: str):
    raise ValueError(f"{op}: {argument} is {found}; {remedy}")


def _shape(op: str, argument: str, tensor: Tensor, expected: tuple, legend: str) -> None:
    """``expected`` holds sizes, None for any."""
    if tensor.dim() != len(expected) or any(e not in (None, n) for e, n in zip(expected, tensor.shape)):
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        _fail(op, argument, f"of shape {list(tensor.shape)}", f"it must be {legend} = [{sizes}]")


def _floating(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if not tensor.is_floating_point():
            _fail(op, argument, tensor.dtype, "it must be floating point: convert it with .float()")


def _int64(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            _fail(op, argument, tensor.dtype, "it must be int64: convert it with .long()")


def _integer(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            _fail(op, argument, tensor.dtype, "it must be an integer tensor")


def _normalisation(op: str, normalisation: str) -> None:
    if normalisation not in NORMALISATIONS:
        _fail(op, "normalisation", repr(normalisation), nearest(normalisation, NORMALISATIONS))


def _one_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            _fail(op, argument, f"on {tensor.device}", f"move it to {first.device}, where the other tensors are")


def _dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        _fail(op, "dropout_p", dropout_p, "it must be at least 0 and below 1")
    if dropout_p > 0.0:
        if seed is None:
            _fail(op, "seed", "None", "with dropout_p > 0 it must be an int64 tensor of two numbers, drawn once a step")
        if seed.dtype != torch.int64 or seed.shape != (2,):
            _fail(op, "seed", f"{seed.dtype} of shape {list(seed.shape)}", "it must be int64 of shape [2]")


# --- Operators ------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with dropout on the probabilities.

    q [B,Sq,H,D], k v [B,Sk,H,D], any strides, one floating dtype; key_padding_mask [B,Sk] bool (True = ignore); seed
    int64[2] where dropout_p > 0: the same seed drops the same. Returns [B,Sq,H,D]; rows whose keys are all masked are
    zero. ``ValueError`` on arguments that do not fit.
    """
    return _attention("attention", attention_unfit, q, k, v, key_padding_mask, dropout_p, seed)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``attention`` for few queries and many keys (the decoder's)."""
    return _attention("cross_attention", cross_attention_unfit, q, k, v, key_padding_mask, dropout_p, seed)


def _attention(op, unfit, q, k, v, key_padding_mask, dropout_p, seed) -> Tensor:
    _shape(op, "q", q, (None,) * 4, "[B,Sq,H,D]")
    batch, _, heads, width = q.shape
    _shape(op, "k", k, (batch, None, heads, width), "[B,Sk,H,D]")
    _shape(op, "v", v, tuple(k.shape), "[B,Sk,H,D], as k")
    _floating(op, q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        _fail(op, "q, k, v", f"{q.dtype}, {k.dtype}, {v.dtype}", "give them one dtype")
    if key_padding_mask is not None:
        _shape(op, "key_padding_mask", key_padding_mask, tuple(k.shape[:2]), "[B,Sk]")
        if key_padding_mask.dtype != torch.bool:
            _fail(op, "key_padding_mask", key_padding_mask.dtype, "it must be bool, True = ignore")
    _one_device(op, q, k=k, v=v, key_padding_mask=key_padding_mask)
    _dropout(op, dropout_p, seed)
    arguments = q, k, v, key_padding_mask, dropout_p, seed
    return _implementation(op, q, lambda: unfit(*arguments))(*arguments)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x with elements zeroed with probability dropout_p and the rest scaled by 1/(1 - p_eff), |p_eff - p| <= 2^-17.

    x of any shape, floating; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not fit.
    """
    _floating("dropout", x=x)
    _dropout("dropout", dropout_p, seed)
    return _implementation("dropout", x, lambda: dropout_unfit(x))(x, dropout_p, seed)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    pos: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, y + pos) with y = LayerNorm(x + dropout(branch)); the second is None without ``pos``.

    x, branch [...,C], floating, of dtypes that may differ (float32 stream, bfloat16 branch); weight, bias [C]; pos
    broadcasts to x; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not fit.
    """
    op = "residual_norm"
    _shape(op, "branch", branch, tuple(x.shape), "the shape of x")
    _shape(op, "weight", weight, tuple(x.shape[-1:]), "[C]")
    _shape(op, "bias", bias, tuple(x.shape[-1:]), "[C]")
    _floating(op, x=x, branch=branch, weight=weight, bias=bias)
    if pos is not None and (
        pos.dim() > x.dim() or any(p not in (1, n) for p, n in zip(reversed(pos.shape), reversed(x.shape)))
    ):
        _fail(op, "pos", f"of shape {list(pos.shape)}", f"it must broadcast to x, {list(x.shape)}")
    _one_device(op, x, branch=branch, weight=weight, bias=bias, pos=pos)
    _dropout(op, dropout_p, seed)
    chosen = _implementation(op, x, lambda: residual_norm_unfit(x, branch, weight, bias, pos))
    return chosen(x, branch, weight, bias, eps, dropout_p, pos, seed)


def bias_act_dropout(
    x: Tensor, bias: Tensor | None, act: str, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """dropout(act(x + bias)); act is ``relu`` or ``gelu`` (erf).

    x [...,C], floating; bias [C] or None; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not
    fit.
    """
    op = "bias_act_dropout"
    if act not in ACTIVATIONS:
        _fail(op, "act", repr(act), nearest(act, ACTIVATIONS))
    _floating(op, x=x)
    if bias is not None:
        _shape(op, "bias", bias, tuple(x.shape[-1:]), "[C]")
        _one_device(op, x, bias=bias)
    _dropout(op, dropout_p, seed)
    return _implementation(op, x, lambda: bias_act_dropout_unfit(x, bias))(x, bias, act, dropout_p, seed)


def frozen_bn_act(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu(x * scale + shift + residual): a frozen batch norm with what follows it, one pass over a feature map.

    x, residual [B,C,H,W], floating, channels last where it shall be fast; scale (None: 1), shift [C] constants that get
    no gradient. The result has the wider dtype of x and residual. ``ValueError`` on arguments that do not fit.
    """
    op = "frozen_bn_act"
    _shape(op, "x", x, (None,) * 4, "[B,C,H,W]")
    _floating(op, x=x)
    for argument, constant in (("scale", scale), ("shift", shift)):
        if constant is not None:
            _shape(op, argument, constant, (x.shape[1],), "[C]")
            _floating(op, **{argument: constant})
            if constant.requires_grad:
                _fail(op, argument, "a tensor that requires a gradient", "it gets none here: detach it")
    if residual is not None:
        _shape(op, "residual", residual, tuple(x.shape), "the shape of x")
        _floating(op, residual=residual)
    _one_device(op, x, scale=scale, shift=shift, residual=residual)
    chosen = _implementation(op, x, lambda: frozen_bn_act_unfit(x, scale, shift, residual))
    return chosen(x, scale, shift, residual, relu)


def match_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, counts: Tensor, **weights
) -> Tensor:
    """Matching cost [L,B,Q,N] of DETR for all layers and images, each with its own image's targets. No gradient.

    logits [L,B,Q,K]; boxes [L,B,Q,4] and target_boxes [B,N,4] cx cy w h; labels [B,N] int64, -1 on padding; counts [B]
    real targets. ``weights``: cost_class 1, cost_bbox 5, cost_giou 2, log_softmax False. Columns at and beyond counts
    are zero. At least float32; strides may be those of [L,B,N,Q]. ``ValueError`` on arguments that do not fit.
    """
    op = "match_cost"
    _shape(op, "logits", logits, (None,) * 4, "[L,B,Q,K]")
    layers, batch, queries, _ = logits.shape
    _shape(op, "boxes", boxes, (layers, batch, queries, 4), "[L,B,Q,4]")
    _shape(op, "labels", labels, (batch, None), "[B,N]")
    _shape(op, "target_boxes", target_boxes, (batch, labels.shape[1], 4), "[B,N,4]")
    _shape(op, "counts", counts, (batch,), "[B]")
    _floating(op, logits=logits, boxes=boxes, target_boxes=target_boxes)
    _integer(op, labels=labels, counts=counts)
    _one_device(op, logits, boxes=boxes, labels=labels, target_boxes=target_boxes, counts=counts)
    arguments = logits, boxes, labels, target_boxes, counts
    with torch.no_grad():
        return _implementation(op, logits, lambda: match_cost_unfit(*arguments))(*arguments, **weights)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes (cx, cy, w, h) ``a`` and ``b``, broadcast against each other: [...,4] -> [...]."""
    for argument, boxes in (("a", a), ("b", b)):
        if boxes.dim() == 0 or boxes.shape[-1] != 4:
            _fail("giou", argument, f"of shape {list(boxes.shape)}", "it must be boxes [...,4] cx, cy, w, h")
    return _implementation("giou", a)(a, b)


def assignment(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Exact batched assignment: the cheapest one-to-one pairing of queries and targets in each of P problems.

    For any DETR: what ``scipy.optimize.linear_sum_assignment`` does image by image, ties included, for all images and
    decoder layers at once. On CUDA one launch, and the host reads nothing, so that a graph can hold it.

    cost [P,Q,T] floating, any strides, of which problem p uses the first counts[p] columns; counts [P] integer, 0..T
    (on CUDA a count outside is taken as the nearest of these). Returns query [P,T] int64: the query of each target, -1
    beyond counts, and for the targets left over where there are more than Q; flag [P] int32: 1 where the problem held
    non-finite costs, which count as dearer than every finite one. No gradient.

    With cost [L,B,Q,T] and counts [B] for L layers of the same B images the results are [L,B,T] and [L,B].
    ``ValueError`` on arguments that do not fit.
    """
    op = "assignment"
    layered = cost.dim() == 4
    _shape(op, "cost", cost, (None,) * (4 if layered else 3), "[P,Q,T]")
    _shape(op, "counts", counts, tuple(cost.shape[-3:-2]), "[B]" if layered else "[P]")
    _floating(op, cost=cost)
    _integer(op, counts=counts)
    _one_device(op, cost, counts=counts)
    problems = cost.flatten(0, 1) if layered else cost
    query, flag = _implementation(op, cost, lambda: assignment_unfit(problems, counts))(problems, counts)
    return (query.unflatten(0, cost.shape[:2]), flag.unflatten(0, cost.shape[:2])) if layered else (query, flag)


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: Tensor,
    num_boxes: Tensor,
    *,
    no_object: int,
    no_object_weight: float = 0.1,
    normalisation: str = "per_image",
    balanced: bool = False,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DETR's losses of matched queries for all decoder layers at once: (ce, bbox, giou, cardinality), each [L].

    logits [L,B,Q,K] and boxes [L,B,Q,4] (cx cy w h), floating, get gradients; query int64 [L,B,N], the query of each
    object or -1, no query twice in an image, as ``assignment`` gives it; labels int64 [B,N] and target_boxes [B,N,4],
    of which only objects with a query count; counts integer [B], real objects, for cardinality alone; num_boxes a
    floating scalar on the device, at least 1.

    ce is the cross-entropy, with class ``no_object`` for queries without an object: a mean weighted 1 and
    ``no_object_weight``, ``normalisation`` "per_image" (then over images) or "per_process"; or ``balanced``: 0.9 of
    the objects' sum over num_boxes and 0.1 of the others' over their number. bbox and giou are the sums of L1 distance
    and 1 - GIoU over num_boxes, zero and still connected without objects. The three are multiplied with ``weights``.
    cardinality is |queries that predict an object - counts|, the mean over images, without gradient. In the dtype of
    the logits, at least float32; gradients in the dtypes of logits and boxes. ``ValueError`` on arguments that do not
    fit.
    """
    op = "set_loss"
    _shape(op, "logits", logits, (None,) * 4, "[L,B,Q,K]")
    layers, images, queries, classes = logits.shape
    if logits.numel() == 0:
        _fail(op, "logits", f"of shape {list(logits.shape)}", "there is no loss of nothing: no size may be 0")
    _shape(op, "boxes", boxes, (layers, images, queries, 4), "[L,B,Q,4]")
    _shape(op, "query", query, (layers, images, None), "[L,B,N]")
    _shape(op, "labels", labels, (images, query.shape[2]), "[B,N]")
    _shape(op, "target_boxes", target_boxes, (images, query.shape[2], 4), "[B,N,4]")
    _shape(op, "counts", counts, (images,), "[B]")
    _shape(op, "num_boxes", num_boxes, (), "a scalar")
    _floating(op, logits=logits, boxes=boxes, target_boxes=target_boxes, num_boxes=num_boxes)
    _int64(op, query=query, labels=labels)
    _integer(op, counts=counts)
    tensors = {"boxes": boxes, "query": query, "labels": labels, "target_boxes": target_boxes, "counts": counts}
    _one_device(op, logits, **tensors, num_boxes=num_boxes)
    if not 0 <= no_object < classes:
        _fail(op, "no_object", no_object, f"it must be one of the {classes} classes")
    _normalisation(op, normalisation)
    chosen = _implementation(op, logits, lambda: set_loss_unfit(logits, boxes, target_boxes))
    return chosen(
        logits, boxes, query, labels, target_boxes, counts, num_boxes, no_object=no_object,
        no_object_weight=no_object_weight, normalisation=normalisation, balanced=balanced, weights=weights,
    )  # fmt: skip


def attribute_loss(
    logits: Tensor, query: Tensor, attributes: Tensor, *, normalisation: str = "per_image", weight: float = 1.0
) -> Tensor:
    """Visual Genome's attribute loss for all decoder layers at once: [L].

    logits [L,B,N,A], floating, those of the query of each object, get a gradient; query int64 [L,B,N] (-1 = none);
    attributes int64 [B,N,M] (-1 = empty slot). An object counts if it has a query and attributes, with 0.5 of the mean
    cross-entropy of its attributes; the loss is the mean over the objects that count, ``normalisation`` "per_image"
    (then over images) or "per_process", times ``weight``; zero and still connected where none does. In the dtype of
    the logits, at least float32. ``ValueError`` on arguments that do not fit.
    """
    op = "attribute_loss"
    _shape(op, "logits", logits, (None,) * 4, "[L,B,N,A]")
    _shape(op, "query", query, tuple(logits.shape[:3]), "[L,B,N]")
    _shape(op, "attributes", attributes, (*logits.shape[1:3], None), "[B,N,M]")
    _floating(op, logits=logits)
    _int64(op, query=query, attributes=attributes)
    _one_device(op, logits, query=query, attributes=attributes)
    _normalisation(op, normalisation)
    chosen = _implementation(op, logits, lambda: attribute_loss_unfit(logits, attributes))
    return chosen(logits, query, attributes, normalisation=normalisation, weight=weight)


def prepare_adamw(step: Step, tables: Callable[[], Tables]) -> bool:
    """Make what ``adamw`` keeps between calls, where its kernels would take ``step``; whether they would."""
    first = step.params[0]
    name, _ = _choose("adamw", first.device.type, lambda: adamw_unfit(step), isinstance(first, FakeTensor))
    if name == "fused":
        _adamw.prepare(step, tables())
    return name == "fused"


def reserve(device: torch.device) -> None:
    """Make what kernels keep between launches on the current stream of ``device``, before steps are captured there or
    run in a graph's memory pool, from which nothing that lasts may be taken."""
    _ticket.reserve(device)


def adamw(step: Step, tables: Callable[[], Tables]) -> Stats:
    """One step of AdamW over the tensors of ``step``, in place: (norm before clipping, int32 1 if nothing was changed).

    ``tables`` gives what the kernels know of the tensors, and makes ``step.lr`` a tensor on the device; it is called
    only where they run. ``unit_fast.MaskedAdamW`` is the optimiser around it. ``ValueError`` as every operator where
    the mode is fused and the kernels cannot take the step.
    """
    first = step.params[0]
    name, why = _choose("adamw", first.device.type, lambda: adamw_unfit(step), isinstance(first, FakeTensor))
    if name == "cpu" and (why_not := adamw_cpu_unfit(step)):
        name, why = "reference", why_not
    _say("adamw", name, why)
    chosen = _IMPLEMENTATIONS["adamw"][name]
    return chosen(step, tables()) if name == "fused" else chosen(step)
