"""The files of a run that grow at their end, and the rows of ``metrics.jsonl`` read back."""

import json
import math
from pathlib import Path

from unit_fast.errors import UserError


class Appended:
    """A text file that grows at its end. What the disk refuses waits in memory for the next ``flush``.

    ``UserError`` where it cannot be opened.
    """

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free space, make it a writable file, or give another "
                "--out"
            ) from None
        self.refused: str | None = None
        """Why the disk refused the last time, None if it did not."""

    def write(self, text: str) -> None:
        self.waiting += text.encode("utf-8", "backslashreplace")

    def flush(self) -> None:
        self.refused = None
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            self.refused = error.strerror or str(error)

    def close(self) -> None:
        self.flush()
        self.file.close()


def rows_at(folder: Path, step: int) -> dict[str, dict[str, dict]] | None:
    """Metrics of the evaluation after ``step`` updates in a run folder: kind of row -> short task name -> metrics.
    None where there are no rows at all to tell by."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    found: dict[str, dict[str, dict]] = {}
    for row in filter(None, map(read_row, lines)):
        if row["step"] == step and isinstance(row.get("metrics"), dict) and isinstance(row.get("task"), str):
            found.setdefault(row["kind"], {})[row["task"]] = row["metrics"]
    return found


def read_row(line: bytes) -> dict | None:
    """The row on a line of ``metrics.jsonl``; None where it was cut short by a kill, or damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = row.get("step") if isinstance(row, dict) else None
    good = isinstance(number, int) or isinstance(number, float) and math.isfinite(number)
    return row if good and isinstance(row.get("kind"), str) else None


def number_of(cell: bytes) -> float:
    """Its number; infinite where it is none."""
    try:
        return int(cell)
    except ValueError:
        return math.inf
