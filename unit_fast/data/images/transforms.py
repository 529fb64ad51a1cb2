"""Pixels for the model: the reference transform, and the fast one.

Which changes an image undergoes is decided in ``geometry.py``. Two engines carry them out:

``torchvision``  Pillow decodes and resizes, as torchvision does with Pillow images: the reference. For a run on a GPU
                 torchvision decodes in threads, and ``place`` does the rest on the GPU.
``dali``         DALI decodes batches in its own threads (``dali.py``). ``place`` below then flips, resizes, crops,
                 normalises and pads, on a CPU with torch's 8-bit kernel, on a GPU in float; or, with
                 ``data.dali_graph whole``, DALI does that too.

On the same decoded pixels ``place`` differs from the reference by at most two of 255 steps a resize: each of its two
passes rounds once, and averaging makes no difference larger.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unit_fast.data.images.geometry import Geometry

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ROWS = 64
"""Rows of an image that a CPU normalises at a time, so that they are still in its cache at the next operation."""

_MEAN = torch.tensor(MEAN).view(3, 1, 1)
_STD = torch.tensor(STD).view(3, 1, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """[3,H,W] float32: RGB scaled to 0..1, then normalised with ``MEAN`` and ``STD``."""
    pixels = torch.from_numpy(np.array(image))  # np.array copies: the image's own memory is read-only
    return pixels.permute(2, 0, 1).contiguous().float().div_(255).sub_(_MEAN).div_(_STD)


def transform(pixels: Tensor, geometry: Geometry, bits8: bool | None = None) -> Tensor:
    """The image changed by ``geometry``, not yet normalised.

    Args:
        pixels: [H,W,3] uint8, of the size ``geometry.stored``.
        bits8: compute in 8 bits; default on a CPU, which alone has such a kernel. Otherwise in float32, rounded after
            each resize, as 8 bits would be.

    Returns:
        [3,h,w] of ``geometry.size``: uint8, or float32 with whole numbers.
    """
    bits8 = pixels.device.type == "cpu" if bits8 is None else bits8
    x = pixels.permute(2, 0, 1)[None]  # channels last in memory, which the 8-bit kernel is written for
    if geometry.flip:
        x = pixels.flip(1).permute(2, 0, 1)[None]
    if geometry.first is not None:
        x = _resize(x, geometry.first, bits8)
    if geometry.crop is not None:
        top, left, height, width = geometry.crop
        x = x[:, :, top : top + height, left : left + width]
    return _resize(x, geometry.size, bits8)[0]


def _resize(x: Tensor, size: tuple[int, int], bits8: bool) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if bits8:
        return F.interpolate(x, size=size, mode="bilinear", antialias=True)
    # First along the rows, then along the columns, rounded each time: as Pillow and the 8-bit kernel do it.
    for part in ((x.shape[-2], size[1]), size):
        if tuple(x.shape[-2:]) != tuple(part):
            x = F.interpolate(x.float(), size=part, mode="bilinear", antialias=True).add_(0.5).floor_().clamp_(0, 255)
    return x


def place(pixels: Tensor, geometry: Geometry, out: Tensor) -> None:
    """The image changed by ``geometry`` and normalised, into the upper left of ``out`` [3,H,W] float; zeros elsewhere.

    ``pixels`` as for ``transform``, on the device of ``out``.
    """
    height, width = geometry.size
    mean, scale = _constants(out.device, out.dtype)
    changed = transform(pixels, geometry)
    rows = ROWS if out.device.type == "cpu" else height
    for top in range(0, height, rows):
        part = out[:, top : min(top + rows, height), :width]
        part.copy_(changed[:, top : top + rows]).sub_(mean).mul_(scale)
    out[:, height:] = 0
    out[:, :height, width:] = 0


_known: dict = {}


def _constants(device, dtype):
    """Mean and reciprocal deviation of the 8-bit values, [3,1,1] each; one copy a device."""
    found = _known.get((device, dtype))
    if found is None:
        mean, scale = (255 * _MEAN).to(device, dtype), (1 / (255 * _STD)).to(device, dtype)
        found = _known[device, dtype] = (mean, scale)
    return found
