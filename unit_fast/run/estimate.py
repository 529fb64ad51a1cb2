"""What a run needs at least, without allocating it: parameters, and memory by task."""

import dataclasses
from dataclasses import dataclass

import torch

from unit_fast.batch import Batch
from unit_fast.config import ModelConfig, RunConfig
from unit_fast.model import UniT
from unit_fast.run.setup import freeze, parameter_counts
from unit_fast.tasks import get_task

OBJECTS = 20
"""Objects an image is taken to have."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a run needs at least."""

    parameters: int
    trainable: int
    fixed: int
    """Weights, gradients, optimiser and averaged weights."""
    activations: dict[str, int]
    """Data set key -> what one forward pass keeps for the backward pass."""

    @property
    def total(self) -> int:
        return self.fixed + max(self.activations.values())


def estimate(config: RunConfig, device: torch.device) -> Estimate:
    """What ``config``, whose batch sizes are set, needs on ``device``.

    Nothing is allocated: the model runs on PyTorch's ``meta`` device, in float32 and without dropout (whose masks are
    small), one forward pass of the largest training images and texts. Attention weights of large images are not counted
    on a CPU, where they are computed again. What the allocator and the libraries add is unknown: a lower bound.
    """
    model_config = _without_dropout(config.model)
    with torch.device("meta"):
        model = UniT(model_config).train()
    freeze(model, config)
    total, trainable = parameter_counts(model)
    return Estimate(
        parameters=total,
        trainable=trainable,
        fixed=4 * (total + 3 * trainable) + (4 * total if config.ema_decay else 0),
        activations={name: _activations(model, config, name, device.type == "cpu") for name in config.model.tasks},
    )


def _without_dropout(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model,
        encoder=dataclasses.replace(model.encoder, dropout=0.0),
        text=dataclasses.replace(model.text, dropout=0.0),
        decoder=dataclasses.replace(model.decoder, dropout=0.0, classifier_dropout=0.0),
    )


def _activations(model: UniT, config: RunConfig, name: str, recomputed: bool) -> int:
    """Bytes that the backward pass of one batch of ``name`` keeps."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []  # an address must not be used again while we count

    def pack(x):
        scores = x.dim() >= 3 and min(x.shape[-2:]) >= 1024  # [..., queries, keys] of image attention
        storage = x.untyped_storage()
        if storage._cdata not in own and not (recomputed and scores):
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)
        return x

    batch = _largest_batch(config, name)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(batch)
        matching = None
        if get_task(name).is_detection:
            layers = out.logits.shape[0] if config.model.loss.auxiliary else 1
            matching = torch.zeros(layers, len(batch), OBJECTS, dtype=torch.int64, device="meta")
        losses = model.losses(out, batch, matching)
        del losses
    return sum(kept.values())


def _largest_batch(config: RunConfig, name: str) -> Batch:
    task, settings, data, size = get_task(name), config.model.tasks[name], config.data, config.batch_of(name)

    def tensor(*shape, dtype=torch.float32):
        return torch.zeros(size, *shape, dtype=dtype, device="meta")

    fields = {}
    if task.has_image:
        short = max(data.train_short_sides) if task.is_detection and data.augment else data.short_side
        sides = (min(short, data.max_side), data.max_side)
        fields |= {"image": tensor(3, *sides), "pixel_mask": tensor(*sides, dtype=torch.bool)}
    if task.has_text:
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            fields[key] = tensor(settings.text_length, dtype=torch.int64)
    if task.is_detection:
        fields |= {
            "labels": tensor(OBJECTS, dtype=torch.int64),
            "boxes": tensor(OBJECTS, 4),
            "attributes": tensor(OBJECTS, config.model.loss.max_attributes, dtype=torch.int64),
            "counts": tensor(dtype=torch.int32),
        }
    elif task.loss == "bce":
        fields["answer_scores"] = tensor(settings.outputs)
    else:
        fields["label"] = tensor(dtype=torch.int64)
    return Batch(task=name, **fields)
