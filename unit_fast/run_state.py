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

from unit_fast import checkpoint
from unit_fast.config import RunConfig
from unit_fast.data import MissingSplit, open_dataset
from unit_fast.data.digests import check_same_data
from unit_fast.data.images import engine_of
from unit_fast.data.loader import BadImages
from unit_fast.data.sampler import normalised, seed_of
from unit_fast.env import environment
from unit_fast.errors import UserError
from unit_fast.evaluate import evaluate
from unit_fast.labels import write_labels
from unit_fast.logging import RunLog, finite
from unit_fast.run_folder import EXIT, Interrupted, RunFolder, Stop, write
from unit_fast.setup_model import (
    Ema,
    build,
    check_config,
    device_of,
    load_optimizer_state,
    optimizer_state,
    parameter_counts,
    used_masks,
)
from unit_fast.tasks import get_task

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
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
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
        self.strikes = self.nonfinite_steps = 0
        self.bad = BadImages(config.data.max_bad_share)
        self.best: dict[str, dict] = {}
        self.metrics: dict[str, dict] = {}
        self.ema_metrics: dict[str, dict] = {}
        self.evaluated_at: int | None = None
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
        tasks = ", ".join(f"{get_task(n).short} {r:.2f} ({len(self.datasets[n])})" for n, r in self.ratios.items() if r)
        self.log.line(
            f"{config.recipe or 'run'}: {total:,} parameters, {trainable:,} trained | {self.device} "
            f"{'bf16' if self.bf16 else 'fp32'}, {torch.get_num_threads()} threads | seed {config.seed}"
        )
        self.log.line(
            f"effective batch {config.effective_batch} ({config.batch_per_process} x {config.accumulate} accumulated"
            f"{''.join(f', {get_task(n).short} {b * config.accumulate}' for n, b in config.task_batch.items())}), "
            f"the paper's is 64 | ratio and training samples: {tasks}"
        )
        if source:
            self.log.line(f"going on after step {self.step} from {source}")

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

        A disk that refuses is reported and tried again at the next save, unless this is the last one.
        """
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
            checkpoint.prune(parent, self.config.keep_checkpoints)
        except checkpoint.SaveError as error:
            if final:
                raise
            _log.error("%s; training goes on and tries again at the next save", error)
        self.improved = False
        self.log.restart_clock()

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
            "strikes": self.strikes,
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
        changed = checkpoint.check_resumable(source, saved, self.config, allow_changed)
        if changed:
            self.log.line(
                "changed since the checkpoint: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
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
            self.strikes, self.nonfinite_steps = state["strikes"], state["nonfinite_steps"]
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
        self.log.forget_after(self.step)

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
        write(self.folder.path / "summary.json", json.dumps(finite(content), indent=2) + "\n")
