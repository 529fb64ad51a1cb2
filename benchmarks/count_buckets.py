"""Which static shapes captured steps get, counted: how many there are, how often they are replayed, what they pad.

    python -m benchmarks.count_buckets --data-root ROOT [--heights 2 3] [--widths 4 6] [--batch 1 2 8]

Nothing is trained or timed. The sizes of the root's real samples (images after their random resizing and cropping,
texts in word pieces, objects of an image) are drawn again and again into the steps of the recipe ``all8_shared``,
grouped as the loader groups them (``data.group``) and padded as ``buckets.Buckets`` does. Of each choice of buckets the
table tells the shapes met after so many steps and the share of steps that were replayed (a shape's first step is
eager), the share of pixels and of tokens that is real, and the memory of the input arena beside that of a set of
tensors for each shape. A shape's text and targets are powers of two from ``--least-text`` and ``--least-targets``.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.step.problems import make_batch
from unit_fast import recipes
from unit_fast.batch import Batch
from unit_fast.buckets import Buckets, BucketSpec, buckets_of
from unit_fast.config import BucketConfig, DataConfig
from unit_fast.data import open_dataset
from unit_fast.data.sampler import normalised
from unit_fast.errors import UserError
from unit_fast.run.input_arena import InputArena
from unit_fast.run.step_graph import MOST_GRAPHS, WARM_UP
from unit_fast.tasks import get_task

STEPS = (1_000, 10_000, 100_000)
VISITS = 4000
"""Samples of each data set that sizes are taken of: every sample of the root with several random transforms."""


def facts_of(name: str, config) -> dict[str, np.ndarray]:
    """Of visits to a data set: height, width, text (word pieces), objects, int [VISITS] each; 0 where it has none."""
    dataset = open_dataset(
        name, "train", config.data, config.model.tasks[name], augment=True,
        vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
    )  # fmt: skip
    task, counted = get_task(name), min(VISITS, 4 * len(dataset))
    length = [dataset.text_tokens(i) if task.has_text else 0 for i in range(len(dataset))]
    visits = [(visit % len(dataset), visit) for visit in range(VISITS)]
    sizes = [dataset.shape(*visit) if task.has_image else (0, 0) for visit in visits]
    objects = [len(dataset.get(*visit)["labels"]) if task.is_detection else 0 for visit in visits[:counted]]
    objects = [objects[visit % counted] for visit in range(VISITS)]
    heights, widths = zip(*sizes)
    text = [length[index] for index, _ in visits]
    columns = {"height": heights, "width": widths, "text": text, "objects": objects}
    return {column: np.array(values) for column, values in columns.items()}


def batches_of(
    facts: dict[str, np.ndarray], buckets: Buckets, batch: int, group: int, steps: int, rng
) -> list[dict[str, int]]:
    """What each of ``steps`` batches must hold, by the names of ``facts``, and its ``real`` places; grouped as the
    loader does it."""
    images = bool(facts["height"].any())
    real = facts["height"] * facts["width"] if images else facts["text"]
    sizes = zip(facts["height"].tolist(), facts["width"].tolist())
    ranks = np.array([buckets.rank(*size) for size in sizes] if images else real[:, None])
    found = []
    while len(found) < steps:
        drawn = rng.integers(len(real), size=batch * group)
        if batch > 1:
            drawn = drawn[np.lexsort(ranks[drawn].T[::-1])]
        for members in rng.permutation(drawn.reshape(group, batch)):
            largest = {name: int(column[members].max()) for name, column in facts.items()}
            found.append(largest | {"real": real[members].sum()})
    return found[:steps]


def spec_of(buckets: Buckets, largest: dict[str, int], batch: int, detection: bool) -> BucketSpec:
    """The bucket of a batch."""
    size = (largest["height"], largest["width"]) if largest["height"] else (largest["text"],)
    targets = max(1, largest["objects"]) if detection else 0
    return buckets.bucket_of([size] * batch, text_len=largest["text"], targets=targets)


def fields_of(task, batch: int) -> Batch:
    """A batch with the fields of the task, of no size that counts."""
    ones = (1,) * batch
    image = (batch, 1, 1) if task.has_image else None
    return make_batch(task.name, image, ones if task.has_text else (), ones if task.is_detection else ())


def count(config, facts: dict[str, dict[str, np.ndarray]], batch: int, most: int = STEPS[-1]) -> dict:
    """The row of one choice of buckets and one batch size."""
    rng, buckets = np.random.default_rng(0), buckets_of(config)
    ratios = normalised(config.ratios, facts)
    tasks = np.array(sorted(facts))[rng.choice(len(facts), size=most, p=[ratios[n] for n in sorted(facts)])]
    batches = {
        name: iter(batches_of(facts[name], buckets, batch, config.data.group, int((tasks == name).sum()), rng))
        for name in facts
    }
    met: Counter = Counter()
    real, padded, out = Counter(), Counter(), {"batch": batch}
    memory, arena = 0, InputArena(buckets, torch.device("meta"))
    may_be_captured, replayed = set(), 0
    for step, name in enumerate(tasks, start=1):
        task, largest = get_task(name), next(batches[name])
        spec = spec_of(buckets, largest, batch, task.is_detection)
        shape = name, spec
        met[shape] += 1
        if met[shape] == 1:
            static = arena.place(spec, [fields_of(task, batch)])
            memory += sum(t.nbytes for t in static[0].tensors().values())
            if len(met) <= MOST_GRAPHS:  # beyond the most graphs there may be, a shape stays eager
                may_be_captured.add(shape)
        replayed += met[shape] > WARM_UP and shape in may_be_captured
        kind = "image" if task.has_image else "text"
        real[kind] += largest["real"]
        padded[kind] += batch * (spec.height * spec.width or spec.text_len)
        if step in STEPS:
            out |= {f"shapes_{step}": len(met), f"replayed_{step}": round(replayed / step, 4)}
    out |= {f"real_{k}": round(real[k] / padded[k], 4) for k in padded}
    return out | {"arena_mib": round(arena.bytes / 2**20, 1), "a_set_each_mib": round(memory / 2**20, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, count, print."""
    default = BucketConfig()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-root", required=True, help="data sets whose sizes count")
    parser.add_argument("--heights", type=int, nargs="+", default=[default.heights], help="short sides of images")
    parser.add_argument("--widths", type=int, nargs="+", default=[default.widths], help="long sides for each of them")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8], help="samples of a forward pass")
    parser.add_argument("--least-text", type=int, default=default.least_text, help="shortest text, tokens")
    parser.add_argument("--least-targets", type=int, default=default.least_targets, help="fewest places for objects")
    parser.add_argument("--steps", type=int, default=STEPS[-1], help="steps in all")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args(arguments)
    config = dataclasses.replace(
        recipes.recipe("all8_shared"), data=DataConfig(root=options.data_root, engine="torchvision")
    )
    facts = {}
    for name in config.model.tasks:
        try:
            facts[name] = facts_of(name, config)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not facts:
        return 2
    table = Table(title="static shapes of all8_shared", title_justify="left", box=box.SIMPLE)
    rows = []
    for heights in options.heights:
        for widths in options.widths:
            chosen = BucketConfig(
                heights=heights, widths=widths, least_text=options.least_text, least_targets=options.least_targets
            )
            for batch in options.batch:
                row = count(dataclasses.replace(config, buckets=chosen), facts, batch, options.steps)
                rows.append({"heights": heights, "widths": widths, **row})
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
