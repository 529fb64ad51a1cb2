"""A child process that answers requests, and waiting until all such are idle."""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.data.processes import cpu_seconds, memory_bytes
from benchmarks.runner.machine import ROOT

_IDLE_SECONDS = 0.2
_IDLE_SHARE = 0.05
"""A tree that uses less of one core than this is idle: waiting threads wake up now and then."""


class Child:
    """A Python module in a process of its own that answers JSON lines, see ``server.main``.

    A context manager: the process is ended at the end, its own children with it (they notice).
    """

    def __init__(self, module: str, cores: int):
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(cores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, cwd=ROOT,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **arguments) -> None:
        """Ask for something; ``answer`` waits for what comes of it."""
        with contextlib.suppress(BrokenPipeError):  # ``answer`` tells of a process that has ended
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict:
        """The answer to the oldest request. ``RuntimeError`` with the last of its errors when the process has ended."""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"a provider's process ended:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def ask(self, do: str, **arguments) -> dict:
        """``send`` and ``answer``."""
        self.send(do, **arguments)
        return self.answer()

    def peak_while(self, do: str, **arguments) -> int:
        """Largest ``memory_bytes`` of the tree, sampled while it does something."""
        self.send(do, **arguments)
        peak, done = 0, False
        while not done:
            peak = max(peak, memory_bytes(self.pid))
            done = bool(select.select([self._process.stdout], [], [], 0.05)[0])
        self.answer()
        return peak

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # the process ends with its input
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def wait_until_idle(children: Sequence[Child], limit: float = 20.0) -> None:
    """Wait until none of the trees uses the CPU: all have read ahead as far as they may.

    ``RuntimeError`` after ``limit`` seconds: what is measured then would be measured beside the others.
    """
    end = time.monotonic() + limit
    used = sum(cpu_seconds(child.pid) for child in children)
    while True:
        time.sleep(_IDLE_SECONDS)
        now = sum(cpu_seconds(child.pid) for child in children)
        if now - used <= _IDLE_SHARE * _IDLE_SECONDS:
            return
        used = now
        if time.monotonic() > end:
            raise RuntimeError(f"the providers are not idle {limit:g} s after their last round")
