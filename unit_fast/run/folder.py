"""The folder of a run: claimed by one process at a time, and its fixed files."""

import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

from unit_fast.config import RunConfig, to_json
from unit_fast.errors import UserError
from unit_fast.files import replace
from unit_fast.run.environment import environment
from unit_fast.run.lock import LOCK, holder
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


def check_out(path: str | Path, resume: str | Path | None) -> None:
    """``UserError`` where a run could not be written into ``path``, or one that is there would be lost; nothing is left
    there."""
    path = Path(path)
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    try:
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None
    if other := holder(path):
        raise _occupied(path, other)
    check_unused(path, resume)


def check_unused(path: str | Path, resume: str | Path | None) -> None:
    """``UserError`` where a new run would take the place of one in ``path``."""
    if resume is None and _used(Path(path)):
        raise UserError(f"{path}: holds a run already; go on with --resume auto, or give another --out")


def _used(path: Path) -> bool:
    rows = path / "metrics.jsonl"
    return bool((rows.exists() and rows.stat().st_size) or numbered(path / "checkpoints"))


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--out {path}: not a folder that can be written ({error.strerror or error}); choose another")


def _occupied(path: Path, other: str) -> UserError:
    return UserError(f"{path}: is being written by {other}; wait for it, stop it, or give another --out")


def _locked(file) -> bool:
    """Lock ``file``, and say whether that went; one who only looks (``lock.holder``) has it for a moment."""
    for _ in range(3):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


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
            self.lock = (self.path / LOCK).open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if not _locked(self.lock):
            self.lock.seek(0)
            other = self.lock.read().strip() or "another process"
            self.lock.close()
            raise _occupied(self.path, other)
        _held.add(self.lock)
        self.lock.truncate(0)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        self.lock.flush()

    @property
    def used(self) -> bool:
        """Whether there is a run here that would be lost: something was logged or saved."""
        return _used(self.path)

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
