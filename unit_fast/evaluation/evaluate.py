"""Evaluation of a model on the data sets' splits (SPEC 5.3): metrics, losses, prediction files and a few examples.

The loop is the same for the eight tasks; what differs stands in ``task_results.py``.
"""

import contextlib
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from unit_fast import numerics
from unit_fast.batch import Batch, Output
from unit_fast.config import RunConfig
from unit_fast.data import BadImage, MissingSplit, open_dataset
from unit_fast.data.bad_images import BadImages
from unit_fast.data.images.engine import engine_of
from unit_fast.data.split_reader import SplitReader, groups
from unit_fast.errors import OutOfMemory, UserError, is_out_of_memory, nearest, printable
from unit_fast.evaluation.metrics import find_scorer
from unit_fast.evaluation.task_results import (
    KINDS,
    Readback,
    finite_rows,
    in_full_precision,
    nonfinite_weights,
    pick,
    why_nonfinite,
    write_aside,
)
from unit_fast.tasks import Task, get_task

EXAMPLES = 8
"""Samples of each task kept for the report: evenly spread over the split, the same at every evaluation."""

WINDOW, WINDOW_ON_GPU = 8, 4096
"""Batches, and samples on a GPU, that are grouped by size together."""

READ_EVERY = 32
"""Batches whose values are fetched from the device in one copy."""

_log = logging.getLogger("unit_fast.evaluate")


def evaluate(
    model,
    config: RunConfig,
    *,
    tasks=None,
    split: str | None = None,
    device=None,
    out: str | Path | None = None,
    limit: int | None = None,
    progress: bool = True,
    coco_scorer: str = "auto",
    attributes: bool = False,
    datasets: dict | None = None,
) -> dict[str, dict]:
    """Metrics of ``model`` on a split of each task: short task name -> figures.

    tasks: names to evaluate, default all of the model. split: default ``config.eval_split``. device: default where the
    model is. limit: samples a task, evenly spread over the split; 0 takes all, None ``config.eval_limit``. out: a
    folder (of a run) that receives ``predictions/``, ``examples/`` and ``examples.json``. coco_scorer: one of
    ``metrics.SCORERS``. attributes: write the attribute of each Visual Genome box (``attr_label``, ``attr_score``) into
    the prediction file. datasets: open data sets by (data set key, split); those opened here are added, so that a
    caller can keep them for the next time.

    Figures: the task's metric under its key and, for detection, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` where
    defined; ``chance``, what the best constant prediction reaches; ``count``, the samples with labels (detection: the
    images); ``loss``, the mean over samples of the training loss; ``unreadable``, images that could not be read, where
    there were any; ``seconds``. Samples without labels are predicted but not counted: a split without any has ``count``
    0 and no metric. A task whose split is missing is left out with one log line.

    On a CPU the reference engine reads; on a GPU ``config.data.engine`` does, as in training. Batches of
    ``config.eval_batch`` samples are grouped by size; the device is read once in ``READ_EVERY`` of them.

    An unreadable image counts as an image without detections, elsewhere its samples are left out; more of them than
    training would bear (``data.bad_images``), or no readable sample at all, are a ``UserError``. So is an output
    that is not finite; ``OutOfMemory`` where memory did not suffice. An error names the task. The model's training mode
    and all random number generators are as before on return.
    """
    find_scorer(coco_scorer)
    chosen = _chosen(model, tasks)
    split = split or config.eval_split
    limit = config.eval_limit if limit is None else limit
    if limit < 0 or config.eval_batch < 1:
        raise UserError(f"limit is {limit} and eval_batch {config.eval_batch}; give at least 0 and 1")
    out = None if out is None else Path(out)
    datasets = {} if datasets is None else datasets
    results, examples = {}, {}
    with _evaluation_mode(model, device) as device:
        if weights := nonfinite_weights(model):
            _log.warning("%s: figures of such a model say little", weights)
        for task in chosen:
            try:
                dataset = _opened(datasets, task, split, config)
            except MissingSplit as error:
                _log.warning("%s: not evaluated: %s", task.short, error)
                continue
            try:
                run = _TaskRun(model, config, task, dataset, split, device, limit, progress, attributes)
                results[task.short] = run.metrics(coco_scorer)
                if out is not None:
                    run.write_predictions(out / "predictions")
                    examples[task.short] = run.write_examples(out)
            except UserError as error:
                raise UserError(f"evaluation of {task.short} on {split}: {error}") from error
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemory(_memory_message(task, split, config, device, error)) from error
                raise RuntimeError(
                    f"evaluation of {task.short} on {split} failed: {type(error).__name__}: {error}"
                ) from error
            _log.info("%s %s: %s", task.short, split, describe(task, results[task.short]))
    if out is not None:
        _merge_json(out / "examples.json", examples)
    return results


