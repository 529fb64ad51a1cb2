"""Several processes share the samples: together they read what one reads, none twice in a pass."""

import dataclasses
import itertools

import pytest

from tests.small_runs import make_world, small_config
from unit_fast.data import open_dataset
from unit_fast.data.loader import Loader
from unit_fast.data.sampler import requests

TASKS = ("coco", "vqa2", "sst2")
RANKS = 3
BATCH = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("ranks") / "world")


def config_of(root, task, **changes):
    data = {"group": 1, "workers": 0} | changes.pop("data", {})
    return small_config(root, task, batch_per_process=BATCH, data=data, **changes)


def read(config, stop, start=0, counts=None, **rank):
    """[step][micro] -> sample ids, keys and pixels or ids of one process."""
    sets = {name: open_dataset(name, "train", config.data, task, augment=True)
            for name, task in config.model.tasks.items()}  # fmt: skip
    with Loader(sets, config, start, stop, counts or {}, **rank) as loader:
        return [[samples(batch) for batch in step.batches] for step in loader]


def samples(batch):
    """(id, what the model gets of it without padding) of each sample."""
    found = []
    for i, (name, size) in enumerate(zip(batch.sample_ids, batch.sizes)):
        image = batch.image[i, :, : size[0], : size[1]].tolist() if batch.image is not None else None
        text = batch.input_ids[i][batch.attention_mask[i] == 1].tolist() if batch.input_ids is not None else None
        found.append((name, image, text))
    return found


def ranks(config, stop, **more):
    return [read(config, stop, rank=rank, processes=RANKS, **more) for rank in range(RANKS)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", TASKS)
def test_ranks_in_turn_read_what_one_process_reads(root, task, workers, grouped):
    """The same samples at the same places of a step as one process with the whole batch, of which the ranks have a
    third each; with grouping as one that accumulates, and takes the same batches one after the other."""
    config = config_of(root, task, data={"workers": workers, "group": 2 if grouped else 1})
    if grouped:
        one = config_of(root, task, accumulate=RANKS, data={"group": 2 * RANKS})
    else:
        one = dataclasses.replace(config, batch_per_process=RANKS * BATCH)
    for step, parts in zip(read(one, 15), zip(*ranks(config, 15), strict=True), strict=True):
        shared = [micro for part in parts for micro in part]
        assert shared == step if grouped else sum(shared, []) == step[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize("task", TASKS)
def test_none_is_read_twice_in_a_pass(root, task, group, accumulate):
    config = config_of(root, task, accumulate=accumulate, data={"group": group})
    name, kind = next(iter(config.model.tasks.items()))
    dataset = open_dataset(name, "train", config.data, kind, augment=True)
    stop = 16 * 15  # whole stretches, so that only the last pass is cut off
    shapes = {name: dataset.shape} if group > 1 else {}
    found = [
        list(requests(config, {name: len(dataset)}, 0, {}, stop, shapes=shapes, rank=rank, processes=RANKS))
        for rank in range(RANKS)
    ]
    visits = [
        visit
        for parts in zip(*found, strict=True)
        for micro in zip(*(part.micro for part in parts), strict=True)
        for visit in itertools.chain(*micro)
    ]
    by_pass: dict[int, list] = {}
    for visit in visits:
        by_pass.setdefault(visit.pass_, []).append(visit.index)
    assert len(by_pass) > 5
    whole = [sorted(by_pass[n]) for n in range(len(by_pass) - 1)]
    assert whole == [list(range(len(dataset)))] * len(whole)
    assert all(len(set(part)) == len(part) for part in by_pass.values())
    if group == 1:
        assert [v.pass_ for v in visits] == sorted(v.pass_ for v in visits)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("engine", ["torchvision", "auto"])
def test_mixed_tasks_are_the_same_on_every_rank_and_resume(root, group, engine):
    config = small_config(root, *TASKS, batch_per_process=BATCH, data={"group": group, "engine": engine})
    sizes = {
        name: len(open_dataset(name, "train", config.data, task, augment=True))
        for name, task in config.model.tasks.items()
    }
    first = list(requests(config, sizes, 0, {}, 20, processes=RANKS))
    counts: dict[str, int] = {}
    for request in first[:9]:
        counts[request.task] = counts.get(request.task, 0) + request.samples
    whole = ranks(config, 20)
    assert ranks(config, 20, start=9, counts=counts) == [steps[9:] for steps in whole]
    tasks = [[request.task for request in requests(config, sizes, 0, {}, 20, rank=rank, processes=RANKS)]
             for rank in range(RANKS)]  # fmt: skip
    assert tasks == [[request.task for request in first]] * RANKS
    assert len(set(tasks[0])) == 3
