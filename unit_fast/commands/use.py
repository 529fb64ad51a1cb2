"""The commands about trained models (evaluate, predict, convert) and about files of others' data (data shard)."""

import contextlib
import dataclasses
import json
import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unit_fast.commands.command_line import parse
from unit_fast.config import RunConfig
from unit_fast.errors import UserError, nearest, printable
from unit_fast.tasks import get_task


@dataclass(kw_only=True)
class Evaluate:
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
    """CPU threads; 0 keeps the default."""
    workers: int | None = None
    """Threads that read images; default the run's data.workers."""
    json: bool = False
    """Print JSON, also of an error."""


@contextlib.contextmanager
def _json_errors(wanted: bool):
    """Where JSON is to be printed, print a user's mistake as JSON too; it is raised all the same."""
    try:
        yield
    except UserError as error:
        if wanted:
            print(json.dumps({"error": str(error)}))
        raise


def run_evaluate(arguments: list[str], prog: str) -> int:
    command = parse(Evaluate, arguments, prog=prog)
    with _json_errors(command.json):
        return _evaluate(command)


def _evaluate(command: Evaluate) -> int:
    import torch

    from unit_fast.evaluation.evaluate import evaluate
    from unit_fast.evaluation.labels import check_labels, find_labels
    from unit_fast.files import replace
    from unit_fast.run.setup import device_of
    from unit_fast.weights import checkpoint

    if command.threads:
        torch.set_num_threads(command.threads)
    if command.limit < 0 or (command.batch is not None and command.batch < 1):
        raise UserError("--limit must be at least 0 and --batch at least 1")
    device = device_of(RunConfig(device=command.device))
    folder = checkpoint.find(command.run, ("best_ema", "last") if command.ema else ("best", "last"))
    model, config = checkpoint.load_model(folder, ema=command.ema, device=device)
    data = dataclasses.replace(
        config.data,
        root=command.data_root or config.data.root,
        workers=config.data.workers if command.workers is None else command.workers,
    )
    config = dataclasses.replace(config, data=data, eval_batch=command.batch or config.eval_batch)
    if data.root is None or not Path(data.root).is_dir():
        raise UserError(f"{data.root or 'no data root'}: not a folder; give --data-root ROOT")
    out = Path(command.out) if command.out else None if command.limit else run_of(str(folder))
    tasks = None if command.tasks is None else [t.strip() for t in command.tasks.split(",") if t.strip()]
    logging.getLogger("unit_fast").setLevel(logging.WARNING)
    opened = {}
    metrics = evaluate(
        model, config, tasks=tasks, split=command.split, device=device, out=out, limit=command.limit,
        coco_scorer=command.scorer, attributes=command.attributes, progress=not command.json, datasets=opened,
    )  # fmt: skip
    if not metrics:
        raise UserError(f"no task has data for split {command.split!r} under {data.root}; try --split train")
    if (names := find_labels(folder)) is not None:
        for line in check_labels(names, opened.values()):
            print(f"unit-fast: {line}", file=sys.stderr)
    result = {
        "checkpoint": str(folder.resolve()), "ema": command.ema, "split": command.split, "limit": command.limit,
        "metrics": metrics,
    }  # fmt: skip
    if out is not None:
        replace(out / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    if command.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        show_metrics(metrics)
        if out is not None:
            print(f"prediction files: {out / 'predictions'}")
    return 0


@dataclass(kw_only=True)
class Predict:
    """What a trained model says about one image and/or text."""

    run: tyro.conf.Positional[str]
    """Run folder, checkpoint folder or model.safetensors."""
    task: str
    """coco, vg, vqa2, snli_ve, qnli, mnli, qqp or sst2."""
    image: str | None = None
    """A JPEG or PNG file."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The question or sentence; give it twice, or --text-b, for pairs."""
    text_b: str | None = None
    """The second sentence of a pair."""
    threshold: float = 0.5
    """Least score of a box."""
    top: int = 5
    """Answers or classes shown."""
    save: str | None = None
    """Write a picture (.png, .jpg) or the values (.json)."""
    ema: bool = False
    """Take the averaged weights."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    json: bool = False
    """Print JSON, also of an error."""


def run_predict(arguments: list[str], prog: str) -> int:
    command = parse(Predict, arguments, prog=prog)
    with _json_errors(command.json):
        return _predict(command)


def _predict(command: Predict) -> int:
    from unit_fast.evaluation.predict import load
    from unit_fast.run.setup import device_of

    texts = command.text + ((command.text_b,) if command.text_b is not None else ())
    model = load(command.run, device=device_of(RunConfig(device=command.device)), ema=command.ema)
    found = model.predict(
        command.task, command.image, (texts[0] if len(texts) == 1 else texts) or None,
        threshold=command.threshold, top=command.top,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if command.json else found)
    if command.save:
        print(f"written: {found.save(command.save)}", file=sys.stderr)
    return 0


@dataclass(kw_only=True)
class Convert:
    """Weights of other projects to a checkpoint of ours, or ours to theirs. No code of the file is executed."""

    source: tyro.conf.Positional[str]
    """A weights file (.pth, .ckpt, .safetensors) or, with --to, a run or checkpoint of ours."""
    out: tyro.conf.Positional[str]
    """A checkpoint folder to write, for --init-from; with --to a .safetensors or .pth file."""
    format: Literal["mmf", "detr", "torchvision", "bert"] = "mmf"
    """What the source is; all but mmf fill a part of --recipe's model, whose rest is random."""
    to: Literal["mmf", "detr"] | None = None
    """Write ours in this format; detr takes the backbone."""
    mmf_config: str | None = None
    """JSON file with the configuration of the MMF model; default read off the tensors."""
    recipe: str = "all8_shared"
    """Model that a backbone or BERT is put into."""
    seed: int = 0
    """Seed of the random rest."""


def run_convert(arguments: list[str], prog: str) -> int:
    command = parse(Convert, arguments, prog=prog)
    from unit_fast.commands.convert_files import export_file, import_file

    if command.to:
        names = export_file(Path(command.source), Path(command.out), command.to)
        print(f"{len(names)} tensors written to {command.out}")
        return 0
    report = import_file(
        Path(command.source), Path(command.out), command.format, mmf_config=command.mmf_config, recipe=command.recipe,
        seed=command.seed,
    )  # fmt: skip
    print(f"{report}\nwritten: {command.out}")
    return 0


@dataclass(kw_only=True)
class DataShard:
    """Write folders of images into WebDataset tar shards, from which training reads as from the files.

    A run that was stopped goes on when the same command is given again. Exit code 1 if an image could not be read.
    """

    root: tyro.conf.Positional[str]
    """Data root."""
    images: tuple[str, ...]
    """Which images, e.g. coco.train_images vg.images; all takes every folder that is there."""
    out: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Where to; give it again for further disks. Each kind of images gets a folder of its own in it."""
    shard_mib: float = 256
    """Largest tar file, MiB."""
    seed: int = 0
    """Seed of the images' order in the shards."""
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Overrides of single paths, as data.paths in training."""


def run_data_shard(arguments: list[str], prog: str) -> int:
    command = parse(DataShard, arguments, prog=prog)
    from unit_fast.config import DataConfig
    from unit_fast.data.images.shard_writer import plan_shards, write_shards
    from unit_fast.data.layout import PLACES, Layout

    layout = Layout(DataConfig(root=command.root, paths=command.paths))
    known = [key for key in PLACES if key.endswith("images")]
    keys = [key for value in command.images for key in value.split(",") if key]
    for key in keys:
        if key not in known and key != "all":
            raise UserError(f"--images {printable(key)}: no kind of images; {nearest(key, [*known, 'all'])}")
    if not keys or not command.out:
        raise UserError("--images and --out: give at least one of each")
    plans, used = {}, {}
    for key in known if "all" in keys else dict.fromkeys(keys):
        folder = layout.find(key)
        if folder is None or not folder.is_dir():
            if "all" in keys:
                print(f"{key}: not there, left out")
                continue
            raise UserError(f"--images {key}: not found: {layout.where(key)}")
        out = [Path(path).expanduser() / key.replace(".", "_") for path in command.out]
        plans[key] = plan_shards(
            folder, out, shard_mib=command.shard_mib, seed=command.seed, within=layout.root, used=used
        )
    unreadable = 0
    for key, plan in plans.items():
        done = write_shards(plan, progress=sys.stderr.isatty())
        kept = f" ({done.kept} were there)" if done.kept else ""
        print(
            f"{key}: {done.images:,} images in {done.shards:,} shards{kept}, {done.bytes / 2**20:,.1f} MiB, "
            f"{done.index}"
        )
        for what, names in (("files that are no images", done.skipped), ("UNREADABLE images", done.unreadable)):
            if names:
                print(f"  {len(names):,} {what} left out, listed in the index:")
            for name, reason in names[:3]:
                print(f"    {printable(name)}: {printable(reason, 400)}")
        unreadable += len(done.unreadable)
    if not plans:
        raise UserError(f"--images all: no folder of images under {printable(layout.root, 400)}")
    pairs = " ".join(shlex.quote(f"{key}={plan.out[0]}") for key, plan in plans.items())
    print(f"to train from them: --data.paths {pairs}")
    return 1 if unreadable else 0


def run_of(resume: str | None) -> Path | None:
    """The run folder that a checkpoint belongs to."""
    if resume is None:
        return None
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        return path
    return next((p.parent for p in path.absolute().parents if p.name == "checkpoints"), None)


def show_metrics(metrics: dict[str, dict]) -> None:
    """A line a task: its metric beside chance."""
    if not metrics:
        return
    print(f"\n{'task':<8} {'metric':<18} {'value':>7} {'chance':>7} {'AP50':>7} {'count':>7}")
    for short, found in metrics.items():
        key = get_task(short).metric
        value, chance, ap50 = (found.get(k) for k in (key, "chance", "AP50"))
        cells = " ".join(f"{'' if v is None else f'{v:.4f}':>7}" for v in (value, chance, ap50))
        print(f"{short:<8} {key:<18} {cells} {found.get('count', 0):>7}")
