"""The runs below a folder, from their files alone and without loading PyTorch."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.errors import UserError
from unit_fast.run.lock import holder
from unit_fast.run.rows import read_row
from unit_fast.tasks import get_task

DEEPEST = 3
"""Folders below the one that is asked for."""
_FILES = ("metrics.jsonl", "summary.json", "command.txt")
"""One of these beside ``config.json`` makes a folder a run; a checkpoint has none of them."""
_LATER_S = 5.0
"""Rows that much newer than ``summary.json`` are of a run that went on and was killed."""


@dataclass(kw_only=True)
class RunInfo:
    """What the files of a run say."""

    folder: str
    recipe: str
    state: str
    """``running``, a status of ``summary.json`` (``finished``, ``interrupted``, ``failed``, ...), ``killed`` where it
    ended without a word, or ``begun`` where nothing was logged yet."""
    step: int
    steps: int | None
    checkpoints: list[str] = field(default_factory=list)
    """Names in ``checkpoints/``, links with what they point to."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Short task name -> the task's metric in the newest evaluation."""
    metrics_step: int | None = None
    best: dict = field(default_factory=dict)
    """Step, value and criterion of the best evaluation, once a run has ended."""
    age_s: float = 0.0
    """Seconds since something was logged."""


def list_runs(folder: str | Path) -> list[RunInfo]:
    """The runs in ``folder`` and below, newest first. ``UserError`` where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the runs")
    return sorted(map(_info, _folders(folder, DEEPEST)), key=lambda run: run.age_s)


def _folders(folder: Path, deeper: int) -> Iterator[Path]:
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in _FILES):
        yield folder
    elif deeper:
        try:
            inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")
        except OSError:
            return
        for path in inside:
            yield from _folders(path, deeper - 1)


def _info(folder: Path) -> RunInfo:
    config, summary = _read(folder / "config.json"), _read(folder / "summary.json")
    step, metrics, metrics_step = _rows(folder / "metrics.jsonl")
    logged, ended = _modified(folder, "metrics.jsonl", "log.txt"), _modified(folder, "summary.json")
    state = str(summary.get("status", "killed" if step else "begun"))
    if ended and _modified(folder, "metrics.jsonl") > ended + _LATER_S:
        state = "killed"
    if holder(folder):
        state = "running"
    elif isinstance(summary.get("step"), int):
        step = max(step, summary["step"])
    steps, best = config.get("steps"), summary.get("best")
    best = best.get("best") if isinstance(best, dict) and state != "running" else None
    newest = max(logged, ended, _modified(folder, "config.json"))
    return RunInfo(
        folder=str(folder), recipe=str(config.get("recipe") or ""), state=state, step=step,
        steps=steps if isinstance(steps, int) else None, checkpoints=_checkpoints(folder / "checkpoints"),
        metrics=metrics, metrics_step=metrics_step, best=best if isinstance(best, dict) else {},
        age_s=round(max(0.0, time.time() - newest), 1),
    )  # fmt: skip


def _rows(path: Path) -> tuple[int, dict[str, float], int | None]:
    """The newest step, the newest evaluation's metrics and its step."""
    step, metrics, metrics_step, last = 0, {}, None, None
    try:
        with path.open("rb") as lines:
            for line in lines:
                if b'"eval"' in line:
                    row = read_row(line)
                    if row and row["kind"] == "eval" and (value := _metric(row)) is not None:
                        if row["step"] != metrics_step:
                            metrics, metrics_step = {}, row["step"]
                        metrics[row["task"]] = value
                elif line.endswith(b"\n"):
                    last = line
    except OSError:
        return 0, {}, None
    if last and (row := read_row(last)):
        step = row["step"]
    return max(step, metrics_step or 0), metrics, metrics_step


def _metric(row: dict) -> float | None:
    try:
        value = row["metrics"].get(get_task(row["task"]).metric)
    except (AttributeError, KeyError, UserError):
        return None
    return value if isinstance(value, (int, float)) else None


def _checkpoints(parent: Path) -> list[str]:
    try:
        paths = sorted(parent.iterdir())
    except OSError:
        return []
    return [
        f"{p.name} -> {os.readlink(p)}" if p.is_symlink() else p.name for p in paths if (p / "config.json").is_file()
    ]


def _modified(folder: Path, *names: str) -> float:
    """When the newest of the files was written, 0 where there is none."""
    return max(((folder / name).stat().st_mtime for name in names if (folder / name).is_file()), default=0.0)


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
