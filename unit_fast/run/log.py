"""The console, ``log.txt`` and the metrics files of a run.

Losses are kept as tensors; they are read from the device once an interval, all together. On a terminal one live line
shows the state; elsewhere there is one plain line an interval, and files never receive control characters. A console
that has gone or a full disk does not end a run.
"""

import csv
import datetime
import json
import logging
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.data import loader
from unit_fast.errors import printable
from unit_fast.files import replace
from unit_fast.run.console import Console
from unit_fast.run.rows import Appended, number_of, read_row
from unit_fast.run.step import Update
from unit_fast.tasks import get_task


@dataclass
class Record:
    """One update, as far as logs need it."""

    step: int
    """Updates done, this one included."""
    task: str
    lr: float
    samples: int
    wait_s: float
    """Seconds the step waited for its data."""
    images: int = 0
    """Images among the samples of this process."""
    read_s: float = 0.0
    """Seconds the readers took for it, together; less than a step's where several read at once."""
    real: float = math.nan
    """Share of its images' area, or of its texts' places, that is not padding."""
    request: object = None
    """The sampler's request, to name and replay the samples."""
    sample_ids: list = field(default_factory=list)
    loss: float = math.nan
    grad_norm: float = math.nan
    nonfinite: bool = False
    terms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, item: loader.Step, step: int, lr: float, wait_s: float, readers: int) -> "Record":
        """Of the update that was ``step``, on what the loader gave for it; ``readers`` read at once."""
        return cls(
            step=step,
            task=item.task,
            lr=lr,
            samples=item.request.samples,
            wait_s=wait_s,
            images=sum(len(batch) for batch in item.batches if batch.image is not None),
            read_s=item.read_s / readers,
            real=item.real,
            request=item.request,
            sample_ids=[i for batch in item.batches for i in batch.sample_ids or ()],
        )


