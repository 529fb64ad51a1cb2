"""A run up to its first updates without leaving anything behind: what it would refuse, and how fast it would be."""

import contextlib
import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from unit_fast.config import RunConfig
from unit_fast.data.loader import Loader
from unit_fast.data.sampler import normalised
from unit_fast.numerics import arithmetic
from unit_fast.run.checkpoints import find
from unit_fast.run.folder import RunFolder, check_out
from unit_fast.run.start import Parts, start
from unit_fast.run.step import Step

MEASURED_S, LEAST = 5.0, 3
"""Seconds and updates that are measured of a task: whichever takes longer, the first third of them not counted."""


@contextlib.contextmanager
def rehearsal(
    config: RunConfig, out: str | Path, resume: str | Path | None = None, allow_changed: Sequence[str] = ()
) -> Iterator[Parts]:
    """The run that ``train.train`` would start with the same arguments, its files in a folder that goes away.

    ``UserError`` wherever ``train`` would refuse: it is the same start. Its first lines are printed.
    """
    check_out(out, resume)
    source = find(Path(out) / "checkpoints", resume)
    with tempfile.TemporaryDirectory(prefix="unit_fast_") as aside:
        folder = RunFolder(aside)
        try:
            parts = start(config, folder, source, allow_changed, "plain", None)
            try:
                yield parts
            finally:
                parts.log.close()
        finally:
            folder.release()


def seconds_per_update(parts: Parts) -> dict[str, float]:
    """Data set key -> seconds of an update on it, reading included, measured by training: ``parts`` is used up.

    Of accumulated batches only one is measured, with the optimiser's step, and counted as often: at most so long.
    """
    config, state, found = parts.config, parts.state, {}
    with arithmetic(config.precision, config.deterministic, parts.device):
        step = Step(state, config, parts.masks, parts.device)
        for name, dataset in parts.datasets.items():
            only = dataclasses.replace(config, ratios={name: 1.0}, accumulate=1)
            with Loader({name: dataset}, only, 0, config.steps, Counter({name: 0}), device=parts.device) as batches:
                times, begun = [], time.monotonic()
                for item in batches:
                    update = step(item.task, item.batches)
                    state.count(item.request)
                    update.grad_norm.item()  # the card has done it
                    times.append(time.monotonic() - begun - sum(times))
                    if sum(times) >= MEASURED_S and len(times) >= LEAST:
                        break
            counted = times[len(times) // 3 :]
            found[name] = config.accumulate * sum(counted) / len(counted)
    return found


def mean_seconds(parts: Parts, found: dict[str, float]) -> float:
    """Seconds of an update on average over the run's tasks, as often as each is drawn."""
    ratios = normalised(parts.config.ratios, parts.config.model.tasks)
    return sum(ratios[name] * seconds for name, seconds in found.items())


def peak_gib(device: torch.device) -> float | None:
    """Memory that was taken of a card at most; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