def _chosen(model, names) -> list[Task]:
    """The tasks to evaluate, each once; ``UserError`` on one that the model does not have, or on none."""
    chosen = list(dict.fromkeys(get_task(name) for name in (model.config.tasks if names is None else names)))
    known = [get_task(name).short for name in model.config.tasks]
    if not chosen:
        raise UserError(f"tasks: none given to evaluate; known: {', '.join(known)}")
    for task in chosen:
        if task.name not in model.config.tasks:
            raise UserError(f"task {task.short!r}: this model does not have it; {nearest(task.short, known)}")
    return chosen


def _memory_message(task: Task, split: str, config: RunConfig, device: torch.device, error: Exception) -> str:
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"evaluation of {task.short} on {split}: out of memory, batch {config.eval_batch}{peak} ({printable(first)}). "
        "In this order: a smaller --batch (in training --eval-batch); --precision bf16; a lower --data.max-side"
    )


def describe(task: Task, metrics: dict) -> str:
    """One line of text for a task's figures, e.g. ``accuracy 0.812 (chance 0.343) | loss 0.52 | 160 samples``."""
    value = metrics.get(task.metric)
    none = f"no {task.metric}: nothing to find" if metrics["count"] else "no labels"
    parts = [f"{task.metric} {value:.4f} (chance {metrics['chance']:.4f})" if value is not None else none]
    if "AP50" in metrics:
        parts.append(f"AP50 {metrics['AP50']:.4f}")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4g}")
    parts.append(f"{metrics['count']} {'images' if task.is_detection else 'samples'}")
    if metrics.get("unreadable"):
        parts.append(f"{metrics['unreadable']} unreadable images")
    return " | ".join(parts)


