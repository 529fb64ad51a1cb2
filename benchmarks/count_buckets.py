"""Which static shapes captured steps get, counted: how many there are, how often they are replayed, what they pad.

    python -m benchmarks.count_buckets --data-root ROOT [--heights 2 3] [--widths 4 6] [--batch 1 2 8]

Nothing is trained or timed. The sizes of the root's real samples (images after their random resizing and cropping,
texts in word pieces, objects of an image) are drawn again and again into the steps of the recipe ``all8_shared``,
grouped as the loader groups them (``data.group``) and padded as ``batch.Buckets`` does. Of each choice of buckets the
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


def facts_of(name: str, config) -> np.ndarray:
    """int [VISITS,4]: height, width, word pieces and objects of visits to a data set; 0 where it has none."""
    dataset = open_dataset(
        name, "train", config.data, config.model.tasks[name], augment=True,
        vocab_size=config.model.text.vocab_size, attribute_outputs=config.model.loss.attribute_outputs,
    )  # fmt: skip
    task, rows = get_task(name), []
    length = [dataset.text_tokens(i) if task.has_text else 0 for i in range(len(dataset))]
    for visit in range(VISITS):
        index = visit % len(dataset)
        height, width = dataset.shape(index, visit) if task.has_image else (0, 0)
        objects = len(dataset.get(index, visit)["labels"]) if task.is_detection and visit < 4 * len(dataset) else None
        if task.is_detection and objects is None:
            objects = rows[visit - 4 * len(dataset)][3]
        rows.append((height, width, length[index], objects or 0))
    return np.array(rows)


def batches_of(facts: np.ndarray, buckets: Buckets, batch: int, group: int, steps: int, rng) -> np.ndarray:
    """int [steps,4]: what each batch must hold, and in a fifth column the real places, grouped as the loader does."""
    images = bool(facts[:, 0].any())
    real = facts[:, 0] * facts[:, 1] if images else facts[:, 2]
    ranks = [buckets.rank(int(h), int(w)) for h, w in facts[:, :2]] if images else [(t,) for t in real]
    ranks = np.array(ranks)
    found = []
    while len(found) < steps:
        drawn = rng.integers(len(facts), size=batch * group)
        if batch > 1:
            drawn = drawn[np.lexsort(ranks[drawn].T[::-1])]
        for members in rng.permutation(drawn.reshape(group, batch)):
            found.append((*facts[members].max(0), real[members].sum()))
    return np.array(found[:steps])


def spec_of(buckets: Buckets, row, batch: int, detection: bool) -> BucketSpec:
    """The bucket of a batch."""
    height, width, text, objects, _ = map(int, row)
    size = (height, width) if height else (text,)
    return buckets.bucket_of([size] * batch, text_len=text, targets=max(1, objects) if detection else 0)


def count(config, facts: dict[str, np.ndarray], batch: int, most: int = STEPS[-1]) -> dict:
    """The row of one choice of buckets and one batch size."""
    rng, buckets = np.random.default_rng(0), buckets_of(config)
    ratios = normalised(config.ratios, facts)
    tasks = np.array(sorted(facts))[rng.choice(len(facts), size=most, p=[ratios[n] for n in sorted(facts)])]
    rows = {
        name: iter(batches_of(facts[name], buckets, batch, config.data.group, int((tasks == name).sum()), rng))
        for name in facts
    }
    met: Counter = Counter()
    real, padded, out = Counter(), Counter(), {"batch": batch}
    memory, arena = 0, InputArena(buckets, torch.device("meta"))
    eager = 0
    for step, name in enumerate(tasks, start=1):
        task, row = get_task(name), next(rows[name])
        spec = spec_of(buckets, row, batch, task.is_detection)
        key = name, spec
        met[key] += 1
        # Beyond the most graphs there may be, a shape stays eager.
        captured = met[key] > WARM_UP and list(met).index(key) < MOST_GRAPHS if len(met) > MOST_GRAPHS else None
        eager += not (met[key] > WARM_UP if captured is None else captured)
        if met[key] == 1:
            static = arena.place(spec, [like(name, config, batch)])
            memory += sum(t.nbytes for t in static[0].tensors().values())
        kind = "image" if task.has_image else "text"
        real[kind] += row[-1]
        padded[kind] += batch * (spec.height * spec.width or spec.text_len)
        if step in STEPS:
            out |= {f"shapes_{step}": len(met), f"replayed_{step}": round(1 - eager / step, 4)}
    out |= {f"real_{k}": round(real[k] / padded[k], 4) for k in padded}
    return out | {"arena_mib": round(arena.bytes / 2**20, 1), "a_set_each_mib": round(memory / 2**20, 1)}


def like(name: str, config, batch: int) -> Batch:
    """A batch with the fields of the task, of no size that counts."""
    task, out = get_task(name), Batch(task=name)
    if task.has_image:
        out.image = torch.empty(batch, 3, 1, 1, device="meta")
    if task.has_text:
        for field in ("input_ids", "attention_mask", "token_type_ids"):
            setattr(out, field, torch.empty(batch, 1, dtype=torch.int64, device="meta"))
    if task.is_detection:
        out.labels = torch.empty(batch, 1, dtype=torch.int64, device="meta")
        out.boxes, out.counts = torch.empty(batch, 1, 4, device="meta"), torch.empty(batch, device="meta")
        if task.attributes:
            out.attributes = torch.empty(batch, 1, config.model.loss.max_attributes, dtype=torch.int64, device="meta")
    elif task.loss == "bce":
        out.answer_scores = torch.empty(batch, config.model.tasks[name].outputs, device="meta")
    else:
        out.label = torch.empty(batch, dtype=torch.int64, device="meta")
    return out


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
