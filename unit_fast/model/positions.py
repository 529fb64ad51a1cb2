"""Sine position embedding and the feature mask (SPEC 1.2 to 1.4; DETR, appendix A.4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 10000.0


def feature_mask(pixel_mask_BHW: Tensor, height: int, width: int) -> Tensor:
    """Padding mask of the feature map: nearest neighbour of the pixel mask. bool [B,height,width], True = padding."""
    return F.interpolate(pixel_mask_BHW[None].float(), size=(height, width)).to(torch.bool)[0]


def sine_positions(mask_Bhw: Tensor, channels: int) -> Tensor:
    """Position embedding of every cell, [B,h*w,channels] float32: rows in the first half, columns in the second.

    The order of the float32 operations is the authors': another one differs in the last bits.
    """
    features = channels // 2
    valid = ~mask_Bhw
    frequency = torch.arange(features, dtype=torch.float32, device=mask_Bhw.device)
    frequency = TEMPERATURE ** (2 * torch.div(frequency, 2, rounding_mode="floor") / features)
    halves = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        count = count / (count.narrow(axis, count.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi)
        angle = count[..., None] / frequency
        halves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1).flatten(1, 2)
