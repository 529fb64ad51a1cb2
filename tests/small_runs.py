"""A tiny generated world and a tiny model on it, for tests that train."""

import dataclasses
import hashlib
import json
from pathlib import Path

from unit_fast.config import (
    BackboneConfig,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.data.generated.world import generate
from unit_fast.weights import checkpoint

ALL = ("coco", "vg", "vqa2", "snli_ve", "qnli", "mnli", "qqp", "sst2")


def make_world(folder: Path) -> Path:
    """Forty scenes of each kind; a tenth of a second."""
    generate(folder, seed=0, scale=0.01)
    return folder


def small_config(root: Path, *tasks: str, **changes) -> RunConfig:
    """A run of 20 updates with dropout and augmentation on; ``model``, ``optim`` and ``data`` take dicts of changes."""
    kinds = default_tasks(*(tasks or ("coco", "vqa2", "sst2")))
    if "vqa2" in kinds:
        answers = len(json.loads((root / "vqa2" / "trainval_label2ans.json").read_text()))
        kinds["vqa2"] = dataclasses.replace(kinds["vqa2"], outputs=answers)
    layer = {"heads": 2, "ffn_width": 32}
    model = {
        "backbone": BackboneConfig(depth=14, width=8, norm="group", stride=32, first_trained_stage=0),
        "encoder": EncoderConfig(width=16, layers=1, **layer),
        "text": TextConfig(width=16, layers=1, vocab_size=_lines(root / "bert" / "vocab.txt"), **layer),
        "decoder": DecoderConfig(width=16, layers=2, **layer),
        "tasks": kinds,
    }
    data = {
        "root": str(root), "short_side": 48, "max_side": 64, "train_short_sides": (40, 48),
        "crop_short_sides": (48, 56), "crop_min": 32, "crop_max": 48, "engine": "torchvision",
    }  # fmt: skip
    optim = {"lr": 1e-3, "lr_backbone": 1e-3, "warmup_steps": 4}
    settings = {
        "steps": 20, "batch_per_process": 2, "eval_every": -1, "save_every": 0, "log_every": 5, "threads": 1,
        "criterion": "mean", "seed": 3,
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(**(model | changes.pop("model", {}))),
        data=DataConfig(**(data | changes.pop("data", {}))),
        optim=OptimConfig(**(optim | changes.pop("optim", {}))),
        **(settings | changes),
    )


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def run(config: RunConfig, out: Path, resume=None, **options):
    """``train`` without a word on the console."""
    from unit_fast.run.train import train  # here: every test's fixtures import this module

    return train(config, out, resume, progress="none", **options)


def with_data(config: RunConfig, **changes) -> RunConfig:
    """``config`` with other settings of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def state_hash(run: Path, which: str = "last") -> dict[str, str]:
    """Hash of every part of a checkpoint but the clock: weights, moments, step counts, random state, counters."""
    folder = run / "checkpoints" / which
    state = json.loads((folder / checkpoint.STATE_JSON).read_text())
    for name in ("seconds", "eval_seconds"):
        state.pop(name)
    parts = {name: (folder / name).read_bytes() for name in (checkpoint.WEIGHTS, checkpoint.STATE)}
    if (folder / checkpoint.EMA).exists():
        parts[checkpoint.EMA] = (folder / checkpoint.EMA).read_bytes()
    parts[checkpoint.STATE_JSON] = json.dumps(state, sort_keys=True).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def accept(folder: Path) -> None:
    """Write the manifest of a checkpoint anew after a change."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def saved_step(run: Path) -> int:
    """Updates done when the last checkpoint was saved."""
    return checkpoint.load_state(run / "checkpoints" / "last")["step"]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def rows(run: Path, kind: str = "train") -> list[dict]:
    """Rows of ``metrics.jsonl``."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8")
