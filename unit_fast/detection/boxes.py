"""Box formats and their checks. Every function works on the last axis of a float tensor [...,4].

Formats: ``xywh`` corner and size (COCO files), ``xyxy`` two corners, ``cxcywh`` centre and size (the model). The
generalised IoU is an operator: ``unit_fast.ops.giou``.
"""

import torch
from torch import Tensor


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """x, y, w, h -> x1, y1, x2, y2."""
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> x, y, w, h."""
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> cx, cy, w, h."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """cx, cy, w, h -> x1, y1, x2, y2."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def xywh_to_cxcywh(boxes: Tensor) -> Tensor:
    """x, y, w, h -> cx, cy, w, h."""
    return torch.cat((boxes[..., :2] + boxes[..., 2:] / 2, boxes[..., 2:]), -1)


def cxcywh_to_xywh(boxes: Tensor) -> Tensor:
    """cx, cy, w, h -> x, y, w, h."""
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]), -1)


def image_scale(height: float, width: float, like: Tensor) -> Tensor:
    """[4] factors that turn relative boxes of any format into pixels (divide by them for the other direction)."""
    return torch.tensor((width, height, width, height), dtype=like.dtype, device=like.device)


def clamp_xyxy(boxes: Tensor, height: float, width: float) -> Tensor:
    """Corner boxes cut to the image: x into [0, width], y into [0, height]."""
    return torch.minimum(boxes.clamp(min=0), image_scale(height, width, boxes))


def valid_xyxy(boxes: Tensor) -> Tensor:
    """bool [...]: all four numbers finite and the area positive (x2 > x1 and y2 > y1)."""
    return boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
