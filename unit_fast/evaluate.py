"""Evaluation of a model on the data sets' splits (SPEC 5.3): metrics, losses, prediction files and a few examples.

The loop is the same for the eight tasks; what differs stands in ``task_results.py``.
"""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.batch import Batch, Output
from unit_fast.config import RunConfig
from unit_fast.data import BadImage, MissingSplit, collate, open_dataset
from unit_fast.data.loader import BadImages
from unit_fast.errors import UserError, nearest, printable
from unit_fast.metrics import find_scorer
from unit_fast.task_results import KINDS, full_precision, write_aside
from unit_fast.tasks import Task, get_task

EXAMPLES = 8
"""Samples of each task kept for the report: evenly spread over the split, the same at every evaluation."""

_WINDOW = 8
"""Batches that are read ahead to be grouped by size; bounds the memory."""

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

    An unreadable image counts as an image without detections, elsewhere its sample is left out; more of them than
    training would bear (``config.data.max_bad_share``) are a ``UserError``. An error names the task. The model's
    training mode and all random number generators are as before on return.
    """
    find_scorer(coco_scorer)
    chosen = [get_task(name) for name in (tasks or model.config.tasks)]
    for task in chosen:
        if task.name not in model.config.tasks:
            known = [get_task(name).short for name in model.config.tasks]
            raise UserError(f"task {task.short!r}: this model does not have it; {nearest(task.short, known)}")
    split = split or config.eval_split
    limit = config.eval_limit if limit is None else limit
    out = None if out is None else Path(out)
    datasets = {} if datasets is None else datasets
    results, examples = {}, {}
    with _evaluation_mode(model, device) as device:
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
                raise RuntimeError(
                    f"evaluation of {task.short} on {split} failed: {type(error).__name__}: {error}"
                ) from error
            _log.info("%s %s: %s", task.short, split, describe(task, results[task.short]))
    if out is not None:
        _merge_json(out / "examples.json", examples)
    return results


def describe(task: Task, metrics: dict) -> str:
    """One line of text for a task's figures, e.g. ``accuracy 0.812 (chance 0.343) | loss 0.52 | 160 samples``."""
    value = metrics.get(task.metric)
    parts = [f"{task.metric} {value:.4f} (chance {metrics['chance']:.4f})" if value is not None else "no labels"]
    if "AP50" in metrics:
        parts.append(f"AP50 {metrics['AP50']:.4f}")
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4g}")
    parts.append(f"{metrics['count']} {'images' if task.is_detection else 'samples'}")
    if metrics.get("unreadable"):
        parts.append(f"{metrics['unreadable']} unreadable images")
    return " | ".join(parts)


