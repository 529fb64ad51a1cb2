"""What a configuration may be, and what of it a resumed run may change."""

import math
import operator
from collections.abc import Iterable
from pathlib import Path

from unit_fast.config import RunConfig, to_dict
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import OWN, TASKS

FREEZABLE = {
    "image": ("backbone.", "input_proj.", "image_encoder.layers."),
    "text": ("text_encoder.",),
}
"""What ``freeze`` may name and what it holds still, by the beginnings of parameters' names. The task tables stay
trainable: in a single-task checkpoint the rows of other tasks are untrained noise. So do the projections to the
decoder's width (SPEC 6.1)."""

_AT_LEAST = {
    "steps": 1, "target_batch": 0, "early_stop": 0, "eval_every": -1, "eval_batch": 1, "eval_limit": 0,
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
    for name in ("batch_per_process", "accumulate"):
        value = getattr(config, name)
        if value < 0 or value == 0 and not config.target_batch:
            raise UserError(f"{name}: is {value}; give at least 1, or a target_batch that it follows from")
    if config.early_stop and config.eval_every < 1:
        raise UserError(f"early_stop: needs evaluations while training, eval_every is {config.eval_every}")
    if config.eval_first and config.eval_every < 0:
        raise UserError(f"eval_first: eval_every is {config.eval_every}, which never evaluates; give at least 0")
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
            if name not in TASKS and name not in OWN:
                raise UserError(f"{field}: {name!r} is not a data set key; {nearest(name, [*TASKS, *OWN])}")
            if field == "task_batch" and value < 1:
                raise UserError(f"task_batch.{name}: is {value}; give at least 1")


FREE = {
    "recipe", "steps", "eval_every", "eval_batch", "eval_limit", "eval_split", "save_every", "keep_checkpoints",
    "log_every", "criterion", "device", "threads", "weights", "require_weights", "init_from", "skip_load",
    "started_from", "data.root", "data.paths", "data.vocab", "data.workers", "data.prefetch", "data.decoder",
    "data.max_bad_share", "data.max_pixels", "data.cache_dir", "data.cache_mib", "graph", "buckets", "target_batch",
    "eval_first", "early_stop", "track",
}  # fmt: skip
"""Fields a resumed run may change: where things are, what is watched, how long it goes on, how its steps are run."""


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple]:
    """Dotted name -> (old, new) of every field that differs."""
    return dict(_differences(to_dict(old), to_dict(new), ""))


def _differences(old, new, name):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, (old, new)


def check_resumable(path: Path, old: RunConfig, new: RunConfig, allowed: Iterable[str] = ()) -> dict[str, tuple]:
    """The harmless differences between a checkpoint's config and the run's; ``UserError`` on others.

    allowed: dotted names (or their beginnings) that may change too; those of the model never may.
    """
    found, allowed = differences(old, new), set(allowed)
    for name in allowed:
        known = {".".join(k.split(".")[:n]) for k in _names(to_dict(new)) for n in range(1, 1 + len(k.split(".")))}
        if name not in known:
            raise UserError(f"--allow-changed {name}: no such field; {nearest(name, known)}")
    refused = []
    for name, (was, now) in found.items():
        beginnings = {".".join(name.split(".")[:n]) for n in range(1, 1 + len(name.split(".")))}
        if not beginnings & FREE and (name.startswith("model.") or not beginnings & allowed):
            refused.append(f"{name} was {was!r}, is {now!r}")
    if refused:
        more = "the model cannot change" if any(r.startswith("model.") for r in refused) else "--allow-changed NAME"
        raise UserError(
            f"{path}: the checkpoint has another config: {'; '.join(refused[:5])}"
            f"{f' and {len(refused) - 5} more' if len(refused) > 5 else ''}. Leave these as they were ({more}), or "
            "start a new run with --init-from"
        )
    return found


def _names(tree: dict, name: str = ""):
    for key, value in tree.items():
        path = f"{name}.{key}" if name else key
        yield path
        if isinstance(value, dict):
            yield from _names(value, path)
