"""Whole configurations by name: the rows of the paper's tables and the demo."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from unit_fast.config import RunConfig
from unit_fast.errors import UserError, nearest
from unit_fast.recipes import demo, own, own_tables, paper
from unit_fast.tasks import get_task


class Recipe(NamedTuple):
    about: str
    """One line about it."""
    make: Callable[[], RunConfig]
    """Its configuration, without the name."""


RECIPES: dict[str, Recipe] = {name: Recipe(row.about, row.config) for name, row in paper.ROWS.items()}
RECIPES |= {
    make.__name__: Recipe(make.__doc__, make)
    for make in (
        demo.small, demo.demo, demo.demo_quick, own.detect, own.detect_resnet50, own.detect_detr,
        own_tables.answer, own_tables.answer_resnet50, own_tables.entail, own_tables.entail_resnet50,
        own_tables.classify, own_tables.classify_bert, own_tables.mix, own_tables.mix_resnet50,
    )
}  # fmt: skip


def recipe(name: str) -> RunConfig:
    """The configuration called ``name``; ``UserError`` with the nearest names if there is none."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}; `unit-fast recipes` lists them")
    return dataclasses.replace(RECIPES[name].make(), recipe=name)


def batch_note(config: RunConfig) -> str:
    """The effective batch beside the paper's."""
    parts = config.batch_per_process, config.accumulate
    how = "{} x {} accumulated".format(*parts) if all(parts) else "chosen for the device"
    note = f"effective batch {config.effective_batch} ({how}), the paper's is {paper.PAPER_BATCH}"
    if config.task_batch and config.accumulate:
        note += "; " + ", ".join(f"{get_task(n).short} {b * config.accumulate}" for n, b in config.task_batch.items())
    return note
