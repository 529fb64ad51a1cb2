"""Training: one update, and the loop.

What a run computes follows from its configuration and seed: tasks, samples and augmentation are pure functions of
counters (``data/sampler.py``), dropout follows the default generators, whose state is saved. Evaluation, saving and
logging touch none of these, so a run may be cut anywhere and go on to the same bits (at one thread count).
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.batch import Batch, Output
from unit_fast.buckets import buckets_of
from unit_fast.config import RunConfig
from unit_fast.data.loader import Loader
from unit_fast.errors import OutOfMemory, UserError, printable
from unit_fast.numerics import arithmetic
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run import step_graph
from unit_fast.run.folder import EXIT, RunFolder, write
from unit_fast.run.log import Record
from unit_fast.run.refusals import NonFinite
from unit_fast.run.state import RunState
from unit_fast.run.step_graph import StepGraphs
from unit_fast.schedule import lr_multiplier, lr_multiplier_tensor

_log = logging.getLogger("unit_fast.train")


@dataclass
class Run:
    """What ``train`` returns."""

    folder: Path
    model: torch.nn.Module
    config: RunConfig
    status: str
    """A key of ``run_folder.EXIT``."""
    step: int
    """Updates done."""
    metrics: dict[str, dict] = field(default_factory=dict)
    """Short task name -> metrics of the last evaluation."""

    @property
    def exit_code(self) -> int:
        return EXIT[self.status]


# ------------------------------------------------------------------------------------------------------ one update


@dataclass
class Update:
    """Figures of one update, on the device."""

    names: tuple[str, ...]
    """Names of the loss terms."""
    terms: Tensor
    """[n] their values over all samples of the update. Their sum is the step loss."""
    grad_norm: Tensor
    """0-d, before clipping."""
    nonfinite: Tensor
    """0-d, not zero if loss or gradient was not finite and nothing was changed."""


def train_step(
    model: torch.nn.Module,
    optimizer: MaskedAdamW,
    task: str,
    batch: Batch | Sequence[Batch],
    *,
    used: Tensor | None = None,
    bf16: bool = False,
) -> Update:
    """One update of ``model`` on ``task`` from a batch, or from several, whose samples count as those of one batch.

    used: uint8 [n] in the optimiser's parameter order, see ``setup_model.used_masks``. bf16: autocast of the forward
    pass; matching and losses are float32. Nothing is read back from the device, save for matching on a CPU. An update
    whose loss or gradient is not finite changes nothing. ``ValueError`` if a batch is of another task.
    """
    batches = [batch] if isinstance(batch, Batch) else batch
    if any(micro.task != task for micro in batches):
        raise ValueError(f"train_step: task is {task!r}, the batches are of {[micro.task for micro in batches]}")
    device = next(model.parameters()).device.type
    optimizer.zero_grad(set_to_none=True)
    terms, samples = 0.0, sum(map(len, batches))
    # Losses with denominators of their own (boxes, say) need the whole update's; alone, a batch is the whole update.
    shares = [{"share": share} for share in model.shares(batches)] if len(batches) > 1 else [{}]
    for micro, share in zip(batches, shares, strict=True):
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            out = model(micro)
        losses = model.losses(_float32(out) if bf16 else out, micro, **share)
        values = torch.stack(list(losses.values())) / (samples / len(micro))
        loss, values = values.sum(), values.detach()
        # An infinite loss can have a finite gradient: this makes it NaN, which the optimiser refuses.
        (loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()
        terms = terms + values
    stats = optimizer.step(used)
    return Update(tuple(losses), terms, stats.grad_norm, stats.nonfinite)


def _float32(out: Output) -> Output:
    floats = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    return Output(**{k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in floats.items()})


# ------------------------------------------------------------------------------------------------------- the loop


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` updates (0 or less: only at the end) is due after ``step``."""
    return every > 0 and step % every == 0


