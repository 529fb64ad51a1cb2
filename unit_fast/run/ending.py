"""How a run ends: last evaluation and checkpoint, a save after an error, ``summary.json``, what ``train`` returns."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unit_fast.config import RunConfig
from unit_fast.errors import OutOfMemory, UserError
from unit_fast.files import replace
from unit_fast.run.environment import environment
from unit_fast.run.folder import EXIT
from unit_fast.run.guard import BrokenWeights
from unit_fast.run.log import finite
from unit_fast.run.setup import parameter_counts
from unit_fast.run.start import Parts
from unit_fast.run.state import State
from unit_fast.weights.checkpoint import SaveError

_log = logging.getLogger("unit_fast.train")


@dataclass
class Run:
    """What ``train`` returns."""

    folder: Path
    model: torch.nn.Module
    config: RunConfig
    status: str
    """A key of ``folder.EXIT``."""
    step: int
    """Updates done."""
    metrics: dict[str, dict] = field(default_factory=dict)
    """Short task name -> metrics of the last evaluation."""

    @property
    def exit_code(self) -> int:
        return EXIT[self.status]


def finish(parts: Parts) -> str:
    """The last evaluation and the last checkpoint; a failed evaluation is an error only after the save."""
    config, state, signals, evaluator = parts.config, parts.state, parts.signals, parts.evaluator
    error = None
    done = (state.step >= config.steps or evaluator.patience_is_over(state)) and not signals.requested
    if done and config.eval_every >= 0 and evaluator.evaluated_at != state.step:
        error = evaluator.evaluate(state).error
    parts.save(final=True)
    if error:
        raise error
    if done:
        parts.guard.check_trained()
    return "finished" if done and not signals.requested else "interrupted"


def early_end(state: State, config: RunConfig) -> str:
    """What is said where ``config.early_stop`` ended the run."""
    best = state.best["best"]
    return (
        f"ended after step {state.step} of {config.steps}: {state.stale} evaluations without a better "
        f"{config.criterion} than {best['value']:.4f} at step {best['step']} (early_stop {config.early_stop})"
    )


def save_what_is_good(parts: Parts, error: Exception) -> None:
    """Before ``error`` ends the run: save where it stands, if that is just after an update and the error is not of the
    weights or of saving itself. With its data gone a run loses nothing."""
    state = parts.state
    outside = isinstance(error, UserError | OSError) and not isinstance(error, SaveError | BrokenWeights | OutOfMemory)
    if not outside or not state.whole or state.step == 0 or parts.checkpoints.saved_at == state.step:
        return
    for record in parts.log.flush():  # or their steps were done and never logged
        state.refusals.add(record.task, record.nonfinite)
    try:
        parts.save()
    except BrokenWeights as broken:
        _log.error("%s", broken)


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
