"""The set loss of detection for all decoder layers at once: class, L1 and GIoU losses of matched queries.

Per layer, with t(q) the object of query q, from ``query``:

    ce = sum_q w_q nll_q / sum_q w_q, nll_q = -log_softmax(logits_q)[c(q)], c(q) the label of t(q), else no-object,
         w_q = ``no_object_weight`` where c(q) is no-object, else 1; over the process, or per image and then the mean
         of the images; or, balanced, 0.9 sum_positive nll / num_boxes + 0.1 sum_others nll / max(1, B Q - num_boxes),
         positive where c(q) is a class of objects
    bbox = sum_matched |b_q - b_t|_1 / num_boxes        giou = sum_matched (1 - GIoU(b_q, b_t)) / num_boxes

Shapes: L decoder layers, B images, Q queries, K classes, N padded objects. logits [L,B,Q,K], boxes [L,B,Q,4] cx cy w h,
query int64 [L,B,N] (-1 = none; no query twice), labels [B,N], target_boxes [B,N,4], num_boxes a scalar on
the device. Replaces, a layer, a scatter of classes, ``cross_entropy``, gathers of boxes, ``l1_loss``, a GIoU of all
pairs, an argmax, and their backward; as batched PyTorch they are still 83 operators forward and 119 backward.

Fused: the forward reads the logits once and keeps a log-sum-exp a query; the backward reads them once more, finds the
objects of the queries again and writes both gradients. Each is one launch: the blocks of rows leave partial sums, and
the last program of a layer adds them in a fixed order (``ticket``). One program a layer without partial sums was not
kept even for one image: it takes its blocks in turn. Bytes: the logits once, and in the backward twice. FLOPs: about 5
a logit; memory-bound. Limits of the fused path: float32, bfloat16, float16; K <= 65536.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.set_loss.cpu import set_loss_cpu
from unit_fast_kernels.set_loss.kernels import (
    OBJECTS,
    SUM_BLOCKS,
    SUM_IMAGES,
    _set_loss_bwd_kernel,
    _set_loss_fwd_kernel,
)
from unit_fast_kernels.set_loss.reference import (
    NEGATIVE_SHARE,
    POSITIVE_SHARE,
    Settings,
    set_loss_bwd_reference,
    set_loss_reference,
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
    refuse,
    unfit_dtype,
)

MAX_CLASSES = 65536

# --- Launchers, their references and fakes ---------------------------------------------------------------------------

_SETTINGS = (
    "int no_object, float no_object_weight, bool per_process, bool balanced, float weight_ce, float weight_bbox, "
    "float weight_giou"
)


def defaults(classes: int) -> dict[str, int]:
    """Rows and columns of a block, warps: 16 logits to a thread of one warp, so that no row is more than one warp's."""
    block = min(power_of_two(classes), 512)
    return {"rows": min(16, 512 // block), "block": block, "warps": 1}


def _parameters(op: str, logits: Tensor) -> dict[str, int]:
    classes = logits.shape[-1]
    return launch_parameters(op, f"classes{power_of_two(classes)}", defaults(classes), logits.device)


def _constants(logits: Tensor, tune: dict[str, int], settings: Settings) -> dict:
    return {
        "K": logits.shape[-1], "R": tune["rows"], "BLOCK": tune["block"], "NB": OBJECTS, "PAIRS": 32 * tune["warps"],
        "PER_PROCESS": settings.per_process, "BALANCED": settings.balanced, "POSITIVE": POSITIVE_SHARE,
        "NEGATIVE": NEGATIVE_SHARE, "num_warps": tune["warps"],
    }  # fmt: skip


def _fwd_outputs(logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    """losses [3,L]: ce, bbox, giou; lse [L,B,Q]; float32."""
    layers, images, queries, _ = logits.shape
    losses = torch.empty((3, layers), dtype=torch.float32, device=logits.device)
    return losses, torch.empty((layers, images, queries), dtype=torch.float32, device=logits.device)


def _fwd_launch(logits, boxes, query, labels, target_boxes, num_boxes, *settings):
    losses, lse = outputs = _fwd_outputs(logits)
    layers, images, queries, _ = logits.shape
    if lse.numel() == 0:
        losses.fill_(float("nan"))  # means of nothing
        return outputs
    settings = Settings(*settings)
    tune = _parameters("set_loss_fwd", logits)
    blocks = cdiv(queries, tune["rows"]) + 1  # of rows, and the boxes
    _set_loss_fwd_kernel[(blocks, images, layers)](
        logits.contiguous(),
        boxes.contiguous(),
        query.contiguous(),
        labels.contiguous(),
        target_boxes.contiguous(),
        num_boxes,
        lse,
        torch.empty((layers, 2, images, blocks), dtype=torch.float32, device=logits.device),
        counters(logits, layers),
        losses,
        images,
        queries,
        query.shape[2],
        settings.no_object,
        settings.no_object_weight,
        *settings[4:],
        **_constants(logits, tune, settings),
        IB=SUM_IMAGES,
        SB=SUM_BLOCKS,
    )
    return outputs


def _fwd_reference(logits, boxes, query, labels, target_boxes, num_boxes, *settings):
    logits = logits.float()
    losses, lse = _fwd_outputs(logits)
    tensors = logits, boxes.float(), query, labels, target_boxes.float(), num_boxes
    found = set_loss_reference(*tensors, Settings(*settings))
    return losses.copy_(torch.stack(found)), lse.copy_(logits.logsumexp(-1))


def _bwd_outputs(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (logits, boxes))


def _bwd_launch(by_ce, by_bbox, by_giou, logits, boxes, query, labels, target_boxes, num_boxes, lse, *settings):
    dlogits, dboxes = outputs = _bwd_outputs(logits, boxes)
    layers, images, queries, _ = logits.shape
    if lse.numel() == 0:
        return outputs
    settings = Settings(*settings)
    tune = _parameters("set_loss_bwd", logits)
    _set_loss_bwd_kernel[(cdiv(queries, tune["rows"]) + 1, images, layers)](
        *(None if g is None else g.contiguous() for g in (by_ce, by_bbox, by_giou)),
        logits.contiguous(),
        boxes.contiguous(),
        query.contiguous(),
        labels.contiguous(),
        target_boxes.contiguous(),
        num_boxes,
        lse,
        dlogits,
        dboxes,
        images,
        queries,
        query.shape[2],
        settings.no_object,
        settings.no_object_weight,
        *settings[4:],
        **_constants(logits, tune, settings),
    )
    return outputs


_INPUTS = "Tensor logits, Tensor boxes, Tensor query, Tensor labels, Tensor target_boxes"
_forward = register(
    "set_loss_fwd",
    f"({_INPUTS}, Tensor num_boxes, {_SETTINGS}) -> (Tensor losses, Tensor lse)",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=_fwd_outputs,
)
_backward = register(
    "set_loss_bwd",
    f"(Tensor? by_ce, Tensor? by_bbox, Tensor? by_giou, {_INPUTS}, Tensor num_boxes, Tensor lse, {_SETTINGS}) "
    "-> (Tensor dlogits, Tensor dboxes)",
    reference=set_loss_bwd_reference,
    launch=_bwd_launch,
    fake=lambda by_ce, by_bbox, by_giou, logits, boxes, *_: _bwd_outputs(logits, boxes),
)


# --- The fused operator ---------------------------------------------------------------------------------------------


class _SetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, boxes, query, labels, target_boxes, num_boxes, *settings):
        losses, lse = _forward(logits, boxes, query, labels, target_boxes, num_boxes, *settings)
        ctx.save_for_backward(logits, boxes, query, labels, target_boxes, num_boxes, lse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return losses.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_ce, by_bbox, by_giou):
        gradients = (None, None)
        if not by_ce is by_bbox is by_giou is None:
            gradients = _backward(by_ce, by_bbox, by_giou, *ctx.saved_tensors, *ctx.settings)
        return *gradients, *(None,) * 11


def why_not(logits, boxes, query, labels, target_boxes, *_) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if reason := unfit_dtype(logits=logits, boxes=boxes, target_boxes=target_boxes):
        return reason
    if logits.shape[-1] > MAX_CLASSES:
        return f"there are {logits.shape[-1]} classes: kernels exist for 1 to {MAX_CLASSES}"
    if max(logits.shape[:2]) > 65535:
        return f"there are {logits.shape[0]} layers of {logits.shape[1]} images: a grid has 65535 of each"
    return None


def set_loss_fused(
    logits, boxes, query, labels, target_boxes, num_boxes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """``set_loss_reference`` by the kernels: float32 results, gradients in the dtypes of logits and boxes. The same
    bits every time. What does not fit: ``why_not``."""
    return _SetLoss.apply(logits, boxes, query, labels, target_boxes, num_boxes, *settings)


def validate(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    num_boxes: Tensor,
    *,
    no_object: int,
    no_object_weight: float = 0.1,
    normalisation: str = "per_image",
    balanced: bool = False,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> tuple:
    """DETR's losses of matched queries for all decoder layers at once: (ce, bbox, giou), each [L].

    logits [L,B,Q,K] and boxes [L,B,Q,4] (cx cy w h), floating, get gradients; query int64 [L,B,N], the query of each
    object or -1, no query twice in an image, as ``assignment`` gives it; labels int64 [B,N] and target_boxes [B,N,4],
    of which only objects with a query count; num_boxes a floating scalar on the device, at least 1.

    ce is the cross-entropy, with class ``no_object`` for queries without an object: a mean weighted 1 and
    ``no_object_weight``, ``normalisation`` "per_image" (then over images) or "per_process"; or ``balanced``: 0.9 of
    the objects' sum over num_boxes and 0.1 of the others' over their number. bbox and giou are the sums of L1 distance
    and 1 - GIoU over num_boxes, zero and still connected without objects. The three are multiplied with ``weights``.
    In the dtype of the logits, at least float32; gradients in the dtypes of logits and boxes. ``ValueError`` on
    arguments that do not fit.
    """
    op = "set_loss"
    check_shape(op, "logits", logits, (None,) * 4, "[L,B,Q,K]")
    layers, images, queries, classes = logits.shape
    if logits.numel() == 0:
        refuse(op, "logits", f"of shape {list(logits.shape)}", "there is no loss of nothing: no size may be 0")
    check_shape(op, "boxes", boxes, (layers, images, queries, 4), "[L,B,Q,4]")
    check_shape(op, "query", query, (layers, images, None), "[L,B,N]")
    check_shape(op, "labels", labels, (images, query.shape[2]), "[B,N]")
    check_shape(op, "target_boxes", target_boxes, (images, query.shape[2], 4), "[B,N,4]")
    check_shape(op, "num_boxes", num_boxes, (), "a scalar")
    check_floating(op, logits=logits, boxes=boxes, target_boxes=target_boxes, num_boxes=num_boxes)
    check_int64(op, query=query, labels=labels)
    tensors = {"boxes": boxes, "query": query, "labels": labels, "target_boxes": target_boxes}
    check_one_device(op, logits, **tensors, num_boxes=num_boxes)
    if not 0 <= no_object < classes:
        refuse(op, "no_object", no_object, f"it must be one of the {classes} classes")
    check_known(op, "normalisation", normalisation, NORMALISATIONS)
    settings = Settings(no_object, no_object_weight, normalisation == "per_process", balanced, *weights)
    return logits, boxes, query, labels, target_boxes, num_boxes, settings


SET_LOSS = Operator(
    name="set_loss",
    validate=validate,
    reference=set_loss_reference,
    cpu=set_loss_cpu,
    fused=set_loss_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "unit_coco": (6, 8, 100, 92, 20),
    "unit_coco_one_image": (6, 1, 100, 92, 20),
    "unit_vg": (6, 8, 100, 1602, 20),
    "crowded": (6, 8, 100, 92, 100),
    "rf_detr": (39, 4, 300, 91, 20),
}
"""(L, B, Q, K, N); rf_detr: 3 layers of 13 groups, each matched alone."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``set_loss_fused``; logits and boxes of ``dtype``; every object has a query where they suffice."""
    layers, images, queries, classes, objects = shape
    logits = torch.randn(layers, images, queries, classes, dtype=dtype, device=device)
    boxes = (0.1 + 0.8 * torch.rand(layers, images, queries, 4, device=device)).to(dtype)
    order = torch.rand(layers, images, queries, device=device).argsort(-1)[..., :objects]
    query = F.pad(order, (0, objects - order.shape[-1]), value=-1)
    return {
        "logits": logits,
        "boxes": boxes,
        "query": query,
        "labels": torch.randint(0, classes - 1, (images, objects), device=device),
        "target_boxes": 0.1 + 0.8 * torch.rand(images, objects, 4, device=device),
        "num_boxes": torch.tensor(float(images * objects), device=device),
        "no_object": classes - 1,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    a = make(shape, dtype, device)
    inputs = tuple(a[name] for name in ("logits", "boxes", "query", "labels", "target_boxes"))
    settings = (a["no_object"], 0.1, False, False, 1.0, 5.0, 2.0)
    losses, lse = _fwd_outputs(a["logits"])
    lse.zero_()
    gradients = tuple(torch.ones_like(loss) for loss in losses.unbind(0))
    forward = (*inputs, a["num_boxes"], *settings)
    return [
        ("set_loss_fwd", forward),
        ("set_loss_bwd", (*gradients, *inputs, a["num_boxes"], lse, *settings)),
    ]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    classes = shape[3]
    width = power_of_two(classes)
    tried = [defaults(classes)] + [
        {"rows": rows, "block": block, "warps": warps}
        for block in dict.fromkeys(min(width, b) for b in (128, 256, 512, 1024, 2048))
        for rows in (1, 2, 4, 8, 16, 32, 64, 128)
        for warps in (1, 2, 4, 8, 16)
        if 4 <= rows * block // (32 * warps) <= 32
    ]
    return candidates_of(["set_loss_fwd", "set_loss_bwd"], f"classes{width}", tried)


def _sizes(shape: tuple, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of the logits, of the boxes, and of the rest: log-sum-exps, query, labels and target boxes."""
    layers, images, queries, classes, objects = shape
    rows = layers * images * queries
    rest = 4 * rows + 8 * layers * images * objects + 24 * images * objects
    return rows * classes * dtype.itemsize, rows * 4 * dtype.itemsize, rest


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: everything read once (of the boxes the matched ones), log-sum-exps written."""
    logits, boxes, rest = _sizes(shape, dtype)
    return logits + boxes * min(shape[4], shape[2]) // max(1, shape[2]) + rest


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the same read, the gradients of logits and boxes written."""
    return bytes_moved(shape, dtype) + sum(_sizes(shape, dtype)[:2])


def flops(shape: tuple) -> int:
    """Forward, counted on the formula: 5 a logit, 40 a pair of boxes."""
    layers, images, queries, classes, objects = shape
    return layers * images * (5 * queries * classes + 40 * min(objects, queries))


def flops_bwd(shape: tuple) -> int:
    """Backward: 4 a logit, 100 a pair of boxes."""
    layers, images, queries, classes, objects = shape
    return layers * images * (4 * queries * classes + 100 * min(objects, queries))
