"""The console, ``log.txt`` and the metrics files of a run.

Losses are kept as tensors; they are read from the device once an interval, all together. On a terminal one live line
moves with every update; elsewhere there is one plain line an interval, and one a minute where updates are slow. Files
never receive control characters. A console that has gone or a full disk does not end a run.
"""

import csv
import datetime
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.data import loader
from unit_fast.errors import printable
from unit_fast.files import replace
from unit_fast.run.console import Console
from unit_fast.run.rows import Appended, number_of, read_row
from unit_fast.run.status import SEPARATOR, Pace, fitted, loss_text, mean
from unit_fast.run.step import Update
from unit_fast.run.tracking import Tracker, scalars

REDRAW_S, SPEAK_S = 0.1, 60.0
"""Seconds between two redraws of the live line at least; seconds without a plain line at most."""
FILE_ONLY = ("unit_fast.ops", "unit_fast.step_graph")
"""Loggers whose information is for ``log.txt``: which implementation, which graph."""


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
        self.since = opened = time.monotonic()
        self.seconds: Callable[[], float] = lambda: time.monotonic() - opened
        """Seconds of the run so far, for its rows."""
        self.pace = Pace(steps)
        self.losses: list[str] = []
        """What the newest interval's losses were, the newest task's first."""
        self.shown = opened
        """When the state was last shown."""
        self.trackers: dict[str, Tracker] = {}
        """What takes the rows too, by name."""
        self.operators: Counter[str] | None = Counter()
        """Implementation -> operators that took it; None once that was told."""
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
        console = rich.console.Console(file=self.console)
        if console.is_dumb_terminal:  # it cannot move its cursor
            return None
        live = rich.live.Live(console=console, auto_refresh=False, transient=True)
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

        self.live.update(rich.text.Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        self._check_console()

    def _show(self) -> None:
        """Redraw the live line, with as much as its terminal has room for."""
        self.shown = time.monotonic()
        self._update(fitted([*self.pace.pieces(), *self.losses], self.live.console.width))

    def _status(self, pieces: list[str]) -> None:
        """The state of the run: into the file; and on the live line, or on a line of its own."""
        text = SEPARATOR.join(pieces)
        if self.live:
            self._show()
            self.to_file(text)
        else:
            self.shown = time.monotonic()
            self.line(text)

    # --------------------------------------------------------------------------------------------------- steps

    def log(self, record: Record, update: Update) -> None:
        """Keep one update's figures unread."""
        figures = torch.stack([update.grad_norm.float(), update.nonfinite.float()])
        self.pending.append((record, torch.cat([figures, update.terms.float()]), update.names))
        self.pace.add(record.step, record.samples, record.wait_s)
        silent = time.monotonic() - self.shown
        if self.live and silent >= REDRAW_S:
            self._show()
        elif not self.live and silent >= SPEAK_S:
            self._status(self.pace.pieces())

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
        self.pace.restart()

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
                    "kind": "train", "step": group[-1].step, "task": task, "loss": mean([r.loss for r in finite]),
                    "terms": {n: mean([r.terms[n] for r in finite]) for n in group[-1].terms},
                    "lr": group[-1].lr, "grad_norm": mean([r.grad_norm for r in finite]), "samples_per_s": speed,
                    "data_wait": wait, "loader_images_per_s": loader,
                    "padding": 1 - mean([r.real for r in group]), "updates": len(group),
                    "nonfinite": len(group) - len(finite),
                }
            )  # fmt: skip
        newest_first = dict.fromkeys(r.task for r in reversed(records))
        self.losses = [loss_text(task, [r.loss for r in by_task[task]]) for task in newest_first]
        if self.operators:
            told = ", ".join(f"{name} for {count}" for name, count in self.operators.most_common())
            self.line(f"operators: {told}; which and why is in log.txt")
            self.operators = None
        self._status([*self.pace.pieces(), *self._details(records, by_task, newest_first, loader)])

    @staticmethod
    def _details(records, by_task, tasks, loader) -> list[str]:
        """What only a long line has room for."""
        first, *others = ((task, [r.loss for r in by_task[task]]) for task in tasks)
        found = [loss_text(*first, [r.terms for r in by_task[first[0]]])]
        if others:
            found.append(" ".join(loss_text(*other) for other in others))
        found.append(f"lr {records[-1].lr:.1e}")
        return [*found, f"loader {loader:.3g} images/s"] if loader else found

    def evaluation(self, step: int, results: dict[str, dict], kind: str = "eval") -> None:
        """Rows of an evaluation after ``step`` updates: short task name -> metrics. ``eval_ema``: averaged weights."""
        for task, metrics in results.items():
            self._row({"kind": kind, "step": step, "task": task, "metrics": metrics})

    def _row(self, row: dict) -> None:
        row = row | {"run_seconds": round(self.seconds(), 3), "time": round(time.time(), 3)}
        self.rows.write(json.dumps(finite(row)) + "\n")
        self._flush(self.rows)
        self._track(row)
        nested = row.get("terms", {}) | row.get("metrics", {})
        flat = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"} | nested
        for name, value in flat.items():
            if isinstance(value, (int, float)):
                self.csv.writerow([row["kind"], row["step"], row["task"], name, value])
        self._flush(self.csv_file)

    def _track(self, row: dict) -> None:
        """Hand ``row`` to the trackers; one that fails is told and left out from then on."""
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.scalars(row["step"], row["time"], scalars(row))
            except Exception as error:
                del self.trackers[name]
                self.line(f"{name} takes no more rows ({type(error).__name__}: {error}); the run goes on without it")

    def close(self) -> None:
        """Close the files and the trackers, and give ``logging`` back."""
        for name, tracker in self.trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self.line(f"{name} could not be ended well ({type(error).__name__}: {error})")
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
        if record.levelno < logging.WARNING and record.name in FILE_ONLY:
            self.log.to_file(record.getMessage())
            if record.name == "unit_fast.ops" and self.log.operators is not None:
                self.log.operators[record.args[1]] += 1
            return
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


def finite(value):
    """``value`` with numbers that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
