"""What the tests of the benchmarks share: small runs, their rows, and what a card would have given."""

import json
from pathlib import Path

import torch

from benchmarks.runner.profile import STEP, Event, Profile
from benchmarks.step import card as card_step
from benchmarks.step import problems, work

CARD = {
    "device": "cuda", "gpu": "NVIDIA H200", "cpu": "Xeon", "cores": 16, "threads": 2, "driver": "580",
    "commit": "abc", "versions": {"torch": "2.11.0"}, "date": "2026-11-27T00:00:00Z",
}  # fmt: skip
"""What every row of a card says."""


def quick(main, path: Path, *arguments: str) -> int:
    """Exit status of a small run of a benchmark; its rows go to ``path``."""
    return main(["--quick", "--threads", "1", "--rounds", "1", "--json", str(path), *arguments])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def host(name, start, end=None):
    return Event(name, False, start, start + 1 if end is None else end)


def card(name, start, end):
    return Event(name, True, start, end)


TWO_STEPS = [
    host("cudaDeviceSynchronize", 0),  # before, between and after the steps it is the measuring's own
    host(STEP, 10, 50), host("cudaGraphLaunch", 11), host("cudaMemcpyAsync", 12), host("aten::add", 13),
    host("cudaStreamSynchronize", 14), host("cuLaunchKernelEx", 49.5, 51),
    host("cudaDeviceSynchronize", 55),
    host(STEP, 60, 90), host("cudaGraphLaunch", 61), host("cudaLaunchKernelExC", 62), host("cudaMemcpyAsync", 70),
    host("cudaDeviceSynchronize", 95),
    card("_adamw_update_kernel", 20, 1020), card("_adamw_update_kernel", 2000, 3000),
    card("nvjet_sm90_tst_64x64", 520, 1520),  # beside the first: half of it counts once more
    card("Memcpy HtoD (Pinned -> Device)", 4000, 4100), card("Memcpy DtoH (Device -> Pageable)", 4200, 4300),
    card("Memset (Device)", 4300, 4400),
]  # fmt: skip


def steps_of_a_card(gpu="NVIDIA H200") -> list[dict]:
    """Rows of whole steps: one with figures, one without."""
    case, least = problems.CARD["coco_b2"], work.Work({"bfloat16": 3.1e12}, 1e10)
    stamp = {key: value for key, value in CARD.items() if key != "device"} | {"gpu": gpu}
    arguments = stamp, least, torch.device("cuda")
    found = Profile.of(TWO_STEPS, 2)
    ours = card_step.row_of("coco_b2", case, "ours", *arguments, times=[10.0, 8.0, 9.0], found=found, peak=4.0)
    return [ours, card_step.row_of("coco_b2", case, "eager", *arguments, status="out of memory")]
