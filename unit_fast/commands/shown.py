"""What several commands print in the same way."""

import contextlib
import json
import sys

from unit_fast import threads
from unit_fast.errors import UserError, printable
from unit_fast.tasks import get_task

SHOWN = 40
"""Classes of a detection task that are printed."""


@contextlib.contextmanager
def errors_as_json(wanted: bool):
    """Where JSON is to be printed, print a user's mistake as JSON too; it is raised all the same."""
    try:
        yield
    except UserError as error:
        if wanted:
            print(json.dumps({"error": str(error)}))
        raise


def check_threads(asked: int) -> None:
    """``UserError`` on a number of threads that is none."""
    if asked < 0:
        raise UserError(f"--threads {asked}: give at least 1, or 0 to leave it to us")


def take_threads(device: str, asked: int = 0, *, keep: bool = False) -> None:
    """Give torch its CPU threads (``threads.choose``), and say on standard error where others are in their way."""
    check_threads(asked)
    import torch

    from unit_fast.config import RunConfig
    from unit_fast.run.setup import device_of

    if device_of(RunConfig(device=device)).type != "cpu":
        if asked:
            torch.set_num_threads(asked)
        return
    before = torch.get_num_threads()
    count, line = threads.choose(asked, before, keep=keep)
    if count != before:
        torch.set_num_threads(count)
    if line:
        print(f"unit-fast: {line}", file=sys.stderr)


def show_metrics(metrics: dict[str, dict]) -> None:
    """A line a task: its metric beside chance; nothing without any."""
    if not metrics:
        return
    print(f"\n{'task':<8} {'metric':<18} {'value':>7} {'chance':>7} {'AP50':>7} {'count':>7}")
    for short, found in metrics.items():
        key = get_task(short).metric
        value, chance, ap50 = (found.get(k) for k in (key, "chance", "AP50"))
        cells = " ".join(f"{'' if v is None else f'{v:.4f}':>7}" for v in (value, chance, ap50))
        print(f"{short:<8} {key:<18} {cells} {found.get('count', 0):>7}")
    for short, found in metrics.items():
        _show_classes(short, found.get("by_class") or [])


def _show_classes(short: str, rows: list[dict]) -> None:
    """A line a class: AP beside the number of objects; those without an object in a line together."""
    scored = [row for row in rows if "AP" in row]
    if not scored:
        return
    title = f"{short} by class"
    width = max(len(title), *(len(printable(row["name"], 40)) for row in scored))
    print(f"\n{title:<{width}} {'AP':>7} {'AP50':>7} {'objects':>7}")
    for row in scored[:SHOWN]:
        print(f"{printable(row['name'], 40):<{width}} {row['AP']:>7.4f} {row['AP50']:>7.4f} {row['objects']:>7}")
    if len(scored) > SHOWN:
        print(f"and {len(scored) - SHOWN} more classes")
    if len(scored) < len(rows):
        print(f"no object of {len(rows) - len(scored)} classes in this split")


def show_report(run) -> None:
    """Write the report and say where it is; how the run ended does not depend on it."""
    from unit_fast import report

    try:
        print(f"report: {report.write_report(run.folder)}")
    except (OSError, UserError) as error:
        print(f"unit-fast: no report: {' '.join(str(error).split())}", file=sys.stderr)
