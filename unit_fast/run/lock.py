"""Who writes a run folder: its lock file, held as long as the process lives."""

import fcntl
from pathlib import Path

LOCK = ".lock"


def holder(folder: Path) -> str | None:
    """Who trains in ``folder`` just now; None where nobody does."""
    try:
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return None
