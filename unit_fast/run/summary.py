"""``summary.json``: how a run ended and what it reached."""

import json

import torch

from unit_fast.files import replace
from unit_fast.run.environment import environment
from unit_fast.run.folder import EXIT
from unit_fast.run.log import finite
from unit_fast.run.setup import parameter_counts
from unit_fast.run.start import Parts


def write_summary(parts: Parts, status: str, message: str) -> None:
    """Write it with a key of ``folder.EXIT`` and what is to be said; a disk that refuses is one line."""
    config, state, evaluator = parts.config, parts.state, parts.evaluator
    seconds = state.seconds
    content = {
        "status": status, "exit_code": EXIT[status], "message": message, "recipe": config.recipe, "step": state.step,
        "steps": config.steps, "metrics": evaluator.metrics, "metrics_step": evaluator.evaluated_at,
        "best": state.best, "seconds": round(seconds, 3), "train_seconds": round(seconds - state.eval_seconds, 3),
        "eval_seconds": round(state.eval_seconds, 3), "seed": config.seed, "threads": torch.get_num_threads(),
        "device": str(parts.device), "samples": dict(state.counts), "bad_images": state.bad.state(),
        "nonfinite_steps": state.nonfinite_steps, "parameters": parameter_counts(state.model)[0],
        "environment": environment(),
    }  # fmt: skip
    if state.ema:
        content["ema_metrics"] = evaluator.ema_metrics
    try:
        replace(parts.folder / "summary.json", json.dumps(finite(content), indent=2) + "\n")
    except OSError as error:
        parts.log.line(f"summary.json: could not be written ({error.strerror}); the run is {status}: {message}")
