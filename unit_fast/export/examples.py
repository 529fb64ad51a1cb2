"""Inputs that an exported file is made with and checked on: samples of the run's own data, where they are there."""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.config import RunConfig
from unit_fast.data import BadImage, collate, open_dataset
from unit_fast.data.images.geometry import resized
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

_log = logging.getLogger("unit_fast.export")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that are fixed in the file; None leaves one free."""

    batch: int | None = None
    image: tuple[int, int] | None = None
    """(height, width), pixels."""
    tokens: int | None = None


def samples_of(config: RunConfig, name: str, count: int) -> tuple[list[dict], str]:
    """``count`` samples of the task's validation split, and a line that says where they are from; of random pixels and
    word pieces where the run's data is not there."""
    task, model = get_task(name), config.model
    try:
        dataset = open_dataset(
            name, "val", config.data, model.tasks[name], augment=False, vocab_size=model.text.vocab_size,
            attribute_outputs=model.loss.attribute_outputs,
        )  # fmt: skip
    except UserError as error:
        return _random(config, name, count), f"random inputs ({error})"
    found = []
    for index in range(min(len(dataset), 100)):
        try:
            found.append(dataset.get(index))
        except BadImage:
            continue
        if len(found) == count:
            break
    if not found:
        return _random(config, name, count), f"random inputs (the validation split of {task.short} has no sample)"
    return [found[i % len(found)] for i in range(count)], f"{len(found)} samples of {task.short}'s validation split"


def _random(config: RunConfig, name: str, count: int) -> list[dict]:
    task, rng, samples = get_task(name), torch.Generator().manual_seed(0), []
    for i in range(count):
        sample = {}
        if task.has_image:
            size = resized(3 + i, 4, config.data.short_side, config.data.max_side)
            sample["image"] = torch.randn(3, *size, generator=rng)
        if task.has_text:
            length = max(3, config.model.tasks[name].text_length - 2 * i)
            sample["input_ids"] = torch.randint(0, config.model.text.vocab_size, (length,), generator=rng)
        samples.append(sample)
    return samples


def batches_of(name: str, samples: list[dict], inputs, sizes: Sizes) -> list[tuple[Tensor, ...]]:
    """Batches of the module's inputs, the first with two or more samples: of several sizes as far as none is fixed."""
    targets = ("labels", "boxes", "attributes", "answer_scores", "label")
    samples = [{k: v for k, v in sample.items() if k not in targets} for sample in samples]
    if sizes.batch is not None:
        groups = [[samples[(start + i) % len(samples)] for i in range(sizes.batch)] for start in range(2)]
    else:
        groups = [samples[:2], samples[2:3], samples[1:]]
    return [tuple(_fitted(collate(name, group), sizes)[field] for field in inputs) for group in groups]


def _fitted(batch: Batch, sizes: Sizes) -> dict[str, Tensor]:
    """The fields, cut or padded to the sizes that are fixed."""
    fields = batch.tensors()
    if sizes.image is not None and batch.image is not None:
        height, width = sizes.image
        more = (0, width - batch.image.shape[3], 0, height - batch.image.shape[2])
        fields["image"] = F.pad(batch.image, more)
        fields["pixel_mask"] = F.pad(batch.pixel_mask, more, value=True)
    if sizes.tokens is not None and batch.input_ids is not None:
        more = (0, sizes.tokens - batch.input_ids.shape[1])
        fields |= {k: F.pad(fields[k], more) for k in ("input_ids", "attention_mask", "token_type_ids")}
    return fields
