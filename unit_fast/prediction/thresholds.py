"""The least score of a box that is worth showing, as a run chose it on its validation split."""

from pathlib import Path

from unit_fast.data.store.files import read_json
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.thresholds import FILE

THRESHOLD = 0.5
"""Where a run chose none."""


def read_thresholds(folder: str | Path) -> dict[str, float]:
    """Data set key -> threshold of the run in ``folder``; empty where it chose none. ``UserError`` on a bad file."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        found = {str(name): float(entry["threshold"]) for name, entry in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {"": -1.0}
    if not all(0 <= value <= 1 for value in found.values()):
        raise UserError(f"{printable(path, 400)}: not a file of thresholds from 0 to 1; delete it, 0.5 is taken then")
    return found
