"""``unit-fast train --dry-run``: what a run would be."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from unit_fast.commands.train import check_data
from unit_fast.config import RunConfig, to_json
from unit_fast.recipes import batch_note
from unit_fast.run.batch_size import device_memory, with_batch
from unit_fast.run.checkpoints import find
from unit_fast.run.estimate import estimate
from unit_fast.run.rehearsal import mean_seconds, peak_gib, rehearsal, seconds_per_update
from unit_fast.run.setup import device_of
from unit_fast.run.start import Parts, completed
from unit_fast.run.status import duration
from unit_fast.tasks import get_task
from unit_fast.weights import checkpoint

_GIB = 2**30


def run(config: RunConfig, out: Path, resume: str | None, allow_changed: Sequence[str], measured: bool) -> int:
    """Print the resolved configuration and what it needs; then start the run in a folder that goes away, which refuses
    what a run would. ``measured``: train some seconds too."""
    device, given = device_of(config), config
    source = find(Path(out) / "checkpoints", resume)
    config, _ = completed(config, source)
    config, how = with_batch(config, device, checkpoint.config_of(source) if source else None)
    batch = {"batch_per_process": config.batch_per_process, "accumulate": config.accumulate}
    given = dataclasses.replace(given, target_batch=config.target_batch, **batch)
    found = estimate(config, device)
    print(to_json(config), end="")
    print(f"parameters       {found.parameters:,}, {found.trainable:,} trained")
    print(f"batch            {batch_note(config)}")
    if how:
        print(f"                 {how}")
    kept = ", ".join(f"{get_task(name).short} {size / _GIB:.2f}" for name, size in found.activations.items())
    there = device_memory(device) / _GIB
    print(
        f"memory           at least {found.total / _GIB:.1f} of the {there:.1f} GiB of {device}: "
        f"{found.fixed / _GIB:.1f} GiB of weights, gradients and optimiser,\n"
        "                 and for the backward pass of one batch of the largest samples (float32)\n"
        f"                 {kept} GiB"
    )
    check_data(config)
    print("\nthe run would say:", flush=True)
    # the run itself finds out what follows from the data, and keeps it in its folder
    with rehearsal(given, out, resume, allow_changed) as parts:
        starts = ", ".join(f"{part} {source}" for part, source in parts.config.started_from.items())
        print(f"\nstarts from      {source or starts}")
        sizes = ", ".join(f"{get_task(n).short} {len(data)}" for (n, _), data in parts.evaluator.datasets.items())
        print(f"evaluated on     {config.eval_split}: {sizes or 'nothing'}")
        print(f"run folder       {out}: nothing was written there")
        if measured:
            _measure(parts)
    return 0


def _measure(parts: Parts) -> None:
    seconds = seconds_per_update(parts)
    mean, most = mean_seconds(parts, seconds), "at least " if parts.config.accumulate > 1 else ""
    each = ", ".join(f"{get_task(name).short} {value:.3g}" for name, value in seconds.items())
    print(f"measured         seconds a step, reading included: {each}")
    print(
        f"                 {most}{3600 / mean:,.0f} steps an hour, {duration(mean * parts.config.steps)} for all "
        f"{parts.config.steps}, evaluations and saves not counted"
    )
    if peak := peak_gib(parts.device):
        print(f"                 at most {peak:.1f} GiB of the card were taken")
