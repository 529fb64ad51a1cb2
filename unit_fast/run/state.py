"""Everything a run is made of between two updates: how it begins, is evaluated, saved, restored and summed up.

``train.py`` has the loop. A checkpoint holds what ``RunState.state`` lists; all else follows from the configuration.
"""

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from unit_fast import numerics
from unit_fast.config import RunConfig
from unit_fast.config_check import check_config, check_resumable
from unit_fast.data import MissingSplit, open_dataset
from unit_fast.data.bad_images import BadImages
from unit_fast.data.images.engine import engine_of
from unit_fast.data.sampler import normalised, seed_of
from unit_fast.data.store.digests import check_same_data
from unit_fast.errors import UserError
from unit_fast.evaluation.evaluate import evaluate
from unit_fast.evaluation.labels import write_labels
from unit_fast.run.environment import environment
from unit_fast.run.folder import EXIT, Interrupted, RunFolder, Stop, write
from unit_fast.run.log import RunLog, finite
from unit_fast.run.refusals import BrokenWeights, Refusals, not_finite
from unit_fast.run.rows import rows_at
from unit_fast.run.setup import (
    Ema,
    build,
    device_of,
    load_optimizer_state,
    optimizer_state,
    parameter_counts,
    used_masks,
)
from unit_fast.tasks import get_task
from unit_fast.weights import checkpoint

_log = logging.getLogger("unit_fast.train")


