"""A run before its first update: from configuration and folder to the parts it is made of."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unit_fast import numerics
from unit_fast.config import RunConfig
from unit_fast.data.bad_images import BadImages
from unit_fast.data.images.engine import engine_of
from unit_fast.data.outputs import resolved
from unit_fast.data.sampler import normalised, seed_of
from unit_fast.data.vocabulary import VOCABULARY, with_kept_vocabulary, with_vocabulary
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.labels import find_labels, write_labels
from unit_fast.run import tracking
from unit_fast.run.batch_size import with_batch
from unit_fast.run.checkpoints import Checkpoints
from unit_fast.run.ema import Ema
from unit_fast.run.evaluator import Evaluator
from unit_fast.run.folder import RunFolder
from unit_fast.run.guard import Guard
from unit_fast.run.log import RunLog
from unit_fast.run.setup import build, device_of, open_split, parameter_counts, used_masks
from unit_fast.run.signals import Stop
from unit_fast.run.state import State
from unit_fast.tasks import TASKS, get_task
from unit_fast.threads import Watch
from unit_fast.weights import checkpoint

_log = logging.getLogger("unit_fast.train")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of."""

    config: RunConfig
    device: torch.device
    folder: Path
    log: RunLog
    signals: Stop
    datasets: dict
    """Data set key -> training samples."""
    masks: dict[str, Tensor]
    """Data set key -> the parameters an update uses."""
    state: State
    checkpoints: Checkpoints
    evaluator: Evaluator
    guard: Guard
    watch: Watch
    """Looks whether other jobs slow the CPU threads down."""
    missed_evaluation: bool
    """Whether the checkpoint's step was to be evaluated and was not."""

    def save(self, *, final: bool = False) -> None:
        """Save a checkpoint, see ``Checkpoints.save``. ``BrokenWeights`` where there is nothing worth to be saved."""
        self.guard.check_weights()
        self.checkpoints.save(self.state, self.config, final=final)
        self.log.restart_clock()


def check_one_process() -> None:
    """``UserError`` under torchrun with more than one process."""
    size = os.environ.get("WORLD_SIZE", "1").strip()
    if size not in ("", "0", "1"):
        raise UserError(
            f"more than one process is not supported yet: start without torchrun (WORLD_SIZE is {printable(size)})"
        )


def start(config: RunConfig, folder: RunFolder, resume, allow_changed: Sequence[str], progress: str, drawn) -> Parts:
    """Make a run in ``folder``, or take it up where a checkpoint left it; see ``train.train``."""
    checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
    log = RunLog(folder.path, config.steps, progress)
    try:
        return _start(config, folder, resume, allow_changed, drawn, checkpoints, log)
    except BaseException as error:
        if isinstance(error, UserError):
            log.to_file(f"not started: {error}")
        log.close()
        raise


def _start(config, folder: RunFolder, resume, allow_changed, drawn, checkpoints: Checkpoints, log: RunLog) -> Parts:
    source = checkpoints.find(resume)
    config, lines = completed(config, source, folder.path)
    for line in lines:
        log.line(line)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.criterion != "mean" and get_task(config.criterion).name not in config.model.tasks:
        _log.warning("criterion %s is not trained: the best mean over tasks is kept instead", config.criterion)
        config = dataclasses.replace(config, criterion="mean")
    device = device_of(config)
    numerics.check(config.precision, device)
    tracking.check(config.track)
    saved = checkpoint.config_of(source) if source else None
    config, batch = with_batch(config, device, saved)
    ratios = normalised(config.ratios, config.model.tasks)
    trained = [name for name in config.model.tasks if ratios[name] > 0]
    datasets = {name: open_split(config, name, "train", augment=config.data.augment) for name in trained}
    digests = {name: dataset.digest() for name, dataset in datasets.items()}
    model, optimizer, config = build(config, device, pretrained=source is None)
    state = State(
        model=model,
        optimizer=optimizer,
        ema=Ema(model, config.ema_decay) if config.ema_decay else None,
        bad=BadImages(config.data.max_bad_share),
        engine=engine_of(config.data),
        data=digests,
    )
    state.counts.update(dict.fromkeys(datasets, 0))
    signals, missed = Stop(), False
    evaluator = Evaluator(config, device, folder.path, log, signals, drawn)
    torch.manual_seed(seed_of(config.seed, "dropout"))
    log.seconds = lambda: state.seconds
    if source:
        changed = checkpoints.restore(source, state, saved, config, allow_changed, log)
        config = dataclasses.replace(config, started_from=saved.started_from)
        missed = evaluator.resume(source, state, saved, changed)
    elif resume is not None and folder.used:
        log.line("nothing was saved before: starting anew, what was logged of the steps is dropped")
        log.forget_after(0, evaluations=False)
    guard = Guard(state, folder.path / "nonfinite", log, config.seed)
    folder.begin(config)
    write_labels(folder.path, config, datasets)
    for line in filter(None, [*_header(config, device, state, ratios, datasets), batch]):
        log.line(line)
    log.to_file(numerics.promise(config.deterministic, device))
    if config.early_stop:
        evaluator.check_criterion()
    if source:
        log.line(f"going on after step {state.step} from {source}")
    return Parts(
        config=config, device=device, folder=folder.path, log=log, signals=signals, datasets=datasets,
        masks=used_masks(model, optimizer, datasets), state=state, checkpoints=checkpoints, evaluator=evaluator,
        guard=guard, watch=Watch(torch.get_num_threads() if device.type == "cpu" else 1), missed_evaluation=missed,
    )  # fmt: skip


def completed(config: RunConfig, source: Path | None, folder: Path | None = None) -> tuple[RunConfig, list[str]]:
    """The configuration of a run with what follows from its data, and lines that tell it.

    source: the checkpoint it goes on from. folder: keep the vocabulary there where the data root does not have it.
    """
    before = source and find_labels(source)
    config, lines = resolved(with_kept_vocabulary(config, before and before / VOCABULARY))
    config, more = with_vocabulary(config, _vocabularies(config, source), folder)
    return config, lines + more


def _vocabularies(config: RunConfig, source: Path | None) -> Iterator[Path]:
    """Vocabularies that the run's weights were trained with, where they have one beside them."""
    for weights in filter(None, (source, config.init_from)):
        if (labels := find_labels(weights)) is not None:
            yield labels / VOCABULARY
    if config.weights:
        yield Path(config.weights) / "bert-base-uncased" / VOCABULARY


def _header(config: RunConfig, device: torch.device, state: State, ratios: dict[str, float], datasets: dict):
    """The lines that say what is run."""
    total, trainable = parameter_counts(state.model)
    bf16 = numerics.takes_bf16(config.precision, device)
    precision = "bf16" if bf16 else config.precision.replace("auto", "fp32")
    tasks = ", ".join(f"{get_task(n).short} {r:.2f} ({len(datasets[n])})" for n, r in ratios.items() if r)
    batches = "".join(f", {get_task(n).short} {b * config.accumulate}" for n, b in config.task_batch.items())
    paper = ", the paper's is 64" if TASKS.keys() >= config.model.tasks.keys() else ""
    yield (
        f"{config.recipe or 'run'}: {total:,} parameters, {trainable:,} trained | {device} "
        f"{precision}, {torch.get_num_threads()} threads | seed {config.seed}"
    )
    yield (
        f"effective batch {config.effective_batch} ({config.batch_per_process} x {config.accumulate} accumulated"
        f"{batches}){paper} | ratio and training samples: {tasks}"
    )
