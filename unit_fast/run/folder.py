"""The folder of a run: claimed by one process at a time, and its fixed files."""

import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
import uuid
from pathlib import Path

from unit_fast.config import RunConfig, to_json
from unit_fast.errors import UserError
from unit_fast.files import replace
from unit_fast.run.environment import environment
from unit_fast.weights.checkpoint import numbered

EXIT = {"finished": 0, "failed": 2, "nonfinite": 3, "out_of_memory": 5, "interrupted": 75, "killed": 130}
"""Status in ``summary.json`` -> exit code: 75 means that ``--resume auto`` goes on from here."""

_held: set = set()
"""Open lock files of this process."""


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


# A forked loader process that outlives a killed run would hold its lock.
os.register_at_fork(after_in_child=_let_go)


def default_folder(recipe: str) -> Path:
    """``runs/<UTC time>_<recipe>``."""
    return Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d_%H%M%S}_{recipe or 'run'}"


class RunFolder:
    """``path``, created, found writable, and locked until ``release``.

    ``UserError`` where it cannot be written, or where another process trains in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        probe = self.path / f".probe-{uuid.uuid4().hex[:8]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
            self.lock = (self.path / ".lock").open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(
                f"--out {self.path}: not a folder that can be written ({error.strerror or error}); choose another"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            self.lock.close()
            raise UserError(
                f"{self.path}: is being written by {holder}; wait for it, stop it, or give another --out"
            ) from None
        _held.add(self.lock)
        self.lock.truncate(0)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        self.lock.flush()

    @property
    def used(self) -> bool:
        """Whether there is a run here that would be lost: something was logged or saved."""
        rows = self.path / "metrics.jsonl"
        return bool((rows.exists() and rows.stat().st_size) or numbered(self.checkpoints))

    def begin(self, config: RunConfig) -> None:
        """Write what is known at the start. ``UserError`` where it cannot be."""
        try:
            replace(self.path / "config.json", to_json(config))
            replace(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
            with (self.path / "command.txt").open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(shlex.join(sys.argv) + "\n")
        except OSError as error:
            path = error.filename2 or error.filename or self.path
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); free space, remove what is in its place, or "
                "give another --out"
            ) from None

    def release(self) -> None:
        _held.discard(self.lock)
        self.lock.truncate(0)
        self.lock.close()
