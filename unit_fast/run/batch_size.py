"""The batch of a forward pass and the passes of an update, where the configuration leaves them to the run."""

import contextlib
import dataclasses
import os
from pathlib import Path

import torch

from unit_fast.config import RunConfig
from unit_fast.errors import UserError
from unit_fast.run.estimate import estimate

CUDA_SHARE, CPU_SHARE = 0.7, 0.5
"""Of the device's memory that the estimate, a lower bound, may take. A CPU's memory is other programs' too."""
CPU_MOST = 8
"""Larger batches are no faster on a CPU."""


def with_batch(
    config: RunConfig, device: torch.device, saved: RunConfig | None = None, processes: int = 1
) -> tuple[RunConfig, str]:
    """``config`` with ``batch_per_process`` and ``accumulate`` set, and one line that says how; empty where both were
    given and nothing is to be said.

    Their product, times ``processes``, is ``target_batch``: with one of them given the other follows; with none the
    batch is the largest divisor that the device's memory holds, or, where a run goes on, the checkpoint's, whose
    configuration is ``saved``. ``UserError`` where what is given does not divide the target.
    """
    target, batch, accumulate = config.target_batch, config.batch_per_process, config.accumulate
    if not target or batch and accumulate:
        missed = bool(target) and batch * accumulate * processes != target
        return config, f"batch and accumulate were both given: target_batch {target} is not aimed at" if missed else ""
    if batch:
        accumulate, how = _quotient(target, "batch_per_process", batch, processes), "the batch was given"
    elif accumulate:
        batch, how = _quotient(target, "accumulate", accumulate, processes), "the accumulation was given"
    elif saved is not None:
        batch, accumulate, target = saved.batch_per_process, saved.accumulate, saved.target_batch
        how = "the checkpoint's"
    else:
        batch, how = _largest(config, device, target // _checked(target, processes))
        accumulate = target // (batch * processes)
    config = dataclasses.replace(config, batch_per_process=batch, accumulate=accumulate, target_batch=target)
    many = f" x {processes} processes" if processes > 1 else ""
    return config, f"batch {batch} x {accumulate} accumulated{many} = {batch * accumulate * processes}: {how}"


def _checked(target: int, processes: int) -> int:
    if target % processes:
        raise UserError(f"target_batch: {target} is not a multiple of {processes} processes; give another")
    return processes


def _quotient(target: int, name: str, given: int, processes: int) -> int:
    whole = target // _checked(target, processes)
    if whole % given:
        near = sorted(sorted(_divisors(whole), key=lambda d: abs(d - given))[:3])
        raise UserError(
            f"{name}: {given} does not divide the {whole} samples of an update (target_batch {target}); give one of "
            f"{', '.join(map(str, near))}, or give both --batch and --accumulate, or --target-batch 0"
        )
    return whole // given


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _largest(config: RunConfig, device: torch.device, samples: int) -> tuple[int, str]:
    """The largest divisor of ``samples`` whose estimate fits, and why it was chosen."""
    one = dataclasses.replace(config, batch_per_process=1, accumulate=1, task_batch={})
    need = estimate(one, device)
    left = {name: size for name, size in need.activations.items() if name not in config.task_batch}
    per_sample = max((left or need.activations).values())
    memory, share = device_memory(device), CUDA_SHARE if device.type == "cuda" else CPU_SHARE
    most = CPU_MOST if device.type == "cpu" else samples
    fitting = [d for d in _divisors(samples) if d <= most and need.fixed + d * per_sample <= share * memory]
    gib = 2**30
    if not fitting:
        return 1, (
            f"the smallest; its estimate of {(need.fixed + per_sample) / gib:.1f} GiB is more than {share:.0%} of the "
            f"{memory / gib:.1f} GiB of {device}: it may run out of memory"
        )
    batch = fitting[-1]
    return batch, (
        f"the largest{f' up to {most}' if most == CPU_MOST else ''} whose estimate ({need.fixed / gib:.1f} + {batch} x "
        f"{per_sample / gib:.2f} GiB) is within {share:.0%} of the {memory / gib:.1f} GiB of {device}"
    )


def device_memory(device: torch.device) -> int:
    """Bytes of a card, or of the machine as far as this process may have them. Not what is free just now: the same
    machine gives the same batch."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)
