"""What ``freeze`` holds still, and what of a configuration a resumed run may change."""

from collections.abc import Iterable
from pathlib import Path

from unit_fast.config import RunConfig, to_dict
from unit_fast.errors import UserError, nearest

FREEZABLE = {
    "image": ("backbone.", "input_proj.", "image_encoder.layers."),
    "text": ("text_encoder.",),
}
"""What ``freeze`` may name and what it holds still, by the beginnings of parameters' names. The task tables stay
trainable: in a single-task checkpoint the rows of other tasks are untrained noise. So do the projections to the
decoder's width (SPEC 6.1)."""

FREE = {
    "recipe", "steps", "eval_every", "eval_batch", "eval_limit", "eval_split", "save_every", "keep_checkpoints",
    "log_every", "criterion", "device", "threads", "weights", "require_weights", "init_from", "skip_load",
    "started_from", "data.root", "data.paths", "data.columns", "data.vocab", "data.workers", "data.prefetch",
    "data.decoder", "data.max_bad_share", "data.max_pixels", "data.cache_dir", "data.cache_mib", "graph", "buckets",
    "target_batch", "eval_first", "early_stop", "track",
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
