"""What a result depends on besides the configuration: versions, machine, commit."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "unit_fast", "torch", "torchvision", "triton", "numpy", "scipy", "pillow", "transformers", "tokenizers",
    "safetensors", "pycocotools", "faster-coco-eval", "tyro", "rich",
)  # fmt: skip


def environment() -> dict:
    """Versions, processor, threads, GPUs and the commit of a checkout: to keep with a run and to paste in an issue.

    Host reads only; nothing about users, paths or environment variables other than ``UNIT_FAST_KERNELS``.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "usable": len(os.sched_getaffinity(0))}
        if hasattr(os, "sched_getaffinity")
        else {"name": _cpu_name(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "kernels": os.environ.get("UNIT_FAST_KERNELS", "auto"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package is run from, with ``+`` where tracked files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        run = {"capture_output": True, "text": True, "timeout": 20, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu(index: int) -> dict:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
    }