def train(
    config: RunConfig,
    out: str | Path,
    resume: str | Path | None = None,
    *,
    stop_at: int | None = None,
    allow_changed: Sequence[str] = (),
    progress: str = "auto",
    drawn: Callable[[Path, int], object] | None = None,
) -> Run:
    """Train ``config`` in the run folder ``out``.

    resume: ``"auto"`` goes on from the newest intact checkpoint in ``out``, or starts if there is none; a path goes on
    from that checkpoint. allow_changed: dotted config names that may differ from the checkpoint's. stop_at: save and
    return after this many updates in all, as if interrupted (the schedule still spans ``config.steps``).
    progress: see ``logging.RunLog``. drawn: called with run folder and step after each evaluation, to draw examples.

    Ctrl-C, SIGTERM and SIGHUP save and return a ``Run`` with status ``interrupted``. ``UserError`` on bad input;
    ``NonFinite`` after three updates in a row, of the run or of a task, that are not finite (they change nothing), or
    where an update made weights that are not. ``summary.json`` says how it ended.
    """
    size = os.environ.get("WORLD_SIZE", "1").strip()
    if size not in ("", "0", "1"):
        raise UserError(
            f"more than one process is not supported yet: start without torchrun (WORLD_SIZE is {printable(size)})"
        )
    folder = RunFolder(out)
    try:
        if folder.used and resume is None:
            raise UserError(f"{out}: holds a run already; go on with --resume auto, or give another --out")
        return Trainer(config, folder, resume, allow_changed, progress, drawn).run(stop_at)
    finally:
        folder.release()


