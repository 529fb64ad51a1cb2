"""The small model that a CPU trains from the pixels, and how it is trained: what several recipes share."""

from unit_fast.config import (
    BackboneConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TextConfig,
)

LAYER = {"width": 96, "heads": 4, "ffn_width": 192, "dropout": 0.0}
"""Of every encoder and decoder."""


def small_model(tasks: dict[str, TaskConfig], text: TextConfig) -> ModelConfig:
    """The model for ``tasks``, with the text encoder ``text``."""
    return ModelConfig(
        backbone=BackboneConfig(depth=14, width=16, norm="group", first_trained_stage=0),
        encoder=EncoderConfig(layers=2, **LAYER),
        text=text,
        decoder=DecoderConfig(layers=3, classifier_dropout=0.0, **LAYER),
        tasks=tasks,
    )


def small_optim() -> OptimConfig:
    """One rate for all of the model, which starts from nothing."""
    return OptimConfig(lr=1e-3, lr_backbone=1e-3, max_norm=1.0, warmup_steps=30, unused="skip")
