"""Peak memory of a provider: that of a child process which runs three of its steps and nothing else."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.runner.cases import Provider
from benchmarks.runner.machine import ROOT
from benchmarks.runner.timing import one_step

STEPS = 3


def peak_resident() -> int:
    """Bytes this process had resident at its peak: ``ru_maxrss``, as far as it is its own.

    Linux carries the peak of the process that started it over into ``ru_maxrss`` (exec keeps it, and a child made by
    vfork begins with its parent's memory), so a child of a process with two models would never report less than those.
    ``VmHWM`` is the same quantity of the new memory alone.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_this_process(provider: Provider, device: torch.device) -> dict:
    """Peak memory after three steps: resident, and the allocator's peak on CUDA."""
    for _ in range(STEPS):
        one_step(provider.step, device)
    host = peak_resident()
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"host_gib": host / 2**30, "device_gib": device_bytes and device_bytes / 2**30}


def of_a_child(benchmark: str, case: str, provider: str, arguments: Sequence[str]) -> float:
    """GiB at the peak of a child process (of the device on CUDA); ``arguments`` are the benchmark's own."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments, "--memory-child", case, provider]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the memory run of {case}, {provider} failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return round(figures["device_gib"] or figures["host_gib"], 3)
