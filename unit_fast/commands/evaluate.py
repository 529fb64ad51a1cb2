"""``unit-fast evaluate``."""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unit_fast.commands.shown import errors_as_json, show_metrics, take_threads
from unit_fast.config import RunConfig
from unit_fast.errors import UserError


@dataclass(kw_only=True)
class Options:
    """Metrics of a trained model on a split, and prediction files."""

    run: tyro.conf.Positional[str]
    """Run folder (its best checkpoint, else the last), checkpoint folder or model.safetensors."""
    data_root: str | None = None
    """Data root; default the one the run was trained on."""
    tasks: str | None = None
    """Only these, e.g. coco,vqa2; default all of the model."""
    split: Literal["val", "train", "test"] = "val"
    """Split to evaluate on."""
    limit: int = 0
    """Evaluate this many samples a task, evenly spread; 0 takes all."""
    batch: int | None = None
    """Samples a batch; default the run's eval_batch."""
    out: str | None = None
    """Where prediction files, examples and evaluation.json go; default the run folder, nowhere with --limit."""
    ema: bool = False
    """Take the averaged weights of a run with --ema-decay."""
    attributes: bool = False
    """Write the attribute of each Visual Genome box into the prediction file."""
    scorer: str = "auto"
    """COCO average precision by: auto, pycocotools or faster-coco-eval."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 takes OMP_NUM_THREADS, else the cores that are free."""
    workers: int | None = None
    """Threads that read images; default the run's data.workers."""
    json: bool = False
    """Print JSON, also of an error."""


def run(options: Options) -> int:
    with errors_as_json(options.json):
        return _evaluate(options)


def _evaluate(options: Options) -> int:
    from unit_fast.data.vocabulary import VOCABULARY, with_kept_vocabulary
    from unit_fast.evaluation.evaluate import evaluate, open_splits
    from unit_fast.evaluation.labels import check_labels, find_labels
    from unit_fast.evaluation.thresholds import write_thresholds
    from unit_fast.files import replace
    from unit_fast.run.setup import device_of
    from unit_fast.weights import checkpoint

    if options.limit < 0 or (options.batch is not None and options.batch < 1):
        raise UserError("--limit must be at least 0 and --batch at least 1")
    take_threads(options.device, options.threads)
    device = device_of(RunConfig(device=options.device))
    folder = checkpoint.find(options.run, ("best_ema", "last") if options.ema else ("best", "last"))
    model, config = checkpoint.load_model(folder, ema=options.ema, device=device)
    data = dataclasses.replace(
        config.data,
        root=options.data_root or config.data.root,
        workers=config.data.workers if options.workers is None else options.workers,
    )
    config = dataclasses.replace(config, data=data, eval_batch=options.batch or config.eval_batch)
    if data.root is None or not Path(data.root).is_dir():
        raise UserError(f"{data.root or 'no data root'}: not a folder; give --data-root ROOT")
    names = find_labels(folder)
    config = with_kept_vocabulary(config, names and names / VOCABULARY)
    out = Path(options.out) if options.out else None if options.limit else checkpoint.run_of(folder)
    tasks = None if options.tasks is None else [t.strip() for t in options.tasks.split(",") if t.strip()]
    logging.getLogger("unit_fast").setLevel(logging.WARNING)
    datasets = {}
    opened = open_splits(model, config, tasks, options.split, datasets)
    if not opened:
        raise UserError(f"no task has data for split {options.split!r} under {data.root}; try --split train")
    if names is not None:
        for line in check_labels(names, datasets.values()):
            print(f"unit-fast: {line}", file=sys.stderr)
    metrics = evaluate(
        model, config, tasks=[task.name for task, _ in opened], split=options.split, device=device, out=out,
        limit=options.limit, coco_scorer=options.scorer, attributes=options.attributes, progress=not options.json,
        datasets=datasets,
    )  # fmt: skip
    result = {
        "checkpoint": str(folder.resolve()), "ema": options.ema, "split": options.split, "limit": options.limit,
        "metrics": metrics,
    }  # fmt: skip
    if out is not None:
        write_thresholds(out, metrics, split=options.split)
        replace(out / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show_metrics(metrics)
        if out is not None:
            print(f"prediction files: {out / 'predictions'}")
    return 0