class Trainer(RunState):
    """A run under way."""

    def _loop(self, stop: int) -> None:
        """Train up to ``stop`` updates, or until a signal asks to stop."""
        config, model, optimizer = self.config, self.model.train(), self.optimizer
        graphs = self.graphs = self._capturing()
        loader = Loader(self.datasets, config, self.step, stop, self.counts, device=self.device)
        with loader as batches:
            self.readers = loader.readers
            self.log.line(loader.describe())
            self.log.restart_clock()
            for step in range(self.step, stop):
                task, batch = self._next(batches)  # one task a step
                if graphs:
                    update = graphs(task, batch)
                else:
                    optimizer.scale_lr(self._lr_multiplier(step))
                    update = train_step(model, optimizer, task, batch, used=self.masks[task], bf16=self.bf16)
                self._count(update)
                evaluating, saving = due(self.step, config.eval_every), due(self.step, config.save_every)
                if due(self.step, config.log_every) or evaluating or saving or self._last(stop):
                    self._check(self.log.flush())
                    if graphs:
                        graphs.check()
                if evaluating and self.step < config.steps:
                    self.evaluate()
                if self.improved or (saving and self.step < config.steps):
                    self.save()
                if self._last(stop):
                    break
        self.log.line(loader.summary())
        if graphs:
            self.log.line(graphs.summary())

    def _capturing(self) -> StepGraphs | None:
        """What captures whole steps, or None where they run eagerly."""
        if why_not := step_graph.wanted(self.config.graph, self.device):
            self.log.line(f"every step runs eagerly, without CUDA graphs: {why_not}")
            return None
        config, model, optimizer = self.config, self.model, self.optimizer
        optimizer.prepare()

        def step(task: str, batches: list[Batch], done: Tensor) -> Update:
            # The learning rate follows the count on the device: a number of the host would be frozen into the graph.
            optimizer.scale_lr(lr_multiplier_tensor(done, config.optim.warmup_steps, config.steps))
            update = train_step(model, optimizer, task, batches, used=self.masks[task], bf16=self.bf16)
            optimizer.zero_grad(set_to_none=True)  # their memory is the graphs', and the next step's too
            return update

        buckets = buckets_of(config)
        self.log.line(f"steps are captured as CUDA graphs, images padded to one of {len(buckets.images)} shapes")
        return StepGraphs(step, buckets, self.device, done=self.step)

    def _lr_multiplier(self, done: int) -> float:
        """Factor on the learning rates of the update after ``done`` ones."""
        return lr_multiplier(done, self.config.optim.warmup_steps, self.config.steps)

    def _last(self, stop: int) -> bool:
        """Whether the loop ends here."""
        return self.step == stop or self.signals.requested is not None

    def _next(self, batches: Loader) -> tuple[str, list[Batch]]:
        """The next step's task and batches; a captured step copies them into its own tensors."""
        begun = time.monotonic()
        self.item = next(batches)
        self.wait_s = time.monotonic() - begun
        found = self.item.batches
        self.updating = True
        return self.item.task, found if self.graphs else [batch.to(self.device) for batch in found]

    def _count(self, update: Update) -> None:
        """An update is done: move the counters on and hand its figures to the log, unread."""
        item = self.item
        self.step += 1
        self.counts[item.task] += item.request.samples
        if self.ema:
            self.ema.update(update.nonfinite)
        self.updating = False
        for message in self.bad.add(item):
            self.log.line(f"unreadable image: {message}")
        record = Record(
            step=self.step,
            task=item.task,
            lr=self._lr_multiplier(self.step - 1) * self.config.optim.lr,
            samples=item.request.samples,
            wait_s=self.wait_s,
            images=sum(len(batch) for batch in item.batches if batch.image is not None),
            read_s=item.read_s / self.readers,
            real=item.real,
            request=item.request,
            sample_ids=[i for batch in item.batches for i in batch.sample_ids or ()],
        )
        self.log.log(record, update.names, update.terms, update.grad_norm, update.nonfinite)

    def _check(self, records: list[Record]) -> None:
        """Report the updates that were not finite; ``NonFinite`` after too many of them in a row, all or of a task."""
        for record in records:
            many = self.refusals.add(record.task, record.nonfinite)
            if not record.nonfinite:
                continue
            terms = ", ".join(f"{name.rsplit('/')[-1]} {value:.4g}" for name, value in record.terms.items())
            where = self._dump(record)
            what = (
                f"step {record.step}, {record.task}, samples {printable(record.sample_ids)}: loss {record.loss:.4g} "
                f"({terms}), gradient norm {record.grad_norm:.4g}"
            )
            self.log.line(f"not finite, nothing was changed: {what}; details in {where}")
            if many:
                self.check_weights()
                raise NonFinite(
                    f"{many} were not finite, the last: {what}. Nothing of them reached the weights. Look at {where}; "
                    "a lower --optim.lr or --precision fp32 may help (with --resume auto add --allow-changed optim.lr "
                    "or precision)"
                )

    def _dump(self, record: Record) -> Path:
        """What is needed to make the batch again: it is a function of these numbers."""
        path = self.folder.path / "nonfinite" / f"step_{record.step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        content = dataclasses.asdict(record) | {"seed": self.config.seed}
        write(path, json.dumps(content, indent=1, default=str) + "\n")
        return path

    def run(self, stop_at: int | None) -> Run:
        """Train, evaluate, save; whatever the end is, ``summary.json`` tells it."""
        status, message, self.begun = "failed", "", time.monotonic()
        try:
            with self.signals, arithmetic(self.config.precision, self.config.deterministic, self.device):
                self.make_up()
                if self.signals.requested is None:
                    self._loop(min(self.config.steps, stop_at or self.config.steps))
                status = self.finish()
            if status == "interrupted":
                why = self.signals.requested or "stopped"
                message = f"{why} after step {self.step}: saved; go on with {self._resume_command()}"
                self.log.line(message)
        except KeyboardInterrupt:
            status, message = "killed", f"stopped at once in step {self.step}; go on with {self._resume_command()}"
            raise
        except torch.cuda.OutOfMemoryError as error:
            status, message = OutOfMemory.status, self._memory_message(error)
            raise OutOfMemory(message) from error
        except Exception as error:
            status, message = getattr(error, "status", "failed"), str(error)
            self.save_what_is_good(error)
            raise
        finally:
            self.seconds += time.monotonic() - self.begun
            self._summary(status, message)
            self.log.close()
        return Run(self.folder.path, self.model, self.config, status, self.step, self.metrics)

    def finish(self) -> str:
        """The last evaluation and the last checkpoint; a failed evaluation is an error only after the save."""
        error, done = None, self.step >= self.config.steps and not self.signals.requested
        if done and self.config.eval_every >= 0 and self.evaluated_at != self.step:
            error = self.evaluate()
        self.save(final=True)
        if error:
            raise error
        if done and (never := self.refusals.untrained()):
            raise NonFinite(
                f"not one update of {', '.join(f'{task} ({count})' for task, count in never.items())} was finite: it "
                f"was not trained. Look at {self.folder.path / 'nonfinite'} and at the weights the run started from"
            )
        return "finished" if done and not self.signals.requested else "interrupted"

    def _resume_command(self) -> str:
        return f"unit-fast train --resume auto --out {shlex.quote(str(self.folder.path))}"

    def _memory_message(self, error: Exception) -> str:
        batch = self.config.batch_of(self.item.task) if self.item else self.config.batch_per_process
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else math.nan
        task = self.item.task if self.item else "the model"
        return (
            f"out of memory in step {self.step + 1} on {task}, batch {batch}, peak {peak:.1f} GiB "
            f"({printable(str(error).splitlines()[0])}). In this order: halve --batch and double --accumulate; use "
            "--precision bf16; lower --data.max-side and --data.train-short-sides. A run that goes on with --resume "
            "takes them with --allow-changed, e.g. --allow-changed batch_per_process,accumulate"
        )
