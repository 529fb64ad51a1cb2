"""A child process that answers requests, and what a tree of processes costs (Linux)."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._machine import ROOT

_TICK = os.sysconf("SC_CLK_TCK")
_IDLE_SECONDS = 0.2
_IDLE_SHARE = 0.05
"""A tree that uses less of one core than this is idle: waiting threads wake up now and then."""


def _stats() -> dict[int, list[str]]:
    """Process -> the fields of ``/proc/<pid>/stat`` from the state on."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
    return found


def _members(root: int, stats: dict[int, list[str]]) -> list[int]:
    """``root`` and its living descendants."""
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found = [root] if root in stats else []
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """CPU time, user and system, of a process and all its descendants, of those that have ended too (10 ms steps).

    An ended process counts from when its parent has waited for it.
    """
    stats = _stats()
    return sum(sum(map(int, stats[pid][11:15])) for pid in _members(root, stats)) / _TICK


def memory_bytes(root: int) -> int:
    """Memory of a process and its descendants now, each page counted once.

    Private and file pages by proportional share (``smaps_rollup``); shared memory by the files and mappings that hold
    it, because batches between a worker and its parent may be mapped by neither.
    """
    total, shared = 0, {}
    for pid in _members(root, _stats()):
        folder = Path(f"/proc/{pid}")
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_File:")):
                    total += int(line.split()[1]) * 1024
            for line in (folder / "maps").read_text().splitlines():
                span, mode, _, device, inode, *name = line.split(maxsplit=5)
                if mode[3] == "s" and inode != "0" and name and _is_memory(name[0]):
                    low, high = (int(part, 16) for part in span.split("-"))
                    shared[inode] = max(shared.get(inode, 0), high - low)
            for link in (folder / "fd").iterdir():
                if _is_memory(os.readlink(link)):
                    found = link.stat()
                    shared[str(found.st_ino)] = max(shared.get(str(found.st_ino), 0), found.st_blocks * 512)
        except OSError:  # ended meanwhile
            continue
    return total + sum(shared.values())


def _is_memory(name: str) -> bool:
    return name.startswith(("/dev/shm/", "/memfd:", "/dev/zero", "/torch_", "/SYSV"))


class Child:
    """A Python module in a process of its own that answers JSON lines, see ``_data_peers.main``.

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
