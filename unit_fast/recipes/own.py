"""Models for a user's own files: a small one that trains from the pixels, and the published one for published weights.

What a task has of classes comes from the files: ``outputs`` is 0 until a run begins.
"""

import dataclasses

from unit_fast.config import (
    BackboneConfig,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.recipes.small import LAYER, small_model, small_optim

_NO_TEXT = {"layers": 1, "vocab_size": 1, "max_positions": 1}
"""The text encoder of a model without texts: as little as may be."""


def detect() -> RunConfig:
    """Boxes of your own classes (a folder in COCO's format) in a small model that a CPU trains from the pixels."""
    return RunConfig(
        steps=4000,
        batch_per_process=8,
        ratios={"detect": 1.0},
        eval_every=500,
        eval_batch=8,
        save_every=500,
        criterion="detect",
        model=small_model(default_tasks("detect", queries=40), TextConfig(**LAYER, **_NO_TEXT)),
        optim=small_optim(),
        data=DataConfig(
            short_side=256, max_side=342, train_short_sides=(224, 256, 288), crop_short_sides=(256, 288, 320),
            crop_min=192, crop_max=342,
        ),
    )  # fmt: skip


def _pretrained(model: ModelConfig) -> RunConfig:
    """``detect`` with a model of published size, at images of full size."""
    return dataclasses.replace(
        detect(),
        steps=10_000,
        batch_per_process=4,
        accumulate=4,
        eval_every=1000,
        eval_batch=1,
        save_every=1000,
        model=model,
        optim=OptimConfig(warmup_steps=500),
        data=DataConfig(),
    )


def detect_resnet50() -> RunConfig:
    """Boxes of your own classes in UniT's published size (ResNet-50): for --init-from weights of UniT, or a GPU."""
    text = TextConfig(width=96, heads=4, ffn_width=192, **_NO_TEXT)
    return _pretrained(ModelConfig(text=text, tasks=default_tasks("detect")))


def detect_detr() -> RunConfig:
    """Boxes of your own classes in DETR's published size (ResNet-50): for --init-from weights of DETR."""
    return _pretrained(
        ModelConfig(
            backbone=BackboneConfig(stride=32),
            encoder=EncoderConfig(residual=False, task_embedding=False),
            text=TextConfig(width=96, heads=4, ffn_width=192, task_embedding=False, **_NO_TEXT),
            decoder=DecoderConfig(width=256),
            tasks=default_tasks("detect"),
        )
    )
