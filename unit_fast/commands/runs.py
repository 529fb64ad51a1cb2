"""``unit-fast runs``."""

import dataclasses
import json
from dataclasses import dataclass

import tyro

from unit_fast.commands.shown import errors_as_json
from unit_fast.errors import printable
from unit_fast.run.listing import RunInfo, list_runs


@dataclass(kw_only=True)
class Options:
    """List runs: state, step, metrics of the newest evaluation, checkpoints, time since something was logged."""

    folder: tyro.conf.Positional[str] = "runs"
    """Folder that holds them, or one run."""
    json: bool = False
    """Print JSON, also of an error."""


def run(options: Options) -> int:
    with errors_as_json(options.json):
        found = list_runs(options.folder)
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
    elif not found:
        print(f"{options.folder}: no runs")
    else:
        lines = [("run", "state", "step", "age", "checkpoints", "metrics"), *map(_cells, found)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        for cells in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    return 0


def _cells(info: RunInfo) -> tuple[str, ...]:
    metrics = " ".join(f"{task} {value:.3f}" for task, value in info.metrics.items())
    saved = [name for name in info.checkpoints if "->" not in name]
    links = ", ".join(name.partition(" ")[0] for name in info.checkpoints if "->" in name)
    return (
        printable(info.folder, 60),
        info.state,
        f"{info.step}/{info.steps if info.steps is not None else '?'}",
        _age(info.age_s),
        f"{len(saved)} ({links})" if links else str(len(saved)),
        f"{metrics} (step {info.metrics_step})" if metrics else "",
    )


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
