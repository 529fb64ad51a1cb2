"""The weights that a new run starts from: another run's (``init_from``), and pretrained parts."""

import logging
from pathlib import Path

from unit_fast.config import RunConfig, TextConfig
from unit_fast.errors import UserError, nearest
from unit_fast.model import UniT
from unit_fast.weights import checkpoint
from unit_fast.weights.loading import load_initial_weights
from unit_fast.weights.pretrained import load_pretrained

_log = logging.getLogger("unit_fast.train")

PARTS = {"backbone": "backbone.", "text encoder": "text_encoder."}
"""Parts that pretrained files exist for, and how their tensors' names begin."""


def load_initial(model: UniT, config: RunConfig) -> dict[str, str]:
    """``init_from`` first, then pretrained files for the parts it left. Returns part -> source."""
    found: dict[str, str] = {}
    loaded: list[str] = []
    if config.init_from:
        path, loaded = _load_from_run(model, config)
        found["model"] = path
    elif config.skip_load:
        raise UserError("skip_load: leaves parts of --init-from out; give --init-from too")
    left = [part for part, prefix in PARTS.items() if not any(name.startswith(prefix) for name in loaded)]
    published = {
        "backbone": (config.model.backbone.depth, config.model.backbone.width, config.model.backbone.norm)
        == (50, 64, "frozen"),
        "text encoder": all(
            getattr(config.model.text, f) == getattr(TextConfig(), f)
            for f in ("width", "layers", "heads", "ffn_width", "vocab_size", "max_positions")
        ),
    }
    if not any(task.has_text for task in model.tasks.values()) and not published["text encoder"]:
        left = [part for part in left if part != "text encoder"]  # of no use
    parts = [part for part in left if published[part]]
    for part in left:
        if part not in parts:  # of another size than the published files: there is nothing to look for
            if config.require_weights:
                raise UserError(f"require_weights: the {part} has not the published size; no pretrained weights fit")
            found[part] = "random"
    if parts:
        folder = config.weights or (config.data.root and str(Path(config.data.root) / "pretrained"))
        if folder is None or (config.weights and not Path(folder).is_dir()):
            raise UserError(f"--weights {folder}: no such folder" if folder else "give --data-root or --weights")
        found |= load_pretrained(model, folder, require=config.require_weights, parts=parts)
    return found


def _load_from_run(model: UniT, config: RunConfig) -> tuple[str, list[str]]:
    """Load ``init_from``, a run of ours or a file of any origin known; its path and the names loaded."""
    path = Path(config.init_from)
    for prefix in config.skip_load:
        if not any(name.startswith(prefix) for name in model.state_dict()):
            raise UserError(
                f"skip_load {prefix!r}: no tensor of the model begins so; "
                f"{nearest(prefix, {n.split('.')[0] for n in model.state_dict()})}"
            )
    if path.is_dir():
        path = checkpoint.find(path) / checkpoint.WEIGHTS
    elif not path.is_file():
        raise UserError(f"--init-from {path}: no such run, checkpoint or weights file")
    checkpoint.verify_weights(path)
    report = load_initial_weights(model, checkpoint.load_weights(path), skip=config.skip_load, source=str(path))
    _log.info("initial weights: %s", report.counts())
    for line in report.left:
        _log.info("initial weights: %s", line)
    return str(path), report.loaded
