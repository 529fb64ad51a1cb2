"""Matching cost of DETR for all decoder layers and images at once (own image's targets only).

    cost[l,b,q,t] = w_bbox |box_q - box_t|_1 - w_class softmax(logits_q)[label_t] - w_giou GIoU(box_q, box_t)

Shapes: logits [L,B,Q,K], boxes [L,B,Q,4] cx cy w h, labels [B,N] (-1 = padding), target_boxes [B,N,4], counts [B];
cost [L,B,Q,N]; columns beyond ``counts`` are zero. Computed in the dtype of the boxes, at least float32. Replaces, for
each layer, a softmax, a gather, ``cdist(p=1)`` and the pairwise GIoU between all queries and all targets of the batch.

Fused: one launch reads logits, boxes and targets once and writes the cost, 4 L B Q N bytes, where the reference writes
a softmax and some 30 intermediate results of that size or four times it. FLOPs: 4 a logit, 40 an element of the cost.
A program has Q' queries of an image and layer: the softmax' maximum and sum in two passes over K (so that infinite
logits give what the reference gives), then tiles of targets, to the image's count and no further.
Limits of the fused path: float32, bfloat16, float16 (computed in float32); fewer than 2^31 problems L B.

All but the reference lay the result out as [L,B,N,Q], which is how a solver reads it when targets are few, and return
the view [L,B,Q,N].
"""

import torch
from torch import Tensor
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.triton import cdiv, jit, power_of_two, tl
from unit_fast_kernels.shared.tuned import launch_parameters
from unit_fast_kernels.shared.validation import (
    check_floating,
    check_integer,
    check_one_device,
    check_shape,
    unfit_dtype,
)


def corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x1, y1, x2, y2 of boxes [...,4] given as cx, cy, w, h."""
    cx, cy, w, h = boxes.unbind(-1)
    return cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes a and b (cx, cy, w, h, broadcast against each other): I/U - (hull - U)/hull."""
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull_width = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    hull_height = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull


@torch.no_grad()
def match_cost_reference(
    logits, boxes, labels, target_boxes, counts, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0, log_softmax=False
) -> Tensor:
    """The specification. ``log_softmax`` takes log-probabilities (balanced class loss)."""
    wide = torch.promote_types(boxes.dtype, torch.float32)
    logits, boxes, target_boxes = logits.to(wide), boxes.to(wide), target_boxes.to(wide)
    score = logits.log_softmax(-1) if log_softmax else logits.softmax(-1)
    layers, batch, queries, _ = logits.shape
    index = labels.clamp(min=0)[None, :, None, :].expand(layers, batch, queries, labels.shape[1])
    cost = -cost_class * score.gather(-1, index)
    pair = boxes[:, :, :, None, :], target_boxes[None, :, None, :, :]
    cost = cost + cost_bbox * (pair[0] - pair[1]).abs().sum(-1) - cost_giou * pairwise_giou(*pair)
    real = torch.arange(labels.shape[1], device=counts.device) < counts[:, None]
    return cost.masked_fill(~real[None, :, None, :], 0.0)


# --- On a CPU -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def match_cost_cpu(
    logits, boxes, labels, target_boxes, counts, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0, log_softmax=False
) -> Tensor:
    """The same result as ``match_cost_reference``, in a few buffers that stay in the cache; [L,B,N,Q] in memory.

    No gradient: buffers are written over.
    """
    wide = torch.promote_types(boxes.dtype, torch.float32)
    layers, batch, queries, _ = logits.shape
    shape = layers, batch, labels.shape[1], queries
    logits, boxes, target_boxes = (x.to(wide) for x in (logits, boxes, target_boxes))
    score = logits.log_softmax(-1) if log_softmax else logits.softmax(-1)
    cost = score.mT.gather(2, labels.clamp(min=0)[None, :, :, None].expand(shape)).mul_(-cost_class)
    first, second, third, hull, scratch = (torch.empty(shape, dtype=wide, device=logits.device) for _ in range(5))

    # One coordinate after the other, as [L,B,1,Q] of the queries and [B,N,1] of the targets.
    planes = (x.movedim(-1, 0).contiguous() for x in (boxes, target_boxes))
    distance, *others = (
        torch.sub(a[:, :, None], b[..., None], out=out).abs_()
        for a, b, out in zip(*planes, (first, second, third, hull))
    )
    for other in others:
        distance.add_(other)
    cost.add_(distance.mul_(cost_bbox))

    ax1, ay1, ax2, ay2 = (x[:, :, None] for x in corners(boxes))
    bx1, by1, bx2, by2 = (x[..., None] for x in corners(target_boxes))

    def lengths(a1, a2, b1, b2, shared, spanned):
        """What two intervals share, and their hull."""
        torch.minimum(a2, b2, out=shared).sub_(torch.maximum(a1, b1, out=scratch)).clamp_(min=0)
        torch.maximum(a2, b2, out=spanned).sub_(torch.minimum(a1, b1, out=scratch)).clamp_(min=0)

    intersection, height = first, second
    lengths(ax1, ax2, bx1, bx2, intersection, hull)
    lengths(ay1, ay2, by1, by2, height, third)
    intersection.mul_(height)
    hull.mul_(third)
    areas = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
    union = torch.add(*areas, out=second).sub_(intersection)
    giou = intersection.div_(union).sub_(torch.sub(hull, union, out=third).div_(hull))
    cost.sub_(giou.mul_(cost_giou))
    padding = torch.arange(shape[2], device=counts.device) >= counts[:, None]
    return cost.masked_fill_(padding[None, :, :, None], 0.0).mT


