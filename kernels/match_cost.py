"""Matching cost of DETR for all decoder layers and images at once (own image's targets only).

    cost[l,b,q,t] = w_bbox |box_q - box_t|_1 - w_class softmax(logits_q)[label_t] - w_giou GIoU(box_q, box_t)

Shapes: logits [L,B,Q,K], boxes [L,B,Q,4] cx cy w h, labels [B,N] (-1 = padding), target_boxes [B,N,4], counts [B];
cost [L,B,Q,N]; columns beyond ``counts`` are zero. Computed in the dtype of the boxes, at least float32.
"""

import torch
from torch import Tensor


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


def match_cost_reference(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    counts: Tensor,
    cost_class: float = 1.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    log_softmax: bool = False,
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
