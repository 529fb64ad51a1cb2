"""Task and sample order: pure functions of (seed, counters)."""

import collections
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unit_fast.config import RunConfig
from unit_fast.data import sampler
from unit_fast.errors import UserError

RATIOS = {"a": 0.2, "b": 0.5, "c": 0.3}


def test_task_frequencies_follow_the_ratios_by_name():
    drawn = collections.Counter(sampler.task_of_step(3, step, RATIOS) for step in range(20_000))
    for name, ratio in RATIOS.items():
        # five standard deviations of a binomial share
        assert abs(drawn[name] / 20_000 - ratio) < 5 * (ratio * (1 - ratio) / 20_000) ** 0.5


def test_task_does_not_depend_on_the_order_or_the_scale_of_the_ratios():
    turned = {name: 10 * RATIOS[name] for name in reversed(RATIOS)}
    assert [sampler.task_of_step(0, s, RATIOS) for s in range(500)] == [
        sampler.task_of_step(0, s, turned) for s in range(500)
    ]


def test_seed_changes_tasks_and_orders():
    tasks = [[sampler.task_of_step(seed, s, RATIOS) for s in range(200)] for seed in (0, 1)]
    assert tasks[0] != tasks[1]
    assert not np.array_equal(sampler.order(0, "a", 0, 100), sampler.order(1, "a", 0, 100))


def test_zero_ratio_is_never_drawn():
    assert {sampler.task_of_step(0, s, {"a": 0.0, "b": 1.0, "c": 0.0}) for s in range(300)} == {"b"}


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_every_pass_is_another_permutation(n):
    passes = [sampler.order(5, "coco", p, n) for p in range(3)]
    for permutation in passes:
        assert sorted(permutation.tolist()) == list(range(n))
    if n > 2:
        for a, b in (passes[:2], passes[1:], (passes[0], sampler.order(5, "vg", 0, n))):
            assert not np.array_equal(a, b)


def test_values_are_pinned():
    """A change of these breaks the resumption of old runs."""
    assert [sampler.task_of_step(0, s, RATIOS) for s in range(8)] == ["b", "a", "a", "c", "b", "c", "a", "c"]
    assert sampler.order(0, "coco", 0, 8).tolist() == [0, 3, 7, 5, 6, 4, 2, 1]
    assert sampler.augmentation_key(0, "coco", 1, 2) == 6308424839505391268


def test_visits_cover_each_pass_once_whatever_the_batch():
    n = 10
    for batch in (1, 3, 10, 25):
        read = [v for start in range(0, 30 * batch, batch) for v in sampler.visits(0, "d", n, start, batch)]
        for pass_ in range(len(read) // n):
            of_pass = [v.index for v in read[pass_ * n : (pass_ + 1) * n]]
            assert sorted(of_pass) == list(range(n))
            assert {v.pass_ for v in read[pass_ * n : (pass_ + 1) * n]} == {pass_}


def test_visits_do_not_depend_on_how_they_are_cut():
    whole = sampler.visits(1, "d", 7, 0, 40)
    assert sum((sampler.visits(1, "d", 7, s, 8) for s in range(0, 40, 8)), []) == whole


def test_augmentation_key_is_of_the_pass_and_the_sample():
    keys = {sampler.augmentation_key(s, d, p, i) for s in (0, 1) for d in "ab" for p in (0, 1) for i in (0, 1)}
    assert len(keys) == 16
    assert all(0 <= key < 2**63 for key in keys)


def test_empty_dataset_is_refused_by_name():
    with pytest.raises(UserError, match="vqa2.*no samples"):
        sampler.visits(0, "vqa2", 0, 0, 1)


def test_substitutes_are_deterministic_and_reach_the_whole_set():
    visit = sampler.visits(0, "d", 20, 3, 1)[0]
    drawn = [sampler.substitute(0, "d", 20, visit, attempt).index for attempt in range(1, 300)]
    assert drawn == [sampler.substitute(0, "d", 20, visit, attempt).index for attempt in range(1, 300)]
    assert set(drawn) == set(range(20))


def test_normalised_renormalises_over_the_trained_tasks():
    assert sampler.normalised(RATIOS, ["b", "a"]) == pytest.approx({"a": 2 / 7, "b": 5 / 7})
    assert sampler.normalised({}, ["b", "a"]) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("ratios", "tasks", "text"),
    [
        ({"a": 1.0}, ["a", "b"], "none for 'b'"),
        ({"a": -1.0}, ["a"], "ratios.a: -1"),
        ({"a": float("nan")}, ["a"], "ratios.a: nan"),
        ({"a": 0.0}, ["a"], "all of a are 0"),
        ({}, [], "no task"),
    ],
)
def test_bad_ratios_are_refused(ratios, tasks, text):
    with pytest.raises(UserError, match=text):
        sampler.normalised(ratios, tasks)


