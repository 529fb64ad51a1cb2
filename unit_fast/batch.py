"""The typed things that travel: a batch of samples and the model's output.

Shapes: B batch, H W pixels, T text tokens, N padded targets of an image, A answers, L decoder layers, Q queries,
C decoder width, K classes.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, repr=False)
class Batch:
    """Samples of one task. A field that the task does not have is None."""

    task: str
    """Data set key, see ``tasks.py``."""
    image: Tensor | None = None
    """[B,3,H,W] float, normalised, zero-padded at the bottom and right."""
    pixel_mask: Tensor | None = None
    """[B,H,W] bool, True on padding."""
    input_ids: Tensor | None = None
    """[B,T] int64 word pieces."""
    attention_mask: Tensor | None = None
    """[B,T] int64, 1 = real token."""
    token_type_ids: Tensor | None = None
    """[B,T] int64 segments."""
    labels: Tensor | None = None
    """[B,N] int64 classes of the targets, -1 = padding."""
    boxes: Tensor | None = None
    """[B,N,4] cx, cy, w, h relative to the un-padded image."""
    attributes: Tensor | None = None
    """[B,N,16] int64, -1 = empty slot."""
    counts: Tensor | None = None
    """[B] int32, number of real targets."""
    answer_scores: Tensor | None = None
    """[B,A] float soft scores (VQA)."""
    label: Tensor | None = None
    """[B] int64 class (SNLI-VE, GLUE)."""
    orig_size: Tensor | None = None
    """[B,2] int64 height and width of the image as stored."""
    sample_ids: list | None = None
    """Host only: one id a sample, for messages and prediction files."""
    sizes: list | None = None
    """Host only: per sample (height, width) of the un-padded image, or (tokens,) of the text for text-only tasks."""
    largest: dict | None = None
    """Host only: field -> largest number in it, of the fields that point into the model's tables
    (``tasks.index_limits``); so the model refuses what it has no place for without reading the device."""

    def __repr__(self) -> str:
        return f"Batch({self.task}, {len(self)} samples: {_shapes(self.tensors())})"

    def __len__(self) -> int:
        for value in (self.image, self.input_ids):
            if value is not None:
                return len(value)
        return 0

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def to(self, device, dtype: torch.dtype | None = None) -> "Batch":
        """A copy with its tensors on ``device``; ``dtype`` converts the floating ones."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in self.tensors().items()
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """A copy whose tensors on the host are pinned."""
        pinned = {k: v if v.is_cuda else v.pin_memory() for k, v in self.tensors().items()}
        return dataclasses.replace(self, **pinned)


@dataclass(kw_only=True, repr=False)
class Output:
    """What the model computes for a batch."""

    hidden_states: Tensor
    """[L,B,Q,C], normalised, every decoder layer."""
    logits: Tensor | None = None
    """[L,B,Q,K] class logits (detection)."""
    boxes: Tensor | None = None
    """[L,B,Q,4] cx, cy, w, h in 0..1 (detection)."""
    attribute_logits: Tensor | None = None
    """[B,Q,attributes] of the last layer, conditioned on the most likely class (Visual Genome, evaluation only)."""
    scores: Tensor | None = None
    """[B,K] classifier logits of the last layer (VQA, SNLI-VE, GLUE)."""
    layer_scores: Tensor | None = None
    """[L,B,K] the same of every layer, only with losses on all hidden states."""

    def __repr__(self) -> str:
        return f"Output({_shapes(vars(self))})"


def _shapes(fields: dict) -> str:
    """Shapes, dtypes and the device of those that are tensors."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    parts = [f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in tensors.items()]
    places = sorted({str(x.device) for x in tensors.values()})
    return ", ".join(parts) + (f" on {', '.join(places)}" if places else "")


def real_places(batch: Batch) -> int:
    """Pixels of a batch's images, or tokens of its texts where it has no images, that are not padding."""
    return sum(map(math.prod, batch.sizes))
