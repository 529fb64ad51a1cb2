"""What a figure depends on besides the code: machine, versions, commit, the card's peaks."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from unit_fast_kernels.shared.cards import CARDS

from benchmarks.runner.cases import Case
from unit_fast.run.environment import environment as run_environment

ROOT = Path(__file__).resolve().parents[2]

PEAKS = {name.upper(): {**card.flops, "bytes": card.bandwidth} for name, card in CARDS.items()}
"""Card -> FLOP/s by dtype and bytes/s."""


def environment() -> dict:
    """What a figure depends on besides the code: machine, devices, threads, versions, commit."""
    found = run_environment()
    commit, changed, _ = (found["commit"] or "").partition("+")
    packages = ("torch", "torchvision", "triton", "transformers", "numpy", "scipy")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": found["cpu"]["name"],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": found["python"]} | {name: version_of(name) for name in packages},
        "commit": commit[:7] + changed or None,
        "sources": sources(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def card_of(gpu: str) -> str:
    """A card's short name for files by the name that its driver gives it: ``h200``, or the whole name in lower case."""
    known = next((card for card in CARDS if card.upper() in gpu), None)
    return known or re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


@functools.cache
def sources(root: Path = ROOT) -> str:
    """A digest of what computes and measures: the Python files and tables of the package, its kernels and the
    benchmarks. It says whether two results come from the same code, also where there is no repository."""
    digest = hashlib.sha256()
    for folder in ("unit_fast", "kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                data = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where neither the kernel nor nvidia-smi tells it."""
    try:
        if found := re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text()):
            return found[1]
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def peak_of(gpu: str | None) -> dict[str, float] | None:
    """The entry of ``PEAKS`` for a card by the name that its driver gives it; None for a card that has none."""
    return next((peak for card, peak in PEAKS.items() if gpu and card in gpu), None)


def percent_of_peak(case: Case, time_ms: float, gpu: str | None) -> float | None:
    """Share of the card's arithmetic or memory peak, whichever is closer; None where work or peak is unknown."""
    peak = peak_of(gpu)
    if peak is None or case.device != "cuda":
        return None
    seconds, shares = time_ms * 1e-3, []
    if case.flops and case.dtype in peak:
        shares.append(case.flops / seconds / peak[case.dtype])
    if case.bytes:
        shares.append(case.bytes / seconds / peak["bytes"])
    return round(100 * max(shares), 2) if shares else None
