"""The static shapes that batches are padded to, so that a step can be captured once a shape.

Shapes: B batch, H W pixels, T text tokens, N padded targets of an image.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unit_fast.batch import Batch, real_places
from unit_fast.config import RunConfig

PADDING = {
    "image": 0.0, "pixel_mask": True, "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -1,
    "boxes": 0.0, "attributes": -1,
}  # fmt: skip
"""What stands in a padded place of each field that is padded, as ``data.collate`` does it."""


@dataclass(frozen=True, kw_only=True)
class BucketSpec:
    """The static shape of a batch, what a captured step is made for. 0 where the task has no such input."""

    height: int = 0
    """Pixels."""
    width: int = 0
    """Pixels."""
    text_len: int = 0
    """Tokens."""
    max_targets: int = 0
    """Objects of an image."""
    batch: int
    """Samples."""

    def __str__(self) -> str:
        parts = [f"{self.batch} x"]
        parts += [f"{self.height}x{self.width} px"] if self.height else []
        parts += [f"{self.text_len} tokens"] if self.text_len else []
        parts += [f"{self.max_targets} targets"] if self.max_targets else []
        return " ".join(parts)

    def fields(self, like: Batch) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Field -> shape and dtype of a batch of this shape with the fields and dtypes of ``like``."""
        sides = {
            "image": (3, self.height, self.width), "pixel_mask": (self.height, self.width),
            **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (self.text_len,)),
            "labels": (self.max_targets,), "boxes": (self.max_targets, 4),
        }  # fmt: skip
        if like.attributes is not None:
            sides["attributes"] = (self.max_targets, like.attributes.shape[-1])
        found = {
            name: ((self.batch, *sides.get(name, value.shape[1:])), value.dtype)
            for name, value in like.tensors().items()
        }
        if like.image is not None:
            found.setdefault("pixel_mask", ((self.batch, *sides["pixel_mask"]), torch.bool))
        return found

    def empty(self, like: Batch, device) -> Batch:
        """A batch of this shape with the fields and dtypes of ``like``, nothing but padding, on ``device``."""
        made = {
            name: torch.full(shape, PADDING.get(name, 0), dtype=dtype, device=device)
            for name, (shape, dtype) in self.fields(like).items()
        }
        return Batch(task=like.task, **made)


