"""Two processes that meet over gloo, each running ``worker(rank, folder)`` of a test's module."""

import datetime
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def meet(rank: int, folder: str) -> None:
    """Called first by a worker: one thread, and a process group with the other one."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=TIMEOUT_S / 2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit
    )


def run_both(module: str, folder: Path) -> None:
    """Run the workers of ``module`` and wait; both must end with 0."""
    code = f"import sys; from {module} import worker; worker(int(sys.argv[1]), sys.argv[2])"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
