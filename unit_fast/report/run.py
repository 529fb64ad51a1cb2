"""What a run folder says, read leniently: a run may be unfinished, killed in mid-line or without evaluation."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.errors import UserError, printable
from unit_fast.tasks import OWN, TASKS, Task, get_task

_LIMIT = 512 * 1024 * 1024
"""Larger files are not read."""


@dataclass(kw_only=True)
class Run:
    """The files of a run folder. A file that is absent or unreadable leaves its field empty and a line in ``notes``."""

    folder: Path
    config: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    examples: dict = field(default_factory=dict)
    thresholds: dict[str, dict] = field(default_factory=dict)
    """See ``read_thresholds``."""
    train: dict[str, list[dict]] = field(default_factory=dict)
    """Short task name -> training rows in the order of steps."""
    evaluations: dict[str, list[dict]] = field(default_factory=dict)
    """Short task name -> {"step", "metrics"} in the order of steps."""
    command: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[Task]:
        """The run's tasks in the order of the paper's tables."""
        model = self.config.get("model")
        configured = model.get("tasks") if isinstance(model, dict) else None
        names = {*(configured if isinstance(configured, dict) else {}), *self.train, *self.evaluations}
        found = {task.name for name in names if (task := _task(name)) is not None}
        return [task for name, task in (TASKS | OWN).items() if name in found]

    @property
    def last_step(self) -> int | None:
        """The last step that was logged, None before the first."""
        steps = [row["step"] for rows in (*self.train.values(), *self.evaluations.values()) for row in rows]
        return max(steps, default=None)

    def scored(self, task: Task) -> list[dict]:
        """The evaluations of ``task`` that have its metric, {"step", "metrics"}, in the order of steps."""
        return [row for row in self.evaluations.get(task.short, []) if number(row["metrics"].get(task.metric))]


def number(value) -> bool:
    """Whether ``value`` is a finite number."""
    return type(value) in (int, float) and abs(value) < float("inf")


def updates(row: dict) -> int:
    """How many updates a training row stands for."""
    value = row.get("updates")
    return value if type(value) is int and value > 0 else 1


def read_run(folder: str | Path) -> Run:
    """The run in ``folder``. ``UserError`` where there is no such folder or nothing of a run in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    run = Run(folder=folder)
    for name in ("config", "env", "summary", "examples"):
        setattr(run, name, _read_object(folder / f"{name}.json", run.notes))
    run.thresholds = read_thresholds(folder)
    path = folder / "metrics.jsonl"
    if path.is_file() and path.stat().st_size <= _LIMIT:
        _read_rows(path, run)
    else:
        run.notes.append("metrics.jsonl is absent: no step was logged yet")
    if not run.config and not run.train and not run.evaluations:
        raise UserError(f"{folder}: neither config.json nor metrics.jsonl is in it; give the folder of a run")
    command = folder / "command.txt"
    if command.is_file() and command.stat().st_size < 100_000:
        run.command = command.read_text(encoding="utf-8", errors="replace").strip()
    return run


def read_thresholds(folder: Path) -> dict[str, dict]:
    """What the last evaluation chose for each detection task, by data set key: ``threshold``, a score from 0 to 1, and
    beside it ``f1``, ``iou``, ``split`` and ``step``. Empty where there is no ``thresholds.json``; what is none is left
    out."""
    path = folder / "thresholds.json"
    found = _read_object(path, []) if path.exists() else {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, dict) and number(entry.get("threshold")) and 0 <= entry["threshold"] <= 1
    }


def _task(name) -> Task | None:
    try:
        return get_task(str(name))
    except UserError:
        return None


def _read_object(path: Path, notes: list[str]) -> dict:
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError("larger than 512 MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is absent")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read: {printable(error)}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} could not be used: it holds a {type(value).__name__}, not an object")
        return {}
    return value


def _read_rows(path: Path, run: Run) -> None:
    broken, averaged = 0, False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                kind, step, task = row["kind"], row["step"], _task(row["task"])
            except (ValueError, KeyError, TypeError, RecursionError):
                broken += bool(line.strip())
                continue
            if task is None or type(step) is not int:
                broken += 1
            elif kind == "train":
                run.train.setdefault(task.short, []).append(row)
            elif kind == "eval" and isinstance(row.get("metrics"), dict):
                if row.get("weights", "raw") != "raw":
                    averaged = True
                    continue
                run.evaluations.setdefault(task.short, []).append({"step": step, "metrics": row["metrics"]})
    for rows in (*run.train.values(), *run.evaluations.values()):
        rows.sort(key=lambda row: row["step"])
    if averaged:
        run.notes.append("shown are the raw weights; figures of the averaged ones are in metrics.jsonl")
    if broken:
        run.notes.append(f"metrics.jsonl: {broken} lines could not be used")
