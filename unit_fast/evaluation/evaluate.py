"""Evaluation of a model on the data sets' splits (SPEC 5.3): metrics, losses, prediction files and a few examples.

The loop is the same for the eight tasks; what differs stands in ``task_results.py``.
"""

import contextlib
import json
import logging
from pathlib import Path

import torch

from unit_fast.config import RunConfig
from unit_fast.data import MissingSplit, open_dataset
from unit_fast.errors import OutOfMemory, UserError, is_out_of_memory, nearest, printable
from unit_fast.evaluation.metrics import find_scorer
from unit_fast.evaluation.precision import nonfinite_weights
from unit_fast.evaluation.task_results import write_aside
from unit_fast.evaluation.task_run import TaskRun
from unit_fast.tasks import Task, get_task

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
    defined, ``threshold`` and ``f1``, the score from which on boxes give the best F1 at IoU 0.5; ``chance``, what the
    best constant prediction reaches; ``count``, the samples with labels (detection: the images); ``loss``, the mean
    over samples of the training loss; ``unreadable``, images that could not be read, where there were any; ``seconds``.
    Samples without labels are predicted but not counted: a split without any has ``count`` 0 and no metric. A task
    whose split is missing is left out with one log line.

    On a CPU the reference engine reads; on a GPU ``config.data.engine`` does, as in training. Batches of
    ``config.eval_batch`` samples are grouped by size; the device is read once in ``READ_EVERY`` of them.

    An unreadable image counts as an image without detections, elsewhere its samples are left out; more of them than
    training would bear (``data.bad_images``), or no readable sample at all, are a ``UserError``. So is an output
    that is not finite; ``OutOfMemory`` where memory did not suffice. An error names the task. The model's training mode
    and all random number generators are as before on return.
    """
    find_scorer(coco_scorer)
    split = split or config.eval_split
    limit = config.eval_limit if limit is None else limit
    if limit < 0:
        raise UserError(f"limit is {limit}; give at least 0")
    opened = open_splits(model, config, tasks, split, datasets)
    out = None if out is None else Path(out)
    results, examples = {}, {}
    with _evaluation_mode(model, device) as device:
        if weights := nonfinite_weights(model):
            _log.warning("%s: figures of such a model say little", weights)
        for task, dataset in opened:
            try:
                run = TaskRun(model, config, task, dataset, split, device, limit, progress, attributes)
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


def open_splits(
    model, config: RunConfig, tasks=None, split: str | None = None, datasets: dict | None = None
) -> list[tuple[Task, object]]:
    """(task, open data set) of what ``evaluate`` evaluates with the same arguments, in its order.

    A task whose split is missing is left out with one log line; ``UserError`` on a task that the model does not have.
    """
    datasets, split, opened = {} if datasets is None else datasets, split or config.eval_split, []
    for task in _chosen(model, tasks):
        key = (task.name, split)
        try:
            if key not in datasets:
                datasets[key] = open_dataset(
                    task.name, split, config.data, config.model.tasks[task.name], augment=False,
                    vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
                )  # fmt: skip
            opened.append((task, datasets[key]))
        except MissingSplit as error:
            _log.warning("%s: not evaluated: %s", task.short, error)
    return opened


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


def _merge_json(path: Path, entries: dict) -> None:
    """Put ``entries`` into the JSON object in ``path``, other keys kept."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    write_aside(path, json.dumps({**(known if isinstance(known, dict) else {}), **entries}, indent=1))
