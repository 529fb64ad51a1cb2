"""The inputs of captured steps: one block of memory in which every bucket's batches lie, each from its beginning.

Only one step runs at a time and every step's inputs are written anew, so that buckets can share: the block is as large
as the largest of them, where a set of tensors for each would be the sum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.buckets import Buckets, BucketSpec

ALIGNMENT = 512
"""Bytes; what CUDA's allocator gives."""


class InputArena:
    """Static tensors for batches on ``device``.

    A block that proves too small is followed by a larger one; graphs that read the first keep it.
    """

    def __init__(self, buckets: Buckets, device: torch.device):
        self.buckets, self.device = buckets, device
        self.blocks: list[Tensor] = []

    def place(self, bucket: BucketSpec, like: Sequence[Batch]) -> list[Batch]:
        """Batches of shape ``bucket`` with the fields and dtypes of ``like``, of whatever was there before."""
        needed = _bytes(bucket, like)
        if not self.blocks or len(self.blocks[-1]) < needed:
            # An eighth more than the largest images need: other tasks have other small fields.
            size = max(needed, _bytes(self.buckets.largest(bucket), like) * 9 // 8)
            self.blocks.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        block, start, found = self.blocks[-1], 0, []
        for batch in like:
            fields = {}
            for name, (shape, dtype) in bucket.fields(batch).items():
                end = start + math.prod(shape) * dtype.itemsize
                fields[name] = block[start:end].view(dtype).view(shape)
                start = _aligned(end)
            found.append(Batch(task=batch.task, **fields))
        return found

    @property
    def bytes(self) -> int:
        """What it takes of the device's memory."""
        return sum(len(block) for block in self.blocks)


def _bytes(bucket: BucketSpec, like: Sequence[Batch]) -> int:
    sizes = (math.prod(s) * d.itemsize for batch in like for s, d in bucket.fields(batch).values())
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