class RunState:
    """A run between two updates."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, resume, allow_changed: Sequence[str], progress: str, drawn=None
    ):
        check_config(config)
        self.folder, self.drawn = folder, drawn
        checkpoint.sweep(folder.checkpoints)
        self.log = RunLog(folder.path, config.steps, progress)
        try:
            source = self._source(resume)
            self._prepare(config, source)
            if source:
                self._restore(source, allow_changed)
            elif resume is not None and folder.used:
                self.log.line("nothing was saved before: starting anew, what was logged of the steps is dropped")
                self.log.forget_after(0)
            self._look_at_weights()
            folder.begin(self.config)
            write_labels(folder.path, self.config, self.datasets)
            self._header(source)
        except BaseException as error:
            if isinstance(error, UserError):
                self.log.to_file(f"not started: {error}")
            self.log.close()
            raise

    def _source(self, resume) -> Path | None:
        """The checkpoint to go on from, found intact."""
        if resume is None:
            return None
        if str(resume) != "auto":
            found = checkpoint.find(resume, ("last",)).resolve()
            checkpoint.verify(found)
            return found
        parent = self.folder.checkpoints
        last = [(parent / "last").resolve()] if (parent / "last").exists() else []
        candidates = last + [folder for folder in checkpoint.numbered(parent) if folder.resolve() not in last]
        for found in candidates:
            try:
                checkpoint.verify(found)
                return found
            except UserError as error:
                _log.warning("a checkpoint is left out: %s", error)
        if candidates:
            raise UserError(f"{parent}: no checkpoint is intact; start again with another --out")
        return None

    def _prepare(self, config: RunConfig, source: Path | None) -> None:
        """Everything as it is before the first update."""
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.criterion != "mean" and get_task(config.criterion).name not in config.model.tasks:
            _log.warning("criterion %s is not trained: the best mean over tasks is kept instead", config.criterion)
            config = dataclasses.replace(config, criterion="mean")
        self.device = device_of(config)
        numerics.check(config.precision, self.device)
        self.bf16 = numerics.takes_bf16(config.precision, self.device)
        self.ratios = normalised(config.ratios, config.model.tasks)
        self.datasets = {
            name: open_dataset(
                name, "train", config.data, task, augment=config.data.augment,
                vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
            )
            for name, task in config.model.tasks.items()
            if self.ratios[name] > 0
        }  # fmt: skip
        self.data_digests = {name: dataset.digest() for name, dataset in self.datasets.items()}
        self.model, self.optimizer, self.config = build(config, self.device, pretrained=source is None)
        self.engine = engine_of(config.data)
        self.masks = used_masks(self.model, self.optimizer, self.datasets)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        self.step, self.counts = 0, Counter(dict.fromkeys(self.datasets, 0))
        self.refusals = Refusals()
        self.refused_before = 0
        """Refused updates that a checkpoint knew the number of, but not the tasks."""
        self.saved_at: int | None = None
        self.updating = False
        """Whether an update is under way: what it has drawn and changed so far is not to be saved."""
        self.broken_at_start: set[str] = set()
        """Parameters that were not finite before the first update."""
        self.bad = BadImages(config.data.max_bad_share)
        self.best: dict[str, dict] = {}
        self.metrics: dict[str, dict] = {}
        self.ema_metrics: dict[str, dict] = {}
        self.evaluated_at: int | None = None
        self.missed_evaluation = False
        """The checkpoint's step was to be evaluated and was not."""
        self.improved = False
        self.signals, self.item, self.graphs, self.readers = Stop(), None, None, 1
        self.begun, self.seconds, self.eval_seconds = time.monotonic(), 0.0, 0.0
        self.eval_tasks, self.eval_datasets = self._open_evaluation()
        torch.manual_seed(seed_of(config.seed, "dropout"))

    def _open_evaluation(self) -> tuple[list[str], dict]:
        """Tasks that can be evaluated and their data sets: what is wrong with their files shows before training."""
        config, tasks, opened = self.config, [], {}
        if config.eval_every < 0:
            return tasks, opened
        for name, task in config.model.tasks.items():
            try:
                opened[name, config.eval_split] = open_dataset(
                    name, config.eval_split, config.data, task, augment=False,
                    vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
                )  # fmt: skip
                tasks.append(name)
            except MissingSplit as error:
                _log.warning("will not be evaluated: %s", error)
        return tasks, opened

    def _header(self, source: Path | None) -> None:
        config, (total, trainable) = self.config, parameter_counts(self.model)
        precision = "bf16" if self.bf16 else config.precision.replace("auto", "fp32")
        tasks = ", ".join(f"{get_task(n).short} {r:.2f} ({len(self.datasets[n])})" for n, r in self.ratios.items() if r)
        self.log.line(
            f"{config.recipe or 'run'}: {total:,} parameters, {trainable:,} trained | {self.device} "
            f"{precision}, {torch.get_num_threads()} threads | seed {config.seed}"
        )
        self.log.line(
            f"effective batch {config.effective_batch} ({config.batch_per_process} x {config.accumulate} accumulated"
            f"{''.join(f', {get_task(n).short} {b * config.accumulate}' for n, b in config.task_batch.items())}), "
            f"the paper's is 64 | ratio and training samples: {tasks}"
        )
        self.log.line(numerics.promise(config.deterministic, self.device))
        if source:
            self.log.line(f"going on after step {self.step} from {source}")

    @property
    def nonfinite_steps(self) -> int:
        """Updates that were refused."""
        return self.refused_before + self.refusals.total

    def _look_at_weights(self) -> None:
        """Warn of parameters that are not finite before the first update."""
        self.broken_at_start = set(not_finite(self.model))
        if self.broken_at_start:
            first = ", ".join(sorted(self.broken_at_start)[:3])
            _log.warning("%d tensors of the weights hold NaN or infinity: %s", len(self.broken_at_start), first)

    def check_weights(self) -> None:
        """``BrokenWeights`` if an update has made parameters that are not finite: loss and gradient do not tell."""
        if broken := [name for name in not_finite(self.model) if name not in self.broken_at_start]:
            raise BrokenWeights(
                f"{len(broken)} tensors of the weights are not finite after step {self.step} (first: {broken[0]}), "
                "though loss and gradient were before: an update was too large. Nothing of it is saved; a lower "
                "--optim.lr or a larger --optim.eps may help (with --resume auto add --allow-changed optim)"
            )

    # ------------------------------------------------------------------------------------- evaluate, save, restore

    def evaluate(self) -> Exception | None:
        """Metrics of every task that has the split; better ones mark this step as ``improved``.

        A failure is logged and returned: it does not end training.
        """
        begun = time.monotonic()
        self.log.note(f"evaluating after step {self.step}")
        error = None
        try:
            with self.signals.interrupting(self.model, *([self.ema.model] if self.ema else [])):
                if self.eval_tasks:
                    self.metrics = self._evaluate(self.model, "eval", "best", self.folder.path)
                    self.evaluated_at = self.step
                    if self.drawn:
                        self.drawn(self.folder.path, self.step)
                if self.eval_tasks and self.ema:
                    self.log.line("the averaged weights:")
                    self.ema_metrics = self._evaluate(self.ema.model, "eval_ema", "best_ema", None)
        except Interrupted:
            self.log.line("evaluation broken off")
        except Exception as caught:
            error = caught
            _log.error("evaluation after step %d failed: %s", self.step, caught, exc_info=True)
        self.eval_seconds += time.monotonic() - begun
        self.log.restart_clock()
        return error

    def _evaluate(self, model, kind: str, link: str, out: Path | None) -> dict[str, dict]:
        results = evaluate(
            model, self.config, tasks=self.eval_tasks, device=self.device, out=out, progress=False,
            datasets=self.eval_datasets,
        )  # fmt: skip
        self.log.evaluation(self.step, results, kind)
        self._keep_best(link, results)
        return results

    def _keep_best(self, link: str, results: dict[str, dict]) -> None:
        """Remember these results if they are the best by ``config.criterion``."""
        values = {t: m[get_task(t).metric] for t, m in results.items() if m.get(get_task(t).metric) is not None}
        if self.config.criterion != "mean":
            short = get_task(self.config.criterion).short
            values = {t: v for t, v in values.items() if t == short}
        if not values:
            return
        value = sum(values.values()) / len(values)
        if link not in self.best or value > self.best[link]["value"]:
            self.best[link] = {"step": self.step, "value": value, "criterion": self.config.criterion}
            self.improved = True

    def save(self, final: bool = False) -> None:
        """Checkpoint ``step_N``; then ``last``, and ``best`` if this step is it; then older ones go.

        A disk that refuses is reported and tried again at the next save, unless this is the last one. ``BrokenWeights``
        where there is nothing worth to be saved.
        """
        self.check_weights()
        parent, name = self.folder.checkpoints, f"step_{self.step:06d}"
        try:
            checkpoint.save(
                parent, name, self.model.state_dict(), self.config, self.state(),
                self.ema.model.state_dict() if self.ema else None,
            )  # fmt: skip
            checkpoint.point(parent, "last", name)
            for link, best in self.best.items():
                if best["step"] == self.step:
                    checkpoint.point(parent, link, name)
            self.saved_at = self.step
            checkpoint.prune(parent, self.config.keep_checkpoints)
        except (checkpoint.SaveError, OSError) as error:  # OSError: of a link, or of what is deleted
            if final:
                raise checkpoint.SaveError(str(error)) from error
            _log.error("%s; training goes on and tries again at the next save", error)
        self.improved = False
        self.log.restart_clock()

    def save_what_is_good(self, error: Exception) -> None:
        """Before ``error`` ends the run: save where it stands, if that is just after an update and the error is not of
        the weights or of saving itself. With its data gone a run loses nothing."""
        outside = isinstance(error, UserError | OSError) and not isinstance(error, checkpoint.SaveError | BrokenWeights)
        if not outside or self.updating or self.step == 0 or self.saved_at == self.step:
            return
        for record in self.log.flush():  # or their steps were done and never logged
            self.refusals.add(record.task, record.nonfinite)
        try:
            self.save()
        except BrokenWeights as broken:
            _log.error("%s", broken)

    def state(self) -> dict:
        """All that a resumed run needs besides weights and configuration."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "step": self.step,
            "counts": dict(self.counts),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "rng": rng,
            "best": self.best,
            "strikes": self.refusals.state(),
            "nonfinite_steps": self.nonfinite_steps,
            "bad_images": self.bad.state(),
            "seconds": self.seconds + time.monotonic() - self.begun,
            "eval_seconds": self.eval_seconds,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "engine": self.engine,
            "processes": 1,
            "data": self.data_digests,
        }

    def _restore(self, source: Path, allow_changed: Sequence[str]) -> None:
        """Put the run where checkpoint ``source`` was; ``UserError`` where anything of it does not fit."""
        saved = checkpoint.config_of(source)
        changed = check_resumable(source, saved, self.config, allow_changed)
        if changed:
            self.log.line(
                "changed since the checkpoint: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
            )
        if any(name == "graph" or name.startswith("buckets.") for name in changed):
            self.log.line(
                "captured steps are padded to buckets, others are not: from here on padding, and with it dropout and "
                "the last bits, may differ from what they would have been"
            )
        self.config = dataclasses.replace(self.config, started_from=saved.started_from)
        state = checkpoint.load_state(source)
        for line in check_same_data(state.get("data"), self.data_digests):
            _log.warning("%s", line)
        own = self.model.state_dict()
        checkpoint.fill(self.model, checkpoint.load_weights(source / checkpoint.WEIGHTS, expected=own))
        if self.ema:
            weights = checkpoint.load_weights(source / checkpoint.EMA, expected=own)
            checkpoint.fill(self.ema.model, weights)
        try:
            load_optimizer_state(self.model, self.optimizer, state["optimizer"])
            self.step, self.best = state["step"], state["best"]
            self.counts.update(state["counts"])
            self.refusals.restore(state["strikes"], [task for task, count in self.counts.items() if count])
            self.refused_before = state["nonfinite_steps"] - self.refusals.total
            self.bad = BadImages(self.config.data.max_bad_share, **state["bad_images"])
            self.seconds, self.eval_seconds = state["seconds"], state["eval_seconds"]
            now = {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "engine": self.engine}
            for key, value in now.items():
                if state[key] != value:
                    much = "by up to 2 of 255 steps of a pixel" if key == "engine" else "in the last bits"
                    _log.warning("the checkpoint had %s %s, now %s: results differ %s", key, state[key], value, much)
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
            elif self.device.type == "cuda" or "cuda" in state["rng"]:
                _log.warning("the checkpoint is from another kind of device: dropout will differ")
        except KeyError as error:
            raise UserError(f"{source / checkpoint.STATE_JSON}: lacks {error}; take another checkpoint") from None
        if self.step > self.config.steps:
            raise UserError(f"{source}: is at step {self.step}, beyond --steps {self.config.steps}; give more steps")
        self._restore_evaluation(source, saved, changed)

    def _restore_evaluation(self, source: Path, saved: RunConfig, changed) -> None:
        """Find out from the logged rows whether the checkpoint's step was evaluated; drop what will be logged again."""
        other = [name for name in ("criterion", "eval_split", "eval_limit") if name in changed]
        if other and self.best:
            self.log.line(f"with another {', '.join(other)} earlier results do not compare: the best is chosen anew")
            self.best = {}
        run = source.parents[1]
        rows = rows_at(run, self.step)
        names = {get_task(name).short for name in self.eval_tasks}
        whole = rows is not None and all(
            names <= rows.get(kind, {}).keys() for kind in ("eval", *(["eval_ema"] if self.ema else []))
        )
        own = run == self.folder.path.resolve()
        if own and whole and not other:
            self.evaluated_at, self.metrics = self.step, rows.get("eval", {})
            self.ema_metrics = rows.get("eval_ema", {})
        was_due = saved.eval_every > 0 and self.step % saved.eval_every == 0 and self.step < self.config.steps
        self.missed_evaluation = bool(self.eval_tasks and was_due and rows is not None and not whole)
        again = self.missed_evaluation or self.evaluated_at is None and self.step == self.config.steps
        self.log.forget_after(self.step, evaluations=not again)

    def make_up(self) -> None:
        """Evaluate the step that a run stopped at before it was evaluated: the best checkpoint may depend on it."""
        if self.missed_evaluation:
            self.missed_evaluation = False
            self.log.line(f"the evaluation after step {self.step} was not finished: it is made up for")
            self.evaluate()
            if self.improved:
                self.save()

    def _summary(self, status: str, message: str) -> None:
        content = {
            "status": status, "exit_code": EXIT[status], "message": message, "recipe": self.config.recipe,
            "step": self.step, "steps": self.config.steps, "metrics": self.metrics, "metrics_step": self.evaluated_at,
            "best": self.best, "seconds": round(self.seconds, 3),
            "train_seconds": round(self.seconds - self.eval_seconds, 3),
            "eval_seconds": round(self.eval_seconds, 3), "seed": self.config.seed, "threads": torch.get_num_threads(),
            "device": str(self.device), "samples": dict(self.counts), "bad_images": self.bad.state(),
            "nonfinite_steps": self.nonfinite_steps, "parameters": parameter_counts(self.model)[0],
            "environment": environment(),
        }  # fmt: skip
        if self.ema:
            content["ema_metrics"] = self.ema_metrics
        try:
            write(self.folder.path / "summary.json", json.dumps(finite(content), indent=2) + "\n")
        except OSError as error:
            self.log.line(f"summary.json: could not be written ({error.strerror}); the run is {status}: {message}")