class RunLog:
    """Lines to the console and ``log.txt``, rows to ``metrics.jsonl`` and ``metrics.csv`` of ``folder``.

    progress: ``auto`` (live line on a terminal), ``plain`` or ``none`` (files only). While open it also takes what the
    package logs through ``logging``.
    """

    def __init__(self, folder: Path, steps: int, progress: str = "auto"):
        self.folder, self.steps, self.progress = folder, steps, progress
        self.console = Console()
        self.said_lost = False
        self.refused: dict[str, str] = {}
        """Name of a file that the disk refuses -> why."""
        self.text = Appended(folder / "log.txt")
        self._open_rows()
        self.pending: list[tuple[Record, Tensor, tuple[str, ...]]] = []
        self.since = self.started = time.monotonic()
        self.first_step: int | None = None
        self.live = self._live() if progress == "auto" and self.console.isatty() else None
        self.handler = _Handler(self)
        package = logging.getLogger("unit_fast")
        self.before = (package.level, package.propagate)
        package.addHandler(self.handler)
        package.setLevel(logging.INFO)
        package.propagate = False

    def _open_rows(self) -> None:
        self.rows = Appended(self.folder / "metrics.jsonl")
        fresh = not (self.folder / "metrics.csv").exists()
        self.csv_file = Appended(self.folder / "metrics.csv")
        self.csv = csv.writer(self.csv_file)
        if fresh:
            self.csv.writerow(["kind", "step", "task", "name", "value"])
            self._flush(self.csv_file)

    def forget_after(self, step: int, *, evaluations: bool = True) -> None:
        """Drop rows later than ``step`` from the metrics files: a resumed run does that work again. Without
        ``evaluations`` also those of the evaluation after ``step``. Lines that cannot be read go too, and are counted.
        """

        def keep(kind: str, number: float) -> bool:
            return number < step or number == step and (evaluations or not kind.startswith("eval"))

        self.rows.close()
        self.csv_file.close()
        rows, table = self.folder / "metrics.jsonl", self.folder / "metrics.csv"
        read = [(line, read_row(line)) for line in rows.read_bytes().splitlines()]
        kept = [line for line, row in read if row and keep(row["kind"], row["step"])]
        replace(rows, b"".join(line + b"\n" for line in kept))
        header, *lines = table.read_bytes().splitlines() or [b"kind,step,task,name,value"]
        cells = [(line, line.split(b",", 2)) for line in lines]
        kept = [x for x, (kind, *more) in cells if len(more) == 2 and keep(kind.decode("latin-1"), number_of(more[0]))]
        replace(table, b"".join(line + b"\n" for line in [header, *kept]))
        self._open_rows()
        if damaged := sum(row is None for _, row in read):
            self.line(f"metrics.jsonl: {damaged} lines that were cut short or damaged are left out")

    def _live(self):
        import rich.console
        import rich.live

        # The stream itself: rich puts its own in the place of sys.stdout, which would lead back here.
        self.console = Console(sys.stdout)
        live = rich.live.Live(console=rich.console.Console(file=self.console), refresh_per_second=4, transient=True)
        live.start()
        return live

    # -------------------------------------------------------------------------------------------------- text

    def line(self, text: str) -> None:
        """One line of text, to the console and to ``log.txt``."""
        text = printable(text, 4000)
        self.to_file(text)
        if self.progress == "none":
            return
        if self.live:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._check_console()
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self.console, flush=True)
        self._check_console()

    def _check_console(self) -> None:
        if self.console.lost and not self.said_lost:
            self.said_lost = True
            self.to_file(f"the console cannot be written ({self.console.lost}): the run goes on, this file has it all")

    def to_file(self, text: str) -> None:
        """One line of text to ``log.txt`` alone."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.text.write(f"{now} {printable(text, 4000)}\n")
        self._flush(self.text)

    def _flush(self, file: Appended) -> None:
        """Write out what ``file`` holds; that the disk refuses, or takes again, is told once, on the console alone."""
        file.flush()
        name, before = file.path.name, self.refused.pop(file.path.name, None)
        if file.refused:
            self.refused[name] = file.refused
        if bool(before) != bool(file.refused) and self.progress != "none":
            found = f"cannot be written ({file.refused}): it waits in memory" if file.refused else "is written again"
            self._print(f"{name}: {found}; the run goes on")

    def note(self, text: str) -> None:
        """What is going on, on the live line of a terminal; nowhere else."""
        if self.live:
            self._update(text)

    def _update(self, text: str) -> None:
        import rich.text

        self.live.update(rich.text.Text(text, no_wrap=True, overflow="ellipsis"))

    def _status(self, text: str) -> None:
        """The state of the run: replaces the live line, or is a line of its own."""
        if self.live:
            self._update(text)
            self.to_file(text)
        else:
            self.line(text)

    # --------------------------------------------------------------------------------------------------- steps

    def log(self, record: Record, update: Update) -> None:
        """Keep one update's figures unread."""
        figures = torch.stack([update.grad_norm.float(), update.nonfinite.float()])
        self.pending.append((record, torch.cat([figures, update.terms.float()]), update.names))
        if self.first_step is None:
            self.first_step = record.step
            self.started = self.since

    def flush(self) -> list[Record]:
        """Read what is kept, in one copy from the device; write a row a task and one line. Returns the records."""
        if not self.pending:
            return []
        values = torch.cat([v for _, v, _ in self.pending]).tolist()
        records, at = [], 0
        for record, tensor, names in self.pending:
            record.grad_norm, flag, *terms = values[at : at + tensor.numel()]
            record.loss, record.nonfinite = sum(terms), bool(flag)
            record.terms = dict(zip(names, terms))
            at += tensor.numel()
            records.append(record)
        self.pending = []
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        self._write_steps(records, seconds)
        return records

    def restart_clock(self) -> None:
        """Time from here on is training's: call after an evaluation or a save."""
        self.since = time.monotonic()

    def _write_steps(self, records: list[Record], seconds: float) -> None:
        speed = sum(r.samples for r in records) / seconds
        wait = sum(r.wait_s for r in records) / seconds
        loader = _images_per_s(records)
        by_task: dict[str, list[Record]] = {}
        for record in records:
            by_task.setdefault(record.task, []).append(record)
        for task, group in by_task.items():
            # Steps that were not finite are counted, not averaged: one NaN would hide the rest of the interval.
            finite = [r for r in group if not r.nonfinite]
            self._row(
                {
                    "kind": "train", "step": group[-1].step, "task": task, "loss": _mean([r.loss for r in finite]),
                    "terms": {n: _mean([r.terms[n] for r in finite]) for n in group[-1].terms},
                    "lr": group[-1].lr, "grad_norm": _mean([r.grad_norm for r in finite]), "samples_per_s": speed,
                    "data_wait": wait, "loader_images_per_s": loader,
                    "padding": 1 - _mean([r.real for r in group]), "updates": len(group),
                    "nonfinite": len(group) - len(finite),
                }
            )  # fmt: skip
        self._status(self._summary(records, by_task, speed, wait, loader))

    def _summary(self, records, by_task, speed, wait, loader) -> str:
        last = records[-1]
        parts = [f"step {last.step}/{self.steps}", self._task_text(last.task, by_task[last.task])]
        others = [
            f"{get_task(t).short} {_show(_mean([r.loss for r in g]))}" for t, g in by_task.items() if t != last.task
        ]
        if others:
            parts.append(" ".join(others))
        parts += [f"lr {last.lr:.1e}", f"{speed:.3g} samples/s", f"wait {wait:.0%}"]
        parts += [f"loader {loader:.3g} images/s"] if loader else []
        parts.append(f"{_memory_gib():.1f} GiB")
        per_step = (time.monotonic() - self.started) / (last.step + 1 - self.first_step)
        parts.append(f"{_duration(per_step * (self.steps - last.step))} left")
        return " | ".join(parts)

    @staticmethod
    def _task_text(task: str, group: list[Record]) -> str:
        """``coco loss 12.41 (ce 1.02 bbox 0.41 giou 0.88)``: the parts are the last decoder layer's."""
        text = f"{get_task(task).short} loss {_show(_mean([r.loss for r in group]))}"
        parts = []
        for name in group[-1].terms:
            short = name.rsplit("/", 1)[-1].removeprefix("loss_")
            if not short[-1].isdigit():
                parts.append(f"{short} {_show(_mean([r.terms[name] for r in group]))}")
        return f"{text} ({' '.join(parts)})" if parts else text

    def evaluation(self, step: int, results: dict[str, dict], kind: str = "eval") -> None:
        """Rows of an evaluation after ``step`` updates: short task name -> metrics. ``eval_ema``: averaged weights."""
        for task, metrics in results.items():
            self._row({"kind": kind, "step": step, "task": task, "metrics": metrics})

    def _row(self, row: dict) -> None:
        self.rows.write(json.dumps(finite(row)) + "\n")
        self._flush(self.rows)
        nested = row.get("terms", {}) | row.get("metrics", {})
        flat = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"} | nested
        for name, value in flat.items():
            if isinstance(value, (int, float)):
                self.csv.writerow([row["kind"], row["step"], row["task"], name, value])
        self._flush(self.csv_file)

    def close(self) -> None:
        """Close the files and give ``logging`` back."""
        if self.live:
            self.live.stop()
        package = logging.getLogger("unit_fast")
        package.removeHandler(self.handler)
        package.setLevel(self.before[0])
        package.propagate = self.before[1]
        for file in (self.rows, self.csv_file, self.text):
            file.close()
            if file.waiting:
                self._print(f"{file.path.name}: its last {len(file.waiting)} bytes are lost ({file.refused})")


class _Handler(logging.Handler):
    def __init__(self, log: RunLog):
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.log.line(prefix + record.getMessage())
        if record.exc_info:  # the trace goes to the file alone
            self.log.text.write("".join(f"  {line}\n" for line in self._trace(record)))
            self.log._flush(self.log.text)

    @staticmethod
    def _trace(record: logging.LogRecord):
        return [printable(x, 500) for x in logging.Formatter().formatException(record.exc_info).splitlines()]


def _images_per_s(records: list[Record]) -> float | None:
    """Images a second that the loader reads when nothing holds it up; None where there were none."""
    images, seconds = (sum(getattr(r, name) for r in records if r.images) for name in ("images", "read_s"))
    return images / seconds if images and seconds else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def finite(value):
    """``value`` with numbers that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(value: float) -> str:
    return f"{value:.4g}"


def _memory_gib() -> float:
    """Peak memory: the card's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
