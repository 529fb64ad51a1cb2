"""The evaluations of a run: of its weights and of their average, and which step was the best."""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch

from unit_fast.config import RunConfig
from unit_fast.data import MissingSplit
from unit_fast.errors import UserError
from unit_fast.evaluation.evaluate import evaluate
from unit_fast.evaluation.thresholds import write_thresholds
from unit_fast.run.log import RunLog
from unit_fast.run.rows import rows_at
from unit_fast.run.setup import open_split
from unit_fast.run.signals import Interrupted, Stop
from unit_fast.run.state import State
from unit_fast.schedule import due
from unit_fast.tasks import get_task

_log = logging.getLogger("unit_fast.train")


class Evaluated(NamedTuple):
    """What came of an evaluation."""

    improved: bool
    """Whether the step is the best so far, of the weights or of their average."""
    error: Exception | None
    """Why it failed; it is logged, and does not end training."""


class Evaluator:
    """Evaluates a run into its ``folder``. ``drawn``: called with folder and step after each, to draw examples.

    The splits are opened at once: what is wrong with their files shows before training.
    """

    def __init__(self, config: RunConfig, device: torch.device, folder: Path, log: RunLog, signals: Stop, drawn=None):
        self.config, self.device, self.folder, self.log, self.signals = config, device, folder, log, signals
        self.drawn = drawn
        self.datasets = _open_splits(config) if config.eval_every >= 0 else {}
        self.tasks = [name for name, _ in self.datasets]
        self.metrics: dict[str, dict] = {}
        """Short task name -> figures of the newest evaluation."""
        self.ema_metrics: dict[str, dict] = {}
        self.evaluated_at: int | None = None
        """Updates after which ``metrics`` were found."""

    def evaluate(self, state: State) -> Evaluated:
        """Metrics of every task that has the split; the best ones are remembered in ``state.best``."""
        begun, improved, error = time.monotonic(), None, None
        self.log.note(f"evaluating after step {state.step}")
        try:
            with self.signals.interrupting(state.model, *([state.ema.model] if state.ema else [])):
                if self.tasks:
                    self.metrics = self._evaluate(state, state.model, "eval", self.folder)
                    improved = self._keep_best(state, "best", self.metrics)
                    self.evaluated_at = state.step
                    write_thresholds(self.folder, self.metrics, split=self.config.eval_split, step=state.step)
                    if self.drawn:
                        self.drawn(self.folder, state.step)
                if self.tasks and state.ema:
                    self.log.line("the averaged weights:")
                    self.ema_metrics = self._evaluate(state, state.ema.model, "eval_ema", None)
                    averaged = self._keep_best(state, "best_ema", self.ema_metrics)
                    improved = averaged if improved is None else improved or averaged
                if improved is not None:
                    state.stale = 0 if improved else state.stale + 1
        except Interrupted:
            self.log.line("evaluation broken off")
        except Exception as caught:
            error = caught
            _log.error("evaluation after step %d failed: %s", state.step, caught, exc_info=True)
        state.eval_seconds += time.monotonic() - begun
        self.log.restart_clock()
        return Evaluated(bool(improved), error)

    def _evaluate(self, state: State, model, kind: str, out: Path | None) -> dict[str, dict]:
        results = evaluate(
            model, self.config, tasks=self.tasks, device=self.device, out=out, progress=False, datasets=self.datasets
        )
        self.log.evaluation(state.step, results, kind)
        return results

    def _keep_best(self, state: State, link: str, results: dict[str, dict]) -> bool | None:
        """Remember these results if they are the best by ``config.criterion``, and say whether they are; None where
        they do not have it."""
        values = {t: m[get_task(t).metric] for t, m in results.items() if m.get(get_task(t).metric) is not None}
        if self.config.criterion != "mean":
            short = get_task(self.config.criterion).short
            values = {t: v for t, v in values.items() if t == short}
        if not values:
            return None
        value = sum(values.values()) / len(values)
        best = state.best.get(link)
        # an evaluation of this step may have been broken off later, and is made up for now
        better = best is None or value > best["value"] or best["step"] == state.step
        if better:
            state.best[link] = {"step": state.step, "value": value, "criterion": self.config.criterion}
        return better

    def due_first(self, state: State) -> bool:
        """Whether an evaluation is due before the first update."""
        return self.config.eval_first and state.step == 0 and self.evaluated_at is None

    def patience_is_over(self, state: State) -> bool:
        """Whether the last ``config.early_stop`` evaluations found nothing better."""
        return 0 < self.config.early_stop <= state.stale

    def check_criterion(self) -> None:
        """``UserError`` where no task can be evaluated whose metric would end the run."""
        wanted = self.config.criterion
        names = self.tasks if wanted == "mean" else [get_task(wanted).name]
        if not set(names) & set(self.tasks):
            raise UserError(
                f"early_stop: criterion {wanted} has no {self.config.eval_split} split to be evaluated on; give "
                "another --criterion or --eval-split, or --early-stop 0"
            )

    def resume(self, source: Path, state: State, saved: RunConfig, changed: dict[str, tuple]) -> bool:
        """Find out from the logged rows whether the checkpoint's step was evaluated; drop what will be logged again.

        source, saved, changed: the checkpoint, its configuration and how this one differs. Returns whether an
        evaluation was due after that step and was not finished.
        """
        other = [name for name in ("criterion", "eval_split", "eval_limit") if name in changed]
        if other and state.best:
            self.log.line(f"with another {', '.join(other)} earlier results do not compare: the best is chosen anew")
            state.best, state.stale = {}, 0
        run = source.parents[1]
        rows = rows_at(run, state.step)
        names = {get_task(name).short for name in self.tasks}
        whole = rows is not None and all(
            names <= rows.get(kind, {}).keys() for kind in ("eval", *(["eval_ema"] if state.ema else []))
        )
        if run == self.folder.resolve() and whole and not other:
            self.evaluated_at, self.metrics = state.step, rows.get("eval", {})
            self.ema_metrics = rows.get("eval_ema", {})
        was_due = due(state.step, saved.eval_every) and 0 < state.step < self.config.steps
        was_due |= saved.eval_first and state.step == 0
        missed = bool(self.tasks and was_due and rows is not None and not whole)
        again = missed or self.evaluated_at is None and state.step == self.config.steps
        self.log.forget_after(state.step, evaluations=not again)
        return missed


def _open_splits(config: RunConfig) -> dict[tuple[str, str], object]:
    """(data set key, split) -> data set, of the tasks that can be evaluated."""
    opened = {}
    for name in config.model.tasks:
        try:
            opened[name, config.eval_split] = open_split(config, name, config.eval_split, augment=False)
        except MissingSplit as error:
            _log.warning("will not be evaluated: %s", error)
    return opened
