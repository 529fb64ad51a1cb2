"""CPU threads: how many, how they wait for each other, and whether other work is in their way.

An operator on a CPU is split into equal parts, one a thread, and ends with the slowest part. Where another job takes
the core of one thread, the others wait for it, by default in a busy loop that takes the cores from the work: a small
model falls to a tenth of its speed. So a command lets threads fall asleep soon, and takes no more threads than there
are free cores where the number is left to it. Nothing here imports torch: OpenMP reads its settings when torch loads
it.
"""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how threads wait."""
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user says how many there are."""

_LOOK_S = 0.2
_IN_THE_WAY = 0.5
"""Cores taken by others from which on threads are slowed down noticeably; below it is the noise of a desktop."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let OpenMP's threads wait busily for a moment and then asleep, unless the environment says how; whether it was
    done.

    For this process and those it starts. Without effect, and not done, once torch is imported. Measured on two cores:
    free, a large model keeps nine tenths of the speed it has with the default, which waits 150 times as long; with
    another job on one of them it has two and a half times as much.
    """
    if "torch" in sys.modules or any(environment.get(name) for name in WAITING):
        return False
    # GCC's OpenMP, which torch brings on Linux, takes the second; LLVM's takes the first.
    environment |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
    return True


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its control group, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = group_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.floor(quota + 0.01))) if quota < math.inf else cores


def group_quota(groups: Path, mounted: Path) -> float:
    """Cores' worth of CPU time that the control groups (version 2 or 1) of a process allow; inf without a limit."""
    least = math.inf
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # no Linux
        return least
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / "cpu" if controllers else mounted
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):  # a container sees its own group as the root
            if folder.is_relative_to(root):
                least = min(least, _quota_of(folder))
    return least


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
        return float(quota) / float(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


class Chosen(NamedTuple):
    """How many threads, and what a user should hear of it."""

    count: int
    line: str | None


def choose(asked: int, default: int, *, keep: bool = False, taken: float | None = None) -> Chosen:
    """The number of threads for a process on a CPU.

    Args:
        asked: the user's number; 0 leaves it to us.
        default: what torch would take, which follows ``OMP_NUM_THREADS`` and else the cores.
        keep: take ``default`` whether or not so many cores are free.
        taken: ``Others.taken`` of a moment, by default of the next one.
    """
    cores = usable_cores()
    told = bool(asked or any(os.environ.get(name, "").strip() for name in NUMBERS))
    count = (asked or default) if told else min(default, cores)
    if count == 1:
        return Chosen(1, None)
    if taken is None:
        others = Others()
        time.sleep(_LOOK_S)
        taken = others.taken()
    free = _free(cores, taken)
    if taken < _IN_THE_WAY or count <= free:
        return Chosen(count, None)
    found = f"other jobs take {taken:.1f} of {cores} cores"
    if told or keep:
        return Chosen(count, f"{found}: the {count} threads of this one will wait for each other; try --threads {free}")
    return Chosen(
        free,
        f"{found}: this one takes {free} thread{'s' if free > 1 else ''}; --threads {count} takes all the same "
        "(results depend on the number in their last bits)",
    )


def _free(cores: int, taken: float) -> int:
    return max(1, cores - round(taken))


class Others:
    """How many of the usable cores other processes take, since it was made or last asked."""

    def __init__(self):
        self._before = self._times()

    def taken(self) -> float:
        """Cores on average; 0 where the system does not tell."""
        before, self._before = self._before, self._times()
        if before is None or self._before is None:
            return 0.0
        now, busy, own = (new - old for old, new in zip(before, self._before))
        return max(0.0, busy - own) / max(now, 1e-3)

    @staticmethod
    def _times() -> tuple[float, float, float] | None:
        """(time, time the usable cores were busy, time this process and its children used), seconds."""
        try:
            cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
            tick = 1 / os.sysconf("SC_CLK_TCK")
            rows = (line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu"))
            # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is part of user's
            busy = sum(sum(map(int, r[1:4])) + sum(map(int, r[6:9])) for r in rows if r[0] in cores)
            own = time.process_time() + tick * sum(_ticks(child.pid) for child in multiprocessing.active_children())
            return time.monotonic(), tick * busy, own
        except (OSError, ValueError, AttributeError, IndexError):
            return None


def _ticks(pid: int) -> int:
    """Clock ticks a process has used."""
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    except (OSError, ValueError):
        return 0


class Watch:
    """Tells once when threads of a run on a CPU come to wait for each other."""

    def __init__(self, count: int):
        self._count, self._others = count, Others()
        self._told = count == 1

    def look(self) -> str | None:
        """A line for the user, from what happened since the last look (some seconds ago)."""
        if self._told:
            return None
        taken, cores = self._others.taken(), usable_cores()
        free = _free(cores, taken)
        if taken < _IN_THE_WAY or self._count <= free:
            return None
        self._told = True
        return (
            f"other jobs take {taken:.1f} of {cores} cores: the {self._count} threads of this run wait for each other; "
            f"stop it with Ctrl-C and go on with --resume auto --threads {free}"
        )
