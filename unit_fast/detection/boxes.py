"""What becomes of the model's boxes, cx, cy, w, h relative to the image, on the way to a COCO file."""

import torch
from torch import Tensor


def cxcywh_to_xywh(boxes: Tensor) -> Tensor:
    """cx, cy, w, h -> x, y, w, h."""
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]), -1)


def image_scale(height: float, width: float, like: Tensor) -> Tensor:
    """[4] factors that turn relative boxes of any format into pixels (divide by them for the other direction)."""
    return torch.tensor((width, height, width, height), dtype=like.dtype, device=like.device)