def _requests(start=0, counts=None, stop=40, **changes):
    ratios = {"vqa2": 0.2, "glue_qqp": 0.5, "glue_sst2": 0.3}
    config = RunConfig(ratios=ratios, seed=4, batch_per_process=3, task_batch={"glue_qqp": 2}, accumulate=2, **changes)
    return list(sampler.requests(config, {"vqa2": 5, "glue_qqp": 11, "glue_sst2": 1}, start, counts or {}, stop))


def test_requests_continue_from_the_counts():
    whole = _requests()
    consumed = collections.Counter()
    for request in whole[:17]:
        consumed[request.task] += request.samples
    assert _requests(17, consumed) == whole[17:]


def test_requests_have_the_task_batch_and_the_accumulation():
    for request in _requests():
        assert [len(m) for m in request.micro] == [2 if request.task == "glue_qqp" else 3] * 2


def test_the_same_in_another_process():
    """No dependence on Python's hash seed or on anything imported."""
    code = (
        "from unit_fast.data import sampler as s;"
        "print([s.task_of_step(9, i, {'x': 1., 'y': 2.}) for i in range(30)], s.order(9, 'x', 2, 30).tolist())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    tasks = [sampler.task_of_step(9, i, {"x": 1.0, "y": 2.0}) for i in range(30)]
    assert runs == {f"{tasks} {sampler.order(9, 'x', 2, 30).tolist()}\n"}


def sizes_of(index, key):
    """A size in 7 classes, some of them with the augmentation's key."""
    return (index % 5 + key % 3,)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_grouped_visits_are_those_of_each_stretch_and_pass(n, batch, group, seed):
    plain = sampler.visits(seed, "coco", n, 0, 4 * batch * group)
    grouped = sampler.Grouped(seed, "coco", n, sizes_of)
    read = grouped.visits(0, len(plain), batch, group)
    assert [v.pass_ for v in read] == [v.pass_ for v in plain]
    for begin in range(0, len(plain), batch * group):
        part = slice(begin, begin + batch * group)
        assert sorted(read[part], key=repr) == sorted(plain[part], key=repr)
    start = seed % (2 * group) * batch
    again = sampler.Grouped(seed, "coco", n, sizes_of)
    assert again.visits(start, 2 * batch * group, batch, group) == read[start : start + 2 * batch * group]


def test_grouped_batches_are_of_one_size_and_come_in_random_order():
    grouped = sampler.Grouped(4, "coco", 1600, sizes_of)
    read = grouped.visits(0, 1600, 8, 25)
    batches = [read[i : i + 8] for i in range(0, 1600, 8)]
    spread = [max(s) - min(s) for s in ([sizes_of(v.index, v.key)[0] for v in b] for b in batches)]
    assert sum(spread) <= 7 * 8  # a stretch of 25 batches has 7 classes, so at most 6 batches of two neighbours
    firsts = [sizes_of(b[0].index, b[0].key)[0] for b in batches[:25]]
    assert firsts != sorted(firsts)
    other = sampler.Grouped(5, "coco", 1600, sizes_of).visits(0, 1600, 8, 25)
    assert [v.index for v in other] != [v.index for v in read]
