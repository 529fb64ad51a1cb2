"""Batch and accumulation that reach the samples of an update."""

import dataclasses

import pytest
import torch

from tests.small_runs import log_of, run, small_config, state_hash
from unit_fast.config import RunConfig, load_config
from unit_fast.errors import UserError
from unit_fast.recipes import recipe
from unit_fast.run import batch_size
from unit_fast.run.batch_size import with_batch
from unit_fast.run.estimate import Estimate

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def config(batch=0, accumulate=0, target=64, **changes) -> RunConfig:
    return RunConfig(batch_per_process=batch, accumulate=accumulate, target_batch=target, **changes)


@pytest.fixture
def memory(monkeypatch):
    """Sets the device's memory; a model takes 3 GiB and 1.5 GiB a sample."""

    def set_to(gib: float):
        needed = Estimate(parameters=1, trainable=1, fixed=3 * GIB, activations={"a": GIB, "vqa2": 3 * GIB // 2})
        monkeypatch.setattr(batch_size, "estimate", lambda *_: needed)
        monkeypatch.setattr(batch_size, "device_memory", lambda _: int(gib * GIB))

    return set_to


@pytest.mark.parametrize(
    ("given", "processes", "found"),
    [
        ((4, 16, 64), 1, (4, 16)),  # both given stay ...
        ((1, 1, 0), 1, (1, 1)),
        ((2, 3, 64), 1, (2, 3)),  # ... also where they miss it
        ((4, 0, 64), 1, (4, 16)),
        ((64, 0, 64), 1, (64, 1)),
        ((0, 16, 64), 1, (4, 16)),
        ((4, 0, 64), 8, (4, 2)),
        ((0, 2, 64), 8, (4, 2)),
    ],
)
def test_what_is_not_given_follows(given, processes, found):
    made, _ = with_batch(config(*given), CPU, processes=processes)
    assert (made.batch_per_process, made.accumulate) == found


@pytest.mark.parametrize(
    ("given", "processes", "text"),
    [
        ((3, 0, 64), 1, "batch_per_process: 3 does not divide the 64 samples of an update .*give one of 1, 2, 4, or"),
        ((0, 5, 64), 1, "accumulate: 5 does not divide the 64"),
        ((128, 0, 64), 1, "batch_per_process: 128 does not divide the 64 .*give one of 16, 32, 64"),
        ((32, 0, 64), 4, "32 does not divide the 16 samples"),
        ((0, 0, 64), 3, "target_batch: 64 is not a multiple of 3 processes"),
    ],
)
def test_what_cannot_be_is_refused(given, processes, text):
    with pytest.raises(UserError, match=text):
        with_batch(config(*given), CPU, processes=processes)


@pytest.mark.parametrize(
    ("device", "gib", "target", "found"),
    [
        (CUDA, 80, 64, (32, 2)),  # 3 + 32 x 1.5 of 56 GiB
        (CUDA, 140, 64, (32, 2)),  # 3 + 64 x 1.5 = 99 of 98 GiB
        (CUDA, 143, 64, (64, 1)),
        (CUDA, 24, 64, (8, 8)),
        (CUDA, 80, 60, (30, 2)),
        (CUDA, 6, 64, (1, 64)),  # not even one: said, and tried
        (CPU, 24, 64, (4, 16)),
        (CPU, 1000, 64, (8, 8)),  # no more is faster there
    ],
)
def test_the_largest_batch_that_memory_holds(memory, device, gib, target, found):
    memory(gib)
    made, how = with_batch(config(target=target), device)
    assert (made.batch_per_process, made.accumulate) == found
    assert how.startswith(f"batch {found[0]} x {found[1]} accumulated = {target}: the ")
    assert f"of the {gib:.1f} GiB of {device}" in how
    assert ("it may run out of memory" in how) == (gib == 6)


def test_a_batch_of_a_tasks_own_does_not_count(memory):
    memory(24)
    made, _ = with_batch(config(task_batch={"vqa2": 2}), CUDA)
    assert made.batch_per_process == 8, "3 + 8 x 1 of 16.8 GiB"
    assert made.task_batch == {"vqa2": 2}


def test_a_subset_of_tasks_has_a_batch_of_its_own_need():
    found = {}
    for name in ("sst2", "coco"):
        found[name], how = with_batch(recipe(name), CPU)
        assert "GiB of cpu" in how
        assert found[name].effective_batch == 64
    assert found["sst2"].batch_per_process >= found["coco"].batch_per_process


def test_a_run_reaches_the_batch_of_its_recipe_and_goes_on_with_it(root, tmp_path, monkeypatch):
    """Also where the device has other memory by then, and where the checkpoint knew of no target."""
    wanted = small_config(root, "sst2", steps=4, batch_per_process=0, accumulate=0, target_batch=4)
    monkeypatch.setattr(batch_size, "CPU_MOST", 2)
    run(wanted, tmp_path / "run", stop_at=2)
    kept = load_config(tmp_path / "run" / "config.json")
    assert (kept.batch_per_process, kept.accumulate, kept.target_batch) == (2, 2, 4)
    assert "batch 2 x 2 accumulated = 4: the largest up to 2 whose estimate" in log_of(tmp_path / "run")
    monkeypatch.setattr(batch_size, "CPU_MOST", 4)
    run(wanted, tmp_path / "run", "auto")
    assert "batch 2 x 2 accumulated = 4: the checkpoint's" in log_of(tmp_path / "run")
    given = dataclasses.replace(wanted, batch_per_process=2, accumulate=2)
    run(given, tmp_path / "given")
    assert state_hash(tmp_path / "run") == state_hash(tmp_path / "given"), "the choice changes nothing else"
    old = dataclasses.replace(wanted, batch_per_process=1, accumulate=1, target_batch=0)
    run(old, tmp_path / "old", stop_at=1)
    run(wanted, tmp_path / "old", "auto")
    kept = load_config(tmp_path / "old" / "config.json")
    assert (kept.batch_per_process, kept.accumulate, kept.target_batch) == (1, 1, 0)


def test_both_given_and_another_target_are_said(root, tmp_path):
    run(small_config(root, "sst2", steps=1, batch_per_process=2, target_batch=64), tmp_path / "run")
    assert "batch and accumulate were both given: target_batch 64 is not aimed at" in log_of(tmp_path / "run")