def autocast(device: torch.device, precision: str):
    """The context in which a model runs on ``device`` under ``RunConfig.precision``."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


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
        self.loss, self.loss_count, self.unreadable = 0.0, 0, []
        total = len(dataset)
        self.limited = 0 < limit < total
        self.indices = spread(total, limit if self.limited else total)
        self.shown = {self.indices[i] for i in spread(len(self.indices), EXAMPLES)}
        self.examples = {}
        started = time.perf_counter()
        self._run(progress)
        self.seconds = time.perf_counter() - started

    def _run(self, progress: bool) -> None:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        pad_text_to = self.config.model.tasks[self.task.name].text_length if self.config.data.pad_text else 0
        with _progress_bar(f"evaluate {self.task.short}", len(self.indices), progress) as advance:
            for group, labelled in self._groups():
                samples = [sample for _, sample in group]
                batch = collate(self.task.name, samples, pad_text_to).to(self.device, dtype)
                with autocast(self.device, self.config.precision):
                    output = self.model(batch)
                if labelled:
                    self.loss += self._loss(in_full_precision(output), batch)
                    self.loss_count += len(samples)
                predictions = self.kind.add(output, batch, samples, labelled)
                for (index, sample), prediction in zip(group, predictions):
                    if index in self.shown:
                        self.examples[index] = self._example(sample, prediction)
                advance(len(samples))
        share = self.config.data.max_bad_share
        if len(self.unreadable) > share * max(len(self.indices), BadImages.JUDGED_FROM):
            raise UserError(
                f"{len(self.unreadable)} of {len(self.indices)} images could not be read, more than the share of "
                f"{share:g} allowed (first: {self.unreadable[0]}). Repair them or raise --data.max-bad-share"
            )

    def _loss(self, output: Output, batch: Batch) -> float:
        """Sum over the samples of the loss a batch of this sample alone has.

        Detection losses are divided by the number of objects of the batch: image by image they do not depend on how
        images were batched, and equal the published runs' one image a process.
        """
        if not self.task.is_detection:
            return float(sum(self.model.losses(output, batch, split=self.split).values())) * len(batch)
        query = self.model.match(output, batch)
        return sum(
            float(sum(self.model.losses(*pick(output, batch, row), query[:, row : row + 1], self.split).values()))
            for row in range(len(batch))
        )

    def _groups(self):
        """(list of (index, sample), whether they have labels): batches from a window that is read ahead.

        Images of a batch have one size. Padding is not neutral: convolutions carry its border inwards and group norm
        counts it, so that with it a figure would depend on the batch. Texts are sorted by length; their padding is
        masked.
        """
        size = max(1, self.config.eval_batch)
        samples = self._samples()
        while window := list(itertools.islice(samples, size * (_WINDOW if size > 1 else 1))):
            kinds: dict[tuple, list] = {}
            for item in sorted(window, key=lambda item: _length(item[1])) if size > 1 else window:
                image = item[1].get("image")
                key = (self.kind.labelled(item[1]), None if image is None else tuple(image.shape))
                kinds.setdefault(key, []).append(item)
            for (labelled, _), items in kinds.items():
                for start in range(0, len(items), size):
                    group = items[start : start + size]
                    yield (group if labelled else [(i, _without_labels(s)) for i, s in group]), labelled

    def _samples(self):
        """(index, sample) in order, unreadable images left out; read by ``data.workers`` threads."""

        def read(index):
            try:
                return index, self.dataset.get(index, None)
            except BadImage as error:
                return index, error

        workers = self.config.data.workers
        if workers:
            read_all = _ahead(read, self.indices, workers, workers * max(1, self.config.data.prefetch))
        else:
            read_all = map(read, self.indices)
        for index, sample in read_all:
            if isinstance(sample, BadImage):
                self.unreadable.append(printable(sample, 400))
                self.kind.add_unreadable(index)
                _log.warning("%s: %s", self.task.short, self.unreadable[-1])
            else:
                yield index, sample

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
        if self.unreadable:
            figures["unreadable"] = len(self.unreadable)
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
                _write_thumbnail(self.dataset.image_path(index), out / row["image"], self.config.data.max_pixels)
            rows.append(row)
        return {"split": self.split, "samples": rows}


def in_full_precision(output: Output) -> Output:
    """``output`` with tensors of at least single precision, as losses want them after autocast."""
    return Output(**{k: full_precision(v) for k, v in vars(output).items() if isinstance(v, Tensor)})


def pick(output: Output, batch: Batch, row: int) -> tuple[Output, Batch]:
    """Output and batch of the one sample ``row``."""
    one = slice(row, row + 1)
    layered = {"hidden_states", "logits", "boxes", "layer_scores"}
    values = {k: v for k, v in vars(output).items() if isinstance(v, Tensor)}
    output = Output(**{k: v[:, one] if k in layered else v[one] for k, v in values.items()})
    lists = {k: v[one] for k in ("sample_ids", "sizes") if (v := getattr(batch, k)) is not None}
    return output, Batch(task=batch.task, **{k: v[one] for k, v in batch.tensors().items()}, **lists)


def spread(total: int, count: int) -> list[int]:
    """``count`` indices evenly spread over ``range(total)``, all of it where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


# ------------------------------------------------------------------------------------------- small helpers


def _length(sample: dict) -> int:
    text = sample.get("input_ids")
    return 0 if text is None else len(text)


def _without_labels(sample: dict) -> dict:
    return {k: v for k, v in sample.items() if k not in ("label", "answer_scores", "labels", "boxes", "attributes")}


def _ahead(function, items, workers: int, depth: int):
    """``map(function, items)`` in order, ``depth`` items ahead in ``workers`` threads."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        items, waiting = iter(items), []
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


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
    from unit_fast.data.images import load_image

    image = load_image(source, max_pixels)
    image.thumbnail((512, 512))
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, "JPEG", quality=85)