# --- Kernel, launcher, registration ---------------------------------------------------------------------------------


@jit
def _match_cost_kernel(
    logits_ptr,  # [L,B,Q,K]
    boxes_ptr,  # [L,B,Q,4]
    labels_ptr,  # [B,N] integer
    target_boxes_ptr,  # [B,N,4]
    counts_ptr,  # [B] integer
    cost_ptr,  # [L,B,N,Q] float32
    batch,  # B
    queries,  # Q
    classes,  # K
    targets,  # N
    cost_class,
    cost_bbox,
    cost_giou,
    LOG: tl.constexpr,
    QUERIES: tl.constexpr,
    TARGETS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    image = problem % batch
    number = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    inside = number < queries
    row = problem * queries + number
    row_ptr = logits_ptr + row * classes

    k = tl.arange(0, CLASSES)
    largest = tl.full([QUERIES, CLASSES], float("-inf"), tl.float32)
    for start in range(0, classes, CLASSES):
        read = inside[:, None] & (start + k < classes)[None, :]
        x = tl.load(row_ptr[:, None] + (start + k)[None, :], mask=read, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 1)
    total = tl.zeros([QUERIES, CLASSES], tl.float32)
    for start in range(0, classes, CLASSES):
        read = inside[:, None] & (start + k < classes)[None, :]
        x = tl.load(row_ptr[:, None] + (start + k)[None, :], mask=read, other=float("-inf")).to(tl.float32)
        total += tl.exp(x - top[:, None])
    norm = tl.sum(total, 1)
    if LOG:
        norm = tl.log(norm)

    box_ptr = boxes_ptr + row * 4
    ax = tl.load(box_ptr, mask=inside, other=0.0).to(tl.float32)[None, :]
    ay = tl.load(box_ptr + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    aw = tl.load(box_ptr + 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    ah = tl.load(box_ptr + 3, mask=inside, other=0.0).to(tl.float32)[None, :]
    ax1, ax2, ay1, ay2 = ax - 0.5 * aw, ax + 0.5 * aw, ay - 0.5 * ah, ay + 0.5 * ah
    cost_ptr += problem * targets * queries
    # A count outside 0..N would read and write out of bounds.
    count = tl.minimum(tl.maximum(tl.load(counts_ptr + image), 0), targets).to(tl.int32)
    for start in range(0, count, TARGETS):
        t = start + tl.arange(0, TARGETS)
        real = t < count
        target = image * targets + t
        label = tl.load(labels_ptr + target, mask=real, other=0)
        label = tl.minimum(tl.maximum(label, 0), classes - 1)  # as the count
        write = real[:, None] & inside[None, :]
        x = tl.load(row_ptr[None, :] + label[:, None], mask=write, other=0.0).to(tl.float32)
        if LOG:
            score = x - top[None, :] - norm[None, :]
        else:
            score = tl.exp(x - top[None, :]) / norm[None, :]

        target_ptr = target_boxes_ptr + target * 4
        bx = tl.load(target_ptr, mask=real, other=0.0).to(tl.float32)[:, None]
        by = tl.load(target_ptr + 1, mask=real, other=0.0).to(tl.float32)[:, None]
        bw = tl.load(target_ptr + 2, mask=real, other=0.0).to(tl.float32)[:, None]
        bh = tl.load(target_ptr + 3, mask=real, other=0.0).to(tl.float32)[:, None]
        bx1, bx2, by1, by2 = bx - 0.5 * bw, bx + 0.5 * bw, by - 0.5 * bh, by + 0.5 * bh
        distance = tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh)
        width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
        height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
        overlap = width * height
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
        hull_width = tl.maximum(tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1), 0.0)
        hull_height = tl.maximum(tl.maximum(ay2, by2) - tl.minimum(ay1, by1), 0.0)
        hull = hull_width * hull_height
        giou = overlap / union - (hull - union) / hull
        cost = cost_bbox * distance - cost_class * score - cost_giou * giou
        tl.store(cost_ptr + t.to(tl.int64)[:, None] * queries + number[None, :], cost, mask=write)
    for start in range(count, targets, TARGETS):
        t = start + tl.arange(0, TARGETS)
        write = (t < targets)[:, None] & inside[None, :]
        zeros = tl.zeros([TARGETS, QUERIES], tl.float32)
        tl.store(cost_ptr + t.to(tl.int64)[:, None] * queries + number[None, :], zeros, mask=write)


def defaults(queries: int) -> dict[str, int]:
    """Queries of a program, targets and classes of a turn, warps: many programs, since there is little to do."""
    return {"queries": max(4, min(16, power_of_two(queries))), "targets": 16, "classes": 128, "warps": 4}


def _bucket(queries: int, classes: int) -> str:
    return f"queries{power_of_two(queries)}_classes{power_of_two(classes)}"


def _outputs(logits: Tensor, labels: Tensor) -> Tensor:
    """The cost as [L,B,N,Q]."""
    layers, batch, queries, _ = logits.shape
    return torch.empty((layers, batch, labels.shape[1], queries), dtype=torch.float32, device=logits.device)


def _launch(logits, boxes, labels, target_boxes, counts, cost_class, cost_bbox, cost_giou, log_softmax):
    cost = _outputs(logits, labels)
    if cost.numel() == 0:
        return cost
    layers, batch, queries, classes = logits.shape
    tune = launch_parameters("match_cost", _bucket(queries, classes), defaults(queries), logits.device)
    _match_cost_kernel[(layers * batch, cdiv(queries, tune["queries"]))](
        logits.contiguous(),
        boxes.contiguous(),
        labels.contiguous(),
        target_boxes.contiguous(),
        counts.contiguous(),
        cost,
        batch,
        queries,
        classes,
        labels.shape[1],
        cost_class,
        cost_bbox,
        cost_giou,
        LOG=log_softmax,
        QUERIES=tune["queries"],
        TARGETS=tune["targets"],
        CLASSES=tune["classes"],
        num_warps=tune["warps"],
        enable_fp_fusion=False,  # rounds as the reference does
    )
    return cost


def _reference(logits, boxes, labels, target_boxes, *rest):
    return match_cost_reference(logits.float(), boxes.float(), labels, target_boxes.float(), *rest).mT.contiguous()


_operator = register(
    "match_cost",
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor counts, float cost_class, "
    "float cost_bbox, float cost_giou, bool log_softmax) -> Tensor",
    reference=_reference,
    launch=_launch,
    fake=lambda logits, boxes, labels, *_: _outputs(logits, labels),
)


def why_not(logits, boxes, labels, target_boxes, *_) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if reason := unfit_dtype(logits=logits, boxes=boxes, target_boxes=target_boxes):
        return reason
    if logits.shape[-1] == 0:
        return "logits has no classes"
    if logits.shape[0] * logits.shape[1] >= 2**31:
        return "logits has 2^31 problems (layers times images) or more: split it"
    return None


@torch.no_grad()
def match_cost_fused(
    logits, boxes, labels, target_boxes, counts, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0, log_softmax=False
) -> Tensor:
    """``match_cost_reference`` in one launch: float32 [L,B,Q,N], laid out as [L,B,N,Q]. No gradient.

    logits, boxes, target_boxes of DTYPES, which may differ; labels and counts of any integer dtype. Nothing is read on
    the host, so that a label outside 0..K-1 of a real target, or a count outside 0..N, is taken as the nearest legal
    one. What does not fit: ``why_not``.
    """
    return _operator(
        logits, boxes, labels, target_boxes, counts, cost_class, cost_bbox, cost_giou, log_softmax
    ).transpose(-1, -2)


def validate(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: Tensor,
    *,
    cost_class: float = 1.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    log_softmax: bool = False,
) -> tuple:
    """Matching cost [L,B,Q,N] of DETR for all layers and images, each with its own image's targets. No gradient.

    logits [L,B,Q,K]; boxes [L,B,Q,4] and target_boxes [B,N,4] cx cy w h; labels [B,N] int64, -1 on padding; counts [B]
    real targets. ``log_softmax`` takes log-probabilities. Columns at and beyond counts are zero. At least float32;
    strides may be those of [L,B,N,Q]. ``ValueError`` on arguments that do not fit.
    """
    op = "match_cost"
    check_shape(op, "logits", logits, (None,) * 4, "[L,B,Q,K]")
    layers, batch, queries, _ = logits.shape
    check_shape(op, "boxes", boxes, (layers, batch, queries, 4), "[L,B,Q,4]")
    check_shape(op, "labels", labels, (batch, None), "[B,N]")
    check_shape(op, "target_boxes", target_boxes, (batch, labels.shape[1], 4), "[B,N,4]")
    check_shape(op, "counts", counts, (batch,), "[B]")
    check_floating(op, logits=logits, boxes=boxes, target_boxes=target_boxes)
    check_integer(op, labels=labels, counts=counts)
    check_one_device(op, logits, boxes=boxes, labels=labels, target_boxes=target_boxes, counts=counts)
    return logits, boxes, labels, target_boxes, counts, cost_class, cost_bbox, cost_giou, log_softmax


MATCH_COST = Operator(
    name="match_cost",
    validate=validate,
    reference=match_cost_reference,
    cpu=match_cost_cpu,
    fused=match_cost_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "unit_coco": (6, 8, 100, 92, 20, False),
    "unit_coco_batch64": (6, 64, 100, 92, 32, False),
    "unit_crowded": (6, 8, 100, 92, 100, False),
    "unit_visual_genome": (6, 8, 100, 1601, 64, False),
    "unit_visual_genome_balanced": (6, 8, 100, 1601, 64, True),
    "rf_detr_groups": (4, 52, 300, 91, 32, False),
    "few_queries": (6, 32, 8, 92, 8, False),
}
"""(L, B, Q, K, N, log-softmax): decoder layers, images, queries, classes, padded targets. RF-DETR: 4 images x 13
groups."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``match_cost_fused``; between none and all of an image's N targets are real. Logits and boxes of
    ``dtype``; targets in float32, as they come from the data."""
    layers, batch, queries, classes, targets, log_softmax = shape
    counts = torch.arange(batch, device=device, dtype=torch.int32) * 7 % (targets + 1)
    padding = torch.arange(targets, device=device) >= counts[:, None]

    def boxes(*shape):
        return torch.rand(*shape, 4, device=device) * 0.4 + 0.3

    return {
        "logits": torch.randn(layers, batch, queries, classes, device=device).to(dtype),
        "boxes": boxes(layers, batch, queries).to(dtype),
        "labels": torch.randint(0, classes, (batch, targets), device=device).masked_fill(padding, -1),
        "target_boxes": boxes(batch, targets).masked_fill(padding[..., None], 0.0),
        "counts": counts,
        "log_softmax": log_softmax,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operator with arguments: there is no backward."""
    *tensors, log_softmax = make(shape, dtype, device).values()
    return [("match_cost", (*tensors, 1.0, 5.0, 2.0, log_softmax))]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the default first."""
    _, _, queries, classes, _, _ = shape
    tried = [defaults(queries)] + [
        {"queries": rows, "targets": targets, "classes": columns, "warps": warps}
        for rows in (4, 8, 16, 32)
        for targets in (8, 16, 32)
        for columns in (64, 128, 256)
        for warps in (1, 2, 4, 8)
        if 2 <= rows * columns // (32 * warps) <= 32 and rows * targets // (32 * warps) <= 8
    ]
    return [{"op": "match_cost", "bucket": _bucket(queries, classes), "parameters": p} for p in tried]


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Logits, boxes and targets read, the cost written."""
    layers, batch, queries, classes, targets, _ = shape
    rows = layers * batch * queries
    return rows * ((classes + 4) * dtype.itemsize + 4 * targets) + batch * (24 * targets + 4)


def flops(shape: tuple) -> int:
    """Counted on the formula: 4 a logit; an element of the cost 2 for the score, 7 for the distance, 26 for the GIoU
    with its corners' share, 5 to put them together."""
    layers, batch, queries, classes, targets, _ = shape
    return layers * batch * queries * (4 * classes + 40 * targets)