@contextlib.contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which a model runs on ``device`` under ``RunConfig.precision``; off CUDA tf32 is fp32."""
    bf16 = numerics.takes_bf16(precision, device)
    with (
        numerics.arithmetic(precision, "auto", device),
        torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def _evaluation_mode(model, device):
    """Evaluation mode without gradients; yields the device. Modes of all modules and random states come back."""
    parameter = next(model.parameters())
    device = parameter.device if device is None else torch.device(device)
    if device != parameter.device:
        model.to(device)
    modes = [(module, module.training) for module in model.modules()]
    cuda = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        model.eval()
        try:
            yield device
        finally:
            for module, mode in modes:
                module.training = mode


def _opened(datasets: dict, task: Task, split: str, config: RunConfig):
    key = (task.name, split)
    if key not in datasets:
        datasets[key] = open_dataset(
            task.name, split, config.data, config.model.tasks[task.name], augment=False,
            vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
        )  # fmt: skip
    return datasets[key]


# ------------------------------------------------------------------------------------------- one task


class _TaskRun:
    """One pass over one split of one task; predictions, sums and examples."""

    def __init__(self, model, config: RunConfig, task: Task, dataset, split, device, limit, progress, attributes):
        self.model, self.config, self.task, self.dataset, self.split = model, config, task, dataset, split
        self.device = device
        self.kind = KINDS[task.loss](dataset, task, attributes)
        self.loss, self.loss_count = 0.0, 0
        self.images: set[str] = set()
        """Images that were read; a data set may have several samples of one."""
        self.bad_images: dict[str, str] = {}
        """Path and message of those that could not be."""
        total = len(dataset)
        self.limited = 0 < limit < total
        self.indices = spread(total, limit if self.limited else total)
        self.shown = {self.indices[i] for i in spread(len(self.indices), EXAMPLES)}
        self.examples = {}
        started = time.perf_counter()
        self._run(progress)
        self.seconds = time.perf_counter() - started

    def _run(self, progress: bool) -> None:
        """All batches. The device is read once in ``READ_EVERY`` of them, while the next ones are computed."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        waiting, flying, done = [], None, 0
        with (
            _progress_bar(f"evaluate {self.task.short}", len(self.indices), progress) as advance,
            contextlib.closing(self._groups()) as groups,
        ):
            for batch, members, labelled in groups:
                batch = batch.to(self.device, dtype)
                with autocast(self.device, self.config.precision):
                    output = self.model(batch)
                waiting.append((members, labelled, self._values(output, batch, labelled)))
                if len(waiting) == READ_EVERY:
                    flying = self._read_back(waiting, flying)
                    waiting = []
                advance(len(members))
                done += len(members)
            if waiting:
                flying = self._read_back(waiting, flying)
            if flying:
                self._take(*flying)
        self._judge(len(self.images) + len(self.bad_images))
        if not done:
            raise UserError(f"none of {len(self.indices)} samples could be read (first: {self._first_bad()})")

    def _values(self, output: Output, batch: Batch, labelled: bool) -> dict[str, Tensor]:
        """What is wanted of a batch, still on the device."""
        values = {**self.kind.compute(output, batch), "finite": finite_rows(output)}
        if labelled:
            values["loss"] = self._loss(in_full_precision(output), batch)
        return values

    def _loss(self, output: Output, batch: Batch) -> Tensor:
        """The loss of each sample [B] as a batch of it alone has it; where that does not depend on the batch, [1] the
        mean.

        Detection losses are divided by the number of objects of the batch: image by image they do not depend on how
        images were batched, and equal the published runs' one image a process.
        """
        if not self.task.is_detection:
            return sum(self.model.losses(output, batch, split=self.split).values()).reshape(1)
        query = self.model.match(output, batch)
        rows = (
            sum(self.model.losses(*pick(output, batch, row), query[:, row : row + 1], self.split).values())
            for row in range(len(batch))
        )
        return torch.stack(list(rows))

    def _read_back(self, waiting: list, flying: tuple | None) -> tuple:
        """Send for the values of ``waiting`` batches, and take those sent for before, which by now have come."""
        sent = [(members, labelled) for members, labelled, _ in waiting], Readback([values for *_, values in waiting])
        if flying:
            self._take(*flying)
        return sent

    def _take(self, batches: list[tuple[list, bool]], sent: Readback) -> None:
        """Count values that have come."""
        for (members, labelled), values in zip(batches, sent.take()):
            finite = values.pop("finite").tolist()
            if not all(finite):
                self._not_finite([sample for (_, sample), fine in zip(members, finite) if not fine], "output")
            if labelled:
                losses = values.pop("loss").tolist()
                if not all(map(math.isfinite, losses)):
                    self._not_finite([sample for _, sample in members], "loss")
                self.loss += sum(losses) if self.task.is_detection else losses[0] * len(members)
                self.loss_count += len(members)
            predictions = self.kind.add(values, members, labelled)
            for (index, sample), prediction in zip(members, predictions):
                if index in self.shown:
                    self.examples[index] = self._example(sample, prediction)

    def _not_finite(self, samples: list[dict], what: str) -> None:
        """Predictions made of NaN are some class or box or other, and a metric of them says nothing."""
        raise UserError(
            f"the model's {what} is not finite for sample {printable(samples[0]['sample_id'])}"
            f"{f' and {len(samples) - 1} more of its batch' if len(samples) > 1 else ''}; {why_nonfinite(self.model)}"
        )

    def _groups(self):
        """(batch, (index, sample without pixels) of its rows, whether they have labels) of all readable samples."""
        config, on_gpu = self.config, self.device.type == "cuda"
        size = config.eval_batch
        # On a CPU figures stay what they are to the last digit: the reference engine reads, and what is grouped is
        # what always was. On a GPU batches are fuller, and decoded as for training.
        window = WINDOW_ON_GPU if on_gpu else size * WINDOW
        reader = SplitReader(
            self.dataset, self.task, groups(self.dataset, self.task, self.indices, size, window), size,
            labelled=self.kind.labelled, data=config.data, device=self.device,
            pad_text=config.model.tasks[self.task.name].text_length if config.data.pad_text else 0,
            engine=engine_of(config.data) if on_gpu and self.task.has_image else None,
        )  # fmt: skip
        with reader:
            for part in reader:
                for index, error in part.unreadable:
                    self._unreadable(index, error)
                for batch, members, labelled in zip(part.batches, part.members, part.labelled):
                    self.images.update(str(s["image_path"]) for _, s in members if s.get("image_path"))
                    yield batch, members, labelled

    def _unreadable(self, index: int, error: BadImage) -> None:
        self.kind.add_unreadable(index)
        if error.path not in self.bad_images:
            self.bad_images[error.path] = printable(error, 400)
            _log.warning("%s: %s", self.task.short, self.bad_images[error.path])
        self._judge(len(self.indices))

    def _judge(self, images: int) -> None:
        """``UserError`` when more of so many images are bad than training would bear."""
        share, bad = self.config.data.max_bad_share, len(self.bad_images)
        if bad > BadImages(share, read=images).tolerated():
            raise UserError(
                f"{bad} of {images} images could not be read, more than the share of {share:g} allowed (first: "
                f"{self._first_bad()}). Repair them or raise --data.max-bad-share"
            )

    def _first_bad(self) -> str:
        return next(iter(self.bad_images.values()))

    def _example(self, sample: dict, prediction) -> dict:
        text = sample.get("text")
        return {
            "id": sample["sample_id"],
            "text": list(text) if isinstance(text, (tuple, list)) else text,
            "image_path": str(sample["image_path"]) if sample.get("image_path") else None,
            **self.kind.example(sample, prediction),
        }

    def metrics(self, scorer: str) -> dict:
        figures = self.kind.result(self.limited, scorer)
        if self.loss_count:
            figures["loss"] = self.loss / self.loss_count
        if self.bad_images:
            figures["unreadable"] = len(self.bad_images)
        figures["seconds"] = round(self.seconds, 3)
        return figures

    def write_predictions(self, folder: Path) -> Path:
        return self.kind.write(folder / f"{self.task.short}_{self.split}")

    def write_examples(self, out: Path) -> dict:
        """The examples, with a small copy of each image under ``out/examples/``: a run folder can be moved."""
        rows = []
        for number, index in enumerate(i for i in self.indices if i in self.examples):
            row = self.examples[index]
            if row["image_path"]:
                row["image"] = f"examples/{self.task.short}_{self.split}_{number}.jpg"
                try:
                    _write_thumbnail(self.dataset.image_path(index), out / row["image"], self.config.data.max_pixels)
                except BadImage as error:  # it was there when it was evaluated
                    _log.warning("%s: example without its picture: %s", self.task.short, error)
                    del row["image"]
            rows.append(row)
        return {"split": self.split, "samples": rows}


def spread(total: int, count: int) -> list[int]:
    """``count`` indices evenly spread over ``range(total)``, all of it where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


# ------------------------------------------------------------------------------------------- small helpers


@contextlib.contextmanager
def _progress_bar(title: str, total: int, wanted: bool):
    """Yields ``advance(samples)``; draws on a terminal only, and leaves nothing behind."""
    if not wanted or not sys.stderr.isatty():
        yield lambda samples: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(title, total=total)
        yield lambda samples: bar.advance(job, samples)


def _merge_json(path: Path, entries: dict) -> None:
    """Put ``entries`` into the JSON object in ``path``, other keys kept."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    write_aside(path, json.dumps({**(known if isinstance(known, dict) else {}), **entries}, indent=1))


def _write_thumbnail(source, target: Path, max_pixels: int) -> None:
    from unit_fast.data.images.decode import load_image

    image = load_image(source, max_pixels)
    image.thumbnail((512, 512))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "JPEG", quality=85)
    except OSError as error:
        raise UserError(
            f"{printable(target, 400)}: cannot be written ({error.strerror or error}); make room or take another folder"
        ) from error
