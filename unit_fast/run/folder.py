"""The folder of a run: claimed by one process at a time, its fixed files, and the signals that end a run."""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import signal
import sys
import uuid
from pathlib import Path

from unit_fast.config import RunConfig, to_json
from unit_fast.errors import UserError
from unit_fast.run.environment import environment, host
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
        self.lock.write(f"process {os.getpid()} on {host()}, started {started}\n")
        self.lock.flush()

    @property
    def used(self) -> bool:
        """Whether there is a run here that would be lost: something was logged or saved."""
        rows = self.path / "metrics.jsonl"
        return bool((rows.exists() and rows.stat().st_size) or numbered(self.checkpoints))

    def begin(self, config: RunConfig) -> None:
        """Write what is known at the start. ``UserError`` where it cannot be."""
        try:
            write(self.path / "config.json", to_json(config))
            write(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
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


def write(path: Path, text: str) -> None:
    """Replace the file ``path``, whole or not at all."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


class Interrupted(BaseException):
    """Raised inside a forward pass of an evaluation when the run was asked to stop."""


class Stop:
    """Whether the run was asked to stop: Ctrl-C, SIGTERM or SIGHUP (the terminal was closed, unless ``nohup`` holds it
    off), once. The loop looks between two steps.

    The handler does nothing but set ``requested``. A second Ctrl-C raises ``KeyboardInterrupt`` at once.
    """

    def __init__(self):
        self.requested: str | None = None
        self.before = {}

    def __enter__(self):
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self.before[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals are somebody else's affair
            self.before = {}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.requested = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def interrupting(self, *models):
        """Within the block a forward pass of one of ``models`` raises ``Interrupted`` once a stop was asked for.

        An evaluation can take longer than a scheduler waits.
        """

        def look(*_):
            if self.requested:
                raise Interrupted

        handles = [model.register_forward_pre_hook(look) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
