"""Exact assignment: against every permutation, against SciPy, ties, sizes at the limits, non-finite costs."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.kernels.assignment_problems import KINDS, problems, scipy_query
from unit_fast import ops


def _check_pairing(query, size, queries):
    """One-to-one, min(Q, T) pairs, -1 elsewhere."""
    real = query[:size][query[:size] >= 0]
    assert len(real) == min(size, queries)
    assert len(set(real.tolist())) == len(real)
    assert ((real >= 0) & (real < queries)).all()
    assert (query[size:] == -1).all()


def _total(cost, query):
    return sum(float(cost[q, t]) for t, q in enumerate(query.tolist()) if q >= 0)


def _cheapest(cost):
    """The least total over every pairing."""
    queries, targets = cost.shape
    if queries < targets:
        return _cheapest(cost.T)
    return min(sum(cost[q, t] for t, q in enumerate(p)) for p in itertools.permutations(range(queries), targets))


@pytest.mark.parametrize("targets", range(9))
@pytest.mark.parametrize("kind", ["random", "ties", "duplicates", "equal"])
def test_cheapest_of_all_permutations(targets, kind):
    """Q = 4 queries, T from 0 to 2Q."""
    rng = np.random.default_rng(targets)
    cost = rng.normal(size=(6, 4, targets))
    if kind == "ties":
        cost = rng.integers(0, 3, size=cost.shape).astype(float)
    if kind == "duplicates" and targets:
        cost[:, :, targets // 2 :] = cost[:, :, :1]
        cost[:, 1] = cost[:, 0]
    if kind == "equal":
        cost[:] = 1.5
    query, flag = ops.assignment(torch.from_numpy(cost), torch.full((6,), targets))
    assert query.shape == (6, targets)
    assert (query.dtype, flag.dtype) == (torch.int64, torch.int32)
    assert not flag.any()
    for p in range(6):
        _check_pairing(query[p], targets, 4)
        assert _total(cost[p], query[p]) == pytest.approx(_cheapest(cost[p]), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_scipy_with_counts_of_every_size(dtype):
    rng = torch.Generator().manual_seed(6)
    queries, targets = 25, 50
    counts = torch.arange(targets + 1, dtype=torch.int32)
    cost = torch.randn(len(counts), queries, targets, generator=rng).to(dtype)
    before = cost.clone()
    query, _ = ops.assignment(cost, counts)
    for p, size in enumerate(counts.tolist()):
        expected = np.full(targets, -1)
        rows, columns = linear_sum_assignment(cost[p, :, :size].double().numpy())
        expected[columns] = rows
        assert query[p].tolist() == expected.tolist()
    assert torch.equal(cost, before)
    assert torch.equal(query, ops.assignment(cost, counts)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_problems(kind):
    """1250 of each kind, T from 0 to 2Q: SciPy's pairs, hence SciPy's cost to the last bit."""
    rng, solved = torch.Generator().manual_seed(KINDS.index(kind)), 0
    for number in range(125):
        queries = 1 + number % 25
        cost, counts = problems(kind, 10, queries, number * 7 % (2 * queries + 1), rng)
        query, flag = ops.assignment(cost, counts)
        for p, count in enumerate(counts.tolist()):
            assert (query[p].tolist(), int(flag[p])) == scipy_query(cost[p], count)
            _check_pairing(query[p], count, queries)
            solved += 1
    assert solved == 1250


def test_layers_of_the_same_images():
    cost = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(8))
    counts = torch.tensor([4, 2])
    query, flag = ops.assignment(cost, counts)
    assert (query.shape, flag.shape) == ((3, 2, 4), (3, 2))
    flat = ops.assignment(cost.flatten(0, 1), counts.repeat(3))[0]
    assert torch.equal(query.flatten(0, 1), flat)
    assert torch.equal(ops.assignment(cost.mT.contiguous().mT, counts)[0], query)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0)])
def test_nothing_to_pair(shape):
    query, flag = ops.assignment(torch.zeros(shape), torch.full(shape[:1], shape[2]))
    assert query.shape == (shape[0], shape[2])
    assert flag.shape == shape[:1]
    assert (query == -1).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_costs_are_flagged_and_dearest(bad, sign):
    rng = torch.Generator().manual_seed(7)
    cost = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)
    cost[1] += sign * 10.0
    clean = ops.assignment(cost, torch.tensor([4, 4, 4]))[0]
    cost[1, 2] = bad
    cost[2, :, 3] = bad  # beyond the count of problem 2
    query, flag = ops.assignment(cost, torch.tensor([4, 4, 3]))
    assert flag.tolist() == [0, 1, 0]
    assert torch.equal(query[0], clean[0])
    assert 2 not in query[1].tolist()
    kept = np.delete(cost[1].numpy(), 2, axis=0)
    assert _total(cost[1], query[1]) == pytest.approx(_cheapest(kept), abs=1e-12)


def test_all_costs_non_finite_still_pairs():
    query, flag = ops.assignment(torch.full((1, 3, 5), math.nan), torch.tensor([5]))
    assert flag.tolist() == [1]
    _check_pairing(query[0], 5, 3)


def test_strided_costs_with_gradient():
    cost = torch.randn(4, 6, 5, requires_grad=True)
    strided = cost.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    counts = torch.tensor([5, 0, 2, 4])
    query = ops.assignment(strided, counts)[0]
    assert not query.requires_grad
    assert torch.equal(query, ops.assignment(cost, counts)[0])


@pytest.mark.parametrize(
    ("cost", "counts", "text"),
    [
        (torch.zeros(3, 4), torch.tensor([1]), r"cost is of shape \[3, 4\]; it must be \[P,Q,T\]"),
        (torch.zeros(3, 2, 3, 4), torch.tensor([1, 2, 3]), r"counts is of shape \[3\]; it must be \[B\] = \[2\]"),
        (torch.zeros(2, 3, 4), torch.tensor([1, 2], device="meta"), "counts is on meta; move it to cpu"),
        (torch.zeros(2, 3, 4), torch.tensor([1]), r"counts is of shape \[1\]; it must be \[P\] = \[2\]"),
        (torch.zeros(1, 3, 4).long(), torch.tensor([1]), r"cost is torch.int64; it must be floating point"),
        (torch.zeros(1, 3, 4), torch.tensor([1.0]), r"counts is torch.float32; it must be an integer tensor"),
        (
            torch.zeros(2, 3, 4),
            torch.tensor([1, 5]),
            r"counts\[1\] is 5; it must be between 0 and the 4 columns",
        ),
        (torch.zeros(1, 3, 4), torch.tensor([-1]), r"counts\[0\] is -1; it must be between 0"),
    ],
)
def test_refusals(cost, counts, text):
    with pytest.raises(ValueError, match=f"^assignment: {text}"):
        ops.assignment(cost, counts)
