"""What a configuration may be, beyond the types of its fields."""

import math
import operator

from unit_fast.config import RunConfig
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import TASKS

FREEZABLE = {
    "image": ("backbone.", "input_proj.", "image_encoder.layers."),
    "text": ("text_encoder.",),
}
"""What ``freeze`` may name and what it holds still, by the beginnings of parameters' names. The task tables stay
trainable: in a single-task checkpoint the rows of other tasks are untrained noise. So do the projections to the
decoder's width (SPEC 6.1)."""

_AT_LEAST = {
    "steps": 1, "batch_per_process": 1, "accumulate": 1, "eval_every": -1, "eval_batch": 1, "eval_limit": 0,
    "save_every": 0, "keep_checkpoints": 1, "log_every": 1, "threads": 0, "optim.lr": 0, "optim.lr_backbone": 0,
    "optim.weight_decay": 0, "optim.warmup_steps": 0, "data.workers": 0, "data.prefetch": 1, "data.max_bad_share": 0,
    "data.cache_mib": 0, "model.backbone.group_channels": 1,
    "buckets.heights": 1, "buckets.widths": 1, "buckets.least_text": 1, "buckets.least_targets": 1,
}  # fmt: skip


def check_config(config: RunConfig) -> None:
    """``UserError`` on a number out of range or a data set that does not exist, naming the field."""
    for name, least in _AT_LEAST.items():
        value = operator.attrgetter(name)(config)
        if not least <= value < math.inf:
            raise UserError(f"{name}: is {value}; give at least {least}")
    for field in ("encoder.dropout", "text.dropout", "decoder.dropout", "decoder.classifier_dropout"):
        value = operator.attrgetter(field)(config.model)
        if not 0 <= value < 1:
            raise UserError(f"model.{field}: is {value}; give a probability of at least 0 and below 1")
    if config.optim.max_norm is not None and not config.optim.max_norm > 0:
        raise UserError(f"optim.max_norm: is {config.optim.max_norm}; give a positive number, or None not to clip")
    for part in config.freeze:
        if part not in FREEZABLE:
            raise UserError(f"freeze: {part!r} is not an encoder; {nearest(part, FREEZABLE)}")
    for field in ("ratios", "task_batch"):
        for name, value in getattr(config, field).items():
            if name not in TASKS:
                raise UserError(f"{field}: {name!r} is not a data set key; {nearest(name, TASKS)}")
            if field == "task_batch" and value < 1:
                raise UserError(f"task_batch.{name}: is {value}; give at least 1")
