"""Damaged annotations: a reader gives samples or ``UserError``, nothing else."""

import copy
import json
import random

import numpy as np
import pytest

from tests.data_roots import data, task_config, whole_root, write
from unit_fast.data import collate, open_dataset
from unit_fast.errors import UserError
from unit_fast.tasks import TASKS

STRANGE = [
    None, True, -1, 0, 2**70, 1e308, -0.5, "", "\x1b[2J", "../../x", "-", [], [[]], {}, {"a": 1}, [None] * 4, "x" * 500,
]  # fmt: skip


def places(value, at=()):
    """Every position in nested lists and dicts."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*at, i))


def mutated(value, rng):
    """``value`` with one place replaced, removed or doubled."""
    value = copy.deepcopy(value)
    at = rng.choice(list(places(value)))
    if not at:
        return rng.choice(STRANGE)
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    how = rng.random()
    if how < 0.7:
        parent[at[-1]] = rng.choice(STRANGE)
    elif how < 0.85:
        del parent[at[-1]]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[at[-1]]))
    return value


def use(root):
    """Open every data set, strict, and make a batch of each."""
    opened = 0
    for task in TASKS.values():
        config = task_config(task.short, **({"outputs": 4} if task.short == "vqa2" else {}))
        for split in ("train", "val", "test"):
            try:
                dataset = open_dataset(task.name, split, data(root, short_side=24, max_side=48), config, augment=False)
                collate(task.name, [dataset.get(i) for i in range(len(dataset))])
                if task.is_detection:
                    dataset.coco_ground_truth()
                opened += 1
            except UserError as error:
                assert "\x1b" not in str(error)  # noqa: PT017 - samples are as right
    return opened


def damage(root, rounds, seed):
    rng = random.Random(seed)
    # one of the two sources of Visual Genome and of VQA hides the other: both are damaged, one after the other
    slots = [1] + [-1] * 15
    unsplit = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    unsplit["annotations"][0]["attribute_ids_max16"] = slots
    records = [{"header": 1}, {
        "image_id": 9, "image_name": "COCO_train2014_000000000009", "question_id": 1, "question_str": "a?",
        "answers": ["yes"],
    }]  # fmt: skip
    hidden = {root / "visual_genome/annotations/instances_from_scene_graphs.json": unsplit}
    imdb = root / "vqa2/imdb_train2017.npy"
    files = [p for p in sorted(root.rglob("*")) if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    opened = set()
    for path in [*files, *hidden, imdb] * rounds:
        kept = path.read_bytes() if path.exists() else None
        if path == imdb:
            changed = mutated(records, rng)
            array = np.empty(len(changed) if isinstance(changed, list) else 1, dtype=object)
            array[:] = changed if isinstance(changed, list) else [changed]
            np.save(path, array, allow_pickle=True)
        elif path.suffix == ".json":
            write(path, mutated(hidden[path] if path in hidden else json.loads(kept), rng))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in kept.decode().splitlines()]
            changed = mutated(rows, rng)
            write(
                path, "".join(json.dumps(row) + "\n" for row in (changed if isinstance(changed, list) else [changed]))
            )
        else:
            lines = kept.decode().split("\n")
            row = rng.randrange(len(lines))
            cells = lines[row].split("\t")
            cells[rng.randrange(len(cells))] = rng.choice(["", "-", "\x00", "9", "a\tb", "\u2028", "[CLS]", "x" * 300])
            lines[row] = "\t".join(cells)
            write(path, "\n".join(lines))
        opened.add(use(root))
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(kept)
    return opened


def test_damaged_annotations(tmp_path):
    root = whole_root(tmp_path)
    whole = use(root)
    opened = damage(root, 6, seed=0)
    assert whole in opened  # some damage is harmless
    assert min(opened) < whole  # and some is not


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_damaged_annotations_long(tmp_path, seed):
    damage(whole_root(tmp_path), 150, seed)