def fill(static: Batch, batch: Batch) -> None:
    """Copy ``batch`` into the tensors of ``static``, padding behind it; from pinned memory without waiting.

    ``ValueError`` where ``batch`` does not fit: more samples or longer sides, another task, other fields.
    """
    given = batch.tensors()
    if batch.image is not None and batch.pixel_mask is None:
        given["pixel_mask"] = batch.image.new_zeros(batch.image[:, 0].shape, dtype=torch.bool)
    buffers = static.tensors()
    if batch.task != static.task or given.keys() != buffers.keys():
        raise ValueError(
            f"fill: the batch of {batch.task} has {sorted(given)}, the buffers of {static.task} {sorted(buffers)}"
        )
    for name, buffer in buffers.items():
        value = given[name]
        place = tuple(slice(0, n) for n in value.shape)
        if value.dim() != buffer.dim() or len(value) != len(buffer) or buffer[place].shape != value.shape:
            raise ValueError(f"fill: {name} {list(value.shape)} does not fit into {list(buffer.shape)}")
        if value.shape != buffer.shape:
            if name not in PADDING:
                raise ValueError(f"fill: {name} is {list(value.shape)}, it must be {list(buffer.shape)}")
            buffer.fill_(PADDING[name])
        buffer[place].copy_(value, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The static shapes that the batches of a run are padded to.

    Images: two orientations x ``heights`` short sides x ``widths`` long sides, and squares for batches with images of
    both orientations. The short sides end at ``short_side``, the long ones at ``max_side``, both rounded up to
    ``multiple``. Texts: powers of two up to ``text_len``, texts without an image also half as much again. Targets:
    powers of two.
    """

    short_side: int
    max_side: int
    text_len: int = 128
    """Longest text, tokens."""
    heights: int = 2
    widths: int = 3
    least_text: int = 16
    least_targets: int = 32
    multiple: int = 32
    """Sides are multiples of it: the largest stride of a backbone."""

    def __post_init__(self):
        for name in ("short_side", "max_side", "text_len", "heights", "widths", "least_text", "least_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"Buckets: {name} is {getattr(self, name)}; it must be at least 1")

    @functools.cached_property
    def images(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every image bucket, the smallest area first."""
        short, long = self._up(self.short_side), self._up(max(self.max_side, self.short_side))
        found = {(long, long)}
        for i in range(1, self.heights + 1):
            # Half of the short side is the smallest: below it images are rare (DETR's shortest is 0.6 of its longest).
            low = self._up(short * (1 - 0.5 * (self.heights - i) / self.heights))
            for j in range(self.widths):
                share = j / (self.widths - 1) if self.widths > 1 else 1.0
                high = self._up(low + (long * low / short - low) * share)
                found |= {(low, high), (high, low)}
        return tuple(sorted(found, key=lambda side: (side[0] * side[1], side)))

    def bucket_of(self, sizes: list[tuple[int, ...]], *, text_len: int = 0, targets: int = 0) -> BucketSpec:
        """The smallest bucket for samples of these sizes: (height, width) of images, anything else of a text alone.

        An image larger than every bucket gets one of its own, its sides rounded up: it is never cut.
        """
        height = width = 0
        if sizes and len(sizes[0]) == 2:
            height, width = (max(side) for side in zip(*sizes))
            fitting = (s for s in self.images if s[0] >= height and s[1] >= width)
            height, width = next(fitting, (self._up(height), self._up(width)))
        tokens = max(text_len, self.least_text)
        # Beside an image a text is small; alone it is all there is, and half as much again lies between two powers.
        tokens = _power_of_two(tokens) if height else _power_or_between(tokens)
        return BucketSpec(
            height=height, width=width, batch=len(sizes),
            text_len=text_len and max(text_len, min(self.text_len, tokens)),
            max_targets=targets and _power_of_two(max(targets, self.least_targets)),
        )  # fmt: skip

    def rank(self, height: int, width: int) -> tuple[int, int, int, int]:
        """What images are sorted by so that neighbours share a bucket, or need one that is little larger.

        By orientation first: a batch with both needs a square. Wide ones end and tall ones begin with the largest.
        """
        bucket = self.bucket_of([(height, width)])
        kind = (bucket.height >= bucket.width) + (bucket.height > bucket.width)
        sign = -1 if kind == 2 else 1
        return kind, sign * bucket.height * bucket.width, bucket.height, sign * height * width

    def largest(self, bucket: BucketSpec) -> BucketSpec:
        """The largest bucket with the kinds of input and the samples that ``bucket`` has, at least as large as it."""
        height, width = self.images[-1]
        more = {"height": height, "width": width} if bucket.height * bucket.width < height * width else {}
        kinds = {"text_len": self.text_len if bucket.text_len else 0}
        return dataclasses.replace(
            bucket, **(more if bucket.height else {}), **{k: max(v, getattr(bucket, k)) for k, v in kinds.items()}
        )

    def of(self, batches: Sequence[Batch]) -> BucketSpec:
        """The bucket for all of ``batches`` alike; what they hold is not read, only their shapes.

        Detection always has places for targets, also for images without any.
        """
        images = [b.image.shape[-2:] for b in batches if b.image is not None]
        texts = [b.input_ids.shape[1] for b in batches if b.input_ids is not None]
        targets = [max(1, b.labels.shape[1]) for b in batches if b.labels is not None]
        size = tuple(max(side) for side in zip(*images)) if images else (0,)
        return self.bucket_of([size] * len(batches[0]), text_len=max(texts, default=0), targets=max(targets, default=0))

    def _up(self, side: float) -> int:
        return self.multiple * -(-int(-(-side // 1)) // self.multiple)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power_or_between(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n."""
    power = _power_of_two(n)
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def real_share(batch: Batch, bucket: BucketSpec) -> float:
    """Share of a padded batch's image tokens and text tokens that are real, from ``batch.sizes`` (host only)."""
    places = bucket.height * bucket.width or bucket.text_len
    return real_places(batch) / (bucket.batch * places)


def buckets_of(config: RunConfig) -> Buckets:
    """The static shapes of a run's training batches."""
    data = config.data
    return Buckets(
        short_side=max((data.short_side, *(data.train_short_sides if data.augment else ()))),
        max_side=data.max_side,
        text_len=max(1, *(task.text_length for task in config.model.tasks.values())),  # detection has no text
        **dataclasses.asdict(config.buckets),
    )
