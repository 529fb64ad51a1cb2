"""Training, to be read from here: ``train``, and the loop.

What a run computes follows from its configuration and seed: tasks, samples and augmentation are pure functions of
counters (``data/sampler.py``), dropout follows the default generators, whose state is saved. Evaluation, saving and
logging touch none of these, so a run may be cut anywhere and go on to the same bits (at one thread count).
"""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unit_fast.config import RunConfig
from unit_fast.data.loader import Loader
from unit_fast.numerics import arithmetic
from unit_fast.run.ending import Run, early_end, finish, save_what_is_good, write_summary
from unit_fast.run.folder import RunFolder, check_unused
from unit_fast.run.log import Record
from unit_fast.run.memory import memory_told
from unit_fast.run.refusals import NonFinite
from unit_fast.run.start import Parts, check_one_process, start
from unit_fast.run.step import Step, Update, train_step
from unit_fast.run.tracking import open_trackers
from unit_fast.schedule import due

__all__ = ["NonFinite", "Run", "Update", "train", "train_step"]


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
    progress: see ``log.RunLog``. drawn: called with run folder and step after each evaluation, to draw examples.

    Ctrl-C, SIGTERM and SIGHUP save and return a ``Run`` with status ``interrupted``. ``UserError`` on bad input;
    ``NonFinite`` after three updates in a row, of the run or of a task, that are not finite (they change nothing), or
    where an update made weights that are not. ``summary.json`` says how it ended.
    """
    check_one_process()
    folder = RunFolder(out)
    try:
        check_unused(out, resume)
        return _run(start(config, folder, resume, allow_changed, progress, drawn), stop_at)
    finally:
        folder.release()


def _run(parts: Parts, stop_at: int | None) -> Run:
    """Train, evaluate, save; whatever the end is, ``summary.json`` tells it."""
    config, state, device, log, signals = parts.config, parts.state, parts.device, parts.log, parts.signals
    go_on = f"go on with unit-fast train --resume auto --out {shlex.quote(str(parts.folder))}"
    status, message, state.begun = "failed", "", time.monotonic()
    try:
        with signals, arithmetic(config.precision, config.deterministic, device), memory_told(state, config, device):
            log.trackers = open_trackers(config.track, parts.folder, config, state.step)
            if parts.missed_evaluation:  # the best checkpoint may depend on it
                log.line(f"the evaluation after step {state.step} was not finished: it is made up for")
            due_now = parts.missed_evaluation or parts.evaluator.due_first(state)
            if due_now and parts.evaluator.evaluate(state).improved:
                parts.save()
            if signals.requested is None and not parts.evaluator.patience_is_over(state):
                loop(parts, min(config.steps, stop_at or config.steps))
            status = finish(parts)
            if status == "finished" and state.step < config.steps:
                message = early_end(state, config)
                log.line(message)
        if status == "interrupted":
            message = f"{signals.requested or 'stopped'} after step {state.step}: saved; {go_on}"
            log.line(message)
    except KeyboardInterrupt:
        status, message = "killed", f"stopped at once in step {state.step}; {go_on}"
        raise
    except Exception as error:
        status, message = getattr(error, "status", "failed"), str(error)
        save_what_is_good(parts, error)
        raise
    finally:
        write_summary(parts, status, message)
        log.close()
    return Run(parts.folder, state.model, config, status, state.step, parts.evaluator.metrics)


def loop(parts: Parts, stop: int) -> None:
    """Train up to ``stop`` updates, or until a signal asks to stop."""
    config, state, log, guard = parts.config, parts.state, parts.log, parts.guard
    step = Step(state, config, parts.masks, parts.device)
    say = log.line if parts.device.type == "cuda" else log.to_file
    say(step.describe())
    log.note("waiting for the first samples")
    with Loader(parts.datasets, config, state.step, stop, state.counts, device=parts.device) as batches:
        say(batches.describe())
        log.restart_clock()
        for _ in range(state.step, stop):
            begun = time.monotonic()
            item = next(batches)  # one task a step
            wait_s = time.monotonic() - begun
            with state.updating():
                update = step(item.task, item.batches)
                state.count(item.request)
            for line in state.bad.told(item):
                log.line(line)
            lr = step.lr_multiplier(state.step - 1) * config.optim.lr
            log.log(Record.of(item, state.step, lr, wait_s, batches.readers), update)  # not read yet
            last = state.step == config.steps
            evaluating, saving = due(state.step, config.eval_every), due(state.step, config.save_every)
            if due(state.step, config.log_every) or evaluating or saving:
                guard.judge(log.flush())
                step.check()
                if found := parts.watch.look():
                    log.line(found)
            improved = evaluating and not last and parts.evaluator.evaluate(state).improved
            if improved or (saving and not last):
                parts.save()
            if parts.signals.requested or evaluating and parts.evaluator.patience_is_over(state):
                break
        guard.judge(log.flush())
        step.check()
    log.to_file(batches.summary())
    if step.graphs:
        log.to_file(step.graphs.summary())
