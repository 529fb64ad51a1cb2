"""What a tree of processes costs: CPU time and memory (Linux)."""

import os
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


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
