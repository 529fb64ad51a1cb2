"""A whole DETR as a model of ours: its configuration from its tensors, and from the config.json beside them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unit_fast.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig, TextConfig, default_tasks
from unit_fast.errors import UserError
from unit_fast.weights.foreign import Foreign

_DEPTHS = {((1, 1, 1, 1), True): 14, ((2, 2, 2, 2), True): 26, ((3, 4, 6, 3), True): 50, ((3, 4, 23, 3), True): 101,
           ((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34}  # fmt: skip
"""Blocks of the four stages, and whether they are bottlenecks -> layers of the residual net."""
HEADS = 8
"""Attention heads of every published DETR; the tensors do not tell."""


def detr_config(foreign: Foreign, settings: Mapping, source: Path, stride: int | None = None) -> ModelConfig:
    """The configuration of the DETR in ``foreign``, for COCO's task.

    settings: Hugging Face's config.json, as far as it is there: heads, and whether the last stage is dilated. stride:
    pixels per feature cell, 16 for a DC5 model; None reads it off the settings or "dc5" in the name of ``source``.
    ``UserError`` where a part is missing.
    """
    shapes = {name: tuple(value.shape) for name, value in foreign.tensors.items()}
    needed = ("backbone.conv1.weight", "input_proj.weight", "decoder.norm.weight", "query_embed.weight",
              "class_embed.weight", "bbox_embed.layers.2.bias")  # fmt: skip
    lacking = [name for name in needed if name not in shapes]
    if lacking:
        raise UserError(f"{source}: no whole DETR: {lacking[0]} is missing; leave --whole out to fill a recipe's model")
    dilated = bool(settings.get("dilation")) or "dc5" in source.name.lower() or "dc5" in source.parent.name.lower()
    return ModelConfig(
        backbone=_backbone(foreign.tensors, source, stride or (16 if dilated else 32)),
        encoder=EncoderConfig(
            width=shapes["input_proj.weight"][0],
            layers=_count(shapes, r"image_encoder\.layers\.(\d+)\."),
            heads=settings.get("encoder_attention_heads", HEADS),
            ffn_width=shapes["image_encoder.layers.0.linear1.weight"][0],
            residual=False,
            task_embedding=False,
        ),
        # A detector has no texts: as little of the text encoder as may be.
        text=TextConfig(width=8, layers=1, heads=1, ffn_width=8, vocab_size=1, max_positions=1, task_embedding=False),
        decoder=DecoderConfig(
            width=shapes["decoder.norm.weight"][0],
            layers=_count(shapes, r"decoder\.layers\.(\d+)\."),
            heads=settings.get("decoder_attention_heads", HEADS),
            ffn_width=shapes["decoder.layers.0.linear1.weight"][0],
        ),
        tasks=default_tasks("coco", queries=shapes["query_embed.weight"][0], outputs=shapes["class_embed.weight"][0]),
    )


def _count(names, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _backbone(tensors: Mapping[str, Tensor], source: Path, stride: int) -> BackboneConfig:
    blocks = tuple(_count(tensors, rf"backbone\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    bottleneck = "backbone.layer1.0.conv3.weight" in tensors
    if (blocks, bottleneck) not in _DEPTHS:
        raise UserError(f"{source}: its backbone has {blocks} blocks a stage; known are {[b for b, _ in _DEPTHS]}")
    width = tensors["backbone.conv1.weight"].shape[0]
    return BackboneConfig(depth=_DEPTHS[blocks, bottleneck], width=width, stride=stride)
