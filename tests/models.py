"""Small configurations and batches that several tests share."""

import torch

from unit_fast.batch import Batch
from unit_fast.config import (
    ALL_TASKS,
    BackboneConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.tasks import get_task


def small_config(*tasks: str, dropout: float = 0.1, queries: int = 5, **changes) -> ModelConfig:
    """A UniT of about 0.3 M parameters (plus heads) with every part of the full one."""
    parts = {
        "backbone": BackboneConfig(depth=14, width=8, norm="group", first_trained_stage=0),
        "encoder": EncoderConfig(width=32, layers=2, heads=4, ffn_width=48, dropout=dropout),
        "text": TextConfig(
            width=24, layers=2, heads=3, ffn_width=40, vocab_size=200, max_positions=140, dropout=dropout
        ),
        "decoder": DecoderConfig(
            width=48, layers=3, heads=4, ffn_width=56, dropout=dropout, classifier_dropout=dropout
        ),
        "tasks": default_tasks(*(tasks or ALL_TASKS), queries=queries),
    }
    return ModelConfig(**{**parts, **changes})


def random_batch(name: str, config: ModelConfig, batch: int = 2, seed: int = 0, dtype=torch.float32) -> Batch:
    """Two or more unequal samples of one task."""
    rng = torch.Generator().manual_seed(seed)
    task = get_task(name)
    settings = config.tasks[task.name]
    out = Batch(task=task.name)
    if task.has_image:
        out.image = torch.randn(batch, 3, 64, 80, generator=rng, dtype=dtype)
        out.pixel_mask = torch.zeros(batch, 64, 80, dtype=torch.bool)
        out.pixel_mask[1:, 48:], out.pixel_mask[1:, :, 60:] = True, True
        out.image = out.image.masked_fill(out.pixel_mask[:, None], 0.0)
    if task.has_text:
        length = min(9, settings.text_length)
        out.input_ids = torch.randint(1, config.text.vocab_size, (batch, length), generator=rng)
        out.attention_mask = torch.ones(batch, length, dtype=torch.int64)
        out.attention_mask[1:, length - 3 :] = 0
        out.input_ids *= out.attention_mask
        out.token_type_ids = torch.zeros_like(out.input_ids)
        out.token_type_ids[:, 4:] = out.attention_mask[:, 4:]
    if task.is_detection:
        out.counts = torch.tensor([3, *[1] * (batch - 1)], dtype=torch.int32)
        real = torch.arange(3) < out.counts[:, None]
        out.labels = torch.randint(1, settings.outputs - 1, (batch, 3), generator=rng).masked_fill(~real, -1)
        out.boxes = torch.rand(batch, 3, 4, generator=rng, dtype=dtype) * 0.4 + 0.2
        out.boxes = out.boxes * real[..., None]
        if task.attributes:
            out.attributes = torch.full((batch, 3, 16), -1)
            out.attributes[:, 0, :2] = torch.randint(0, config.loss.attribute_outputs, (batch, 2), generator=rng)
    elif task.loss == "bce":
        out.answer_scores = torch.rand(batch, settings.outputs, generator=rng, dtype=dtype).round()
    else:
        out.label = torch.randint(0, settings.outputs, (batch,), generator=rng)
    return out
