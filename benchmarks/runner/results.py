"""Files of results: a JSON line a row, ``benchmarks/results/`` for those that are kept."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runner.machine import ROOT, card_of

RESULTS = ROOT / "benchmarks" / "results"


def read(path: Path) -> list[dict]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(rows: Sequence[dict], path: Path) -> None:
    """Append the rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def path_of(benchmark: str, gpu: str | None) -> Path:
    """Where the rows of a benchmark are kept: a file for each card, so that no table mixes them, one for CPUs."""
    return RESULTS / (f"{benchmark}_{card_of(gpu)}.jsonl" if gpu else f"{benchmark}.jsonl")


def replace(rows: Sequence[dict], path: Path) -> None:
    """Put the rows into a file, in place of those of the same problem, provider and machine."""

    def key(row):
        return tuple(row[k] for k in ("case", "shape", "dtype", "device", "provider", "cpu", "cores", "gpu", "threads"))

    new = {key(row) for row in rows}
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    append([row for row in read(path) if key(row) not in new] + list(rows), aside)
    aside.replace(path)


def keep(rows: Sequence[dict], args: argparse.Namespace) -> None:
    """Write the rows of one benchmark where ``--json``, ``--no-results`` and ``--quick`` say."""
    if args.json:
        append(rows, args.json)
    elif not (args.quick or args.no_results):
        replace(rows, path_of(rows[0]["benchmark"], rows[0]["gpu"]))
