"""Exact assignment: its cases, against every permutation, against SciPy, ties, sizes at the limits, wrong counts."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import assignment as module
from unit_fast_kernels.assembly import record
from unit_fast_kernels.assignment import assignment_fused, assignment_reference
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.assignment_problems import KINDS, problems, scipy_query
from tests.kernels.cases import LOW, Cases, Problem, as_it_is, launched
from tests.kernels.common import Canaries, guarded
from tests.planted_kernels import needs_compiler
from unit_fast import ops


def make(size, kind):
    """Counts go from 0 to T, so that each size has problems of both orientations."""
    rng = torch.Generator().manual_seed(1000 * size[0] + 10 * size[1] + KINDS.index(kind))
    cost, counts = problems(kind, 4, *size, rng)
    return Problem({"cost": cost.double()}, {"counts": counts})


def out(results):
    query, flag = results
    assert (query.dtype, flag.dtype) == (torch.int64, torch.int32)
    return torch.cat((query, flag[:, None]), 1)


COST = torch.zeros(2, 3, 4)
CASES = Cases(
    op="assignment",
    sizes={  # queries, targets
        "row": (1, 1), "odd": (5, 3), "square": (6, 6), "tail": (17, 5), "crowd": (4, 8), "crowd_tail": (9, 18),
        "many": (9, 9), "no_targets": (5, 0), "no_queries": (0, 3),
    },
    make=make,
    settings={kind: {"kind": kind} for kind in KINDS},
    main=("random", "non_finite"),
    takes=(*LOW, torch.float64),
    gives=torch.int64,
    leaves=(),
    out=out,
    ways={"fused": {"as_it_is": as_it_is, "two_rows": launched(warps=2, rows=2)}},
    close={"rtol": 0, "atol": 0},
    skip=lambda way, size, setting, dtype: (
        (dtype == torch.float64 and setting != "few_values")  # whose sums are rounded
        or (dtype in LOW[1:] and (size, setting) not in (("odd", "random"), ("odd", "non_finite")))
        or (way == "two_rows" and (size, setting) != ("many", "non_finite"))
    ),
    memory=("odd", "tail", "crowd_tail"),
    valid=lambda: {"cost": torch.randn(2, 3, 4), "counts": torch.tensor([4, 2])},
    refusals=[
        ({"cost": COST[0]}, r"cost is of shape \[3, 4\]; it must be \[P,Q,T\]"),
        (
            {"cost": torch.zeros(2, 3, 3, 4), "counts": torch.tensor([1, 2])},
            r"counts is of shape \[2\]; it must be \[B\] = \[3\]",
        ),
        ({"counts": torch.tensor([1, 2], device="meta")}, "counts is on meta; move it to cpu"),
        ({"counts": torch.tensor([1])}, r"counts is of shape \[1\]; it must be \[P\] = \[2\]"),
        ({"cost": COST.long()}, r"cost is torch.int64; it must be floating point"),
        ({"counts": torch.tensor([1.0, 2.0])}, r"counts is torch.float32; it must be an integer tensor"),
        ({"counts": torch.tensor([1, 5])}, r"counts\[1\] is 5; it must be between 0 and the 4 columns"),
        ({"counts": torch.tensor([-1, 1])}, r"counts\[0\] is -1; it must be between 0"),
    ],
    unfit=[
        ({"cost": torch.zeros(2, 2, 1025)}, "the larger of queries and targets is 1025: the kernel takes up to 1024"),
        (
            {"cost": torch.zeros(1).expand(2**31, 1, 1), "counts": torch.ones(1, dtype=torch.int32).expand(2**31)},
            r"cost has 2\^31 problems or more: split it",
        ),
        ({"cost": COST.to(torch.float8_e5m2)}, "cost is torch.float8_e5m2: convert it to float32"),
    ],
)  # fmt: skip


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


@pytest.mark.parametrize("op", [ops.assignment, assignment_fused])
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0)])
def test_nothing_to_pair(shape, op):
    query, flag = op(torch.zeros(shape), torch.full(shape[:1], shape[2]))
    assert query.shape == (shape[0], shape[2])
    assert (query == -1).all()
    assert flag.shape == shape[:1]
    assert not flag.any()


# --- Fused ------------------------------------------------------------------------------------------------------------


def _equals_scipy(cost, counts):
    query, flag = assignment_fused(cost, counts)
    assert (query.shape, query.dtype) == ((cost.shape[0], cost.shape[2]), torch.int64)
    assert (flag.shape, flag.dtype) == (cost.shape[:1], torch.int32)
    for p, count in enumerate(counts.tolist()):
        assert (query[p].tolist(), int(flag[p])) == scipy_query(cost[p], count), (cost[p], count)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_two_thousand_problems(kind):
    """T from 0 to 2 Q."""
    rng = torch.Generator().manual_seed(KINDS.index(kind))
    for number in range(50):
        queries = 1 + number % 10
        _equals_scipy(*problems(kind, 5, queries, number * 7 % (2 * queries + 1), rng))


def test_pairs_of_trained_detection():
    """100 queries, a few of which are near a target."""
    rng = torch.Generator().manual_seed(3)
    cost = 4 * torch.rand(2, 12, 100, generator=rng) - 6 * torch.rand(2, 12, 100, generator=rng) ** 12
    _equals_scipy(cost.mT, torch.tensor([12, 7]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_counts_of_images_repeat_over_layers(dtype):
    cost, _ = problems("random", 6, 5, 4, torch.Generator().manual_seed(6))
    counts = torch.tensor([4, 0, 3], dtype=dtype)
    query, flag = assignment_fused(cost, counts)
    assert torch.equal(query, assignment_reference(cost, counts.repeat(2))[0])
    assert torch.equal(query, assignment_reference(cost, counts)[0])
    layered = ops.assignment(cost.unflatten(0, (2, 3)), counts)
    assert torch.equal(layered[0], query.unflatten(0, (2, 3)))
    assert torch.equal(layered[1], flag.unflatten(0, (2, 3)))


def test_everything_else_is_zero_or_nothing_is_finite():
    cost = torch.full((3, 3, 5), math.nan)
    cost[1] = -math.inf
    cost[2] = torch.zeros(3, 5).fill_diagonal_(math.inf)
    _equals_scipy(cost, torch.tensor([5, 2, 3]))


@pytest.mark.parametrize("name", ["odd", "tail", "crowd_tail"])
def test_what_stands_beyond_the_counts_is_not_looked_at(name):
    cost, counts = problems("random", 3, *CASES.sizes[name], torch.Generator().manual_seed(8))
    counts[1] = min(2, counts[0])
    plain = assignment_fused(cost, counts)
    cost[1, :, 2:] = math.nan
    found = assignment_fused(guarded(cost), counts)
    assert not found[1].any()
    assert torch.equal(found[0], plain[0])


@pytest.mark.skipif(not INTERPRETING, reason="on the CPU a wrong count is a ValueError")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_wrong_counts_end_and_write_inside(dtype, monkeypatch):
    cost = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(9))
    limits = torch.iinfo(dtype)
    expected = assignment_fused(cost, torch.tensor([0, 5, 0, 5]))[0]
    inside = guarded(cost)
    canaries = Canaries(monkeypatch)
    query, flag = assignment_fused(inside, torch.tensor([-1, 6, limits.min, limits.max], dtype=dtype))
    assert canaries.unharmed()
    assert torch.equal(query, expected)
    assert not flag.any()


def test_strides():
    cost, counts = problems("random", 4, 6, 5, torch.Generator().manual_seed(10))
    expected = assignment_fused(cost, counts)[0]
    for order in ((0, 2, 1), (2, 0, 1), (1, 2, 0)):
        back = torch.tensor(order).argsort().tolist()
        assert torch.equal(assignment_fused(cost.permute(order).contiguous().permute(back), counts)[0], expected)
    every_second = torch.stack((cost, torch.full_like(cost, math.nan)), -1)[..., 0]
    wide_counts = torch.stack((counts, counts + 100), 1)[:, 0]
    assert torch.equal(assignment_fused(every_second.requires_grad_(), wide_counts)[0], expected)
    same = assignment_fused(cost[:1].expand(3, 6, 5), counts[:1])[0]
    assert torch.equal(same, expected[:1].expand(3, 5))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(dim):
    """A view whose last element is 2^31 elements away; of its memory only the pages that hold elements are touched."""
    cost, _ = problems("random", 2, 3, 2, torch.Generator().manual_seed(11))
    strides = [8, 2, 1]
    strides[dim] = 2**31 // (cost.shape[dim] - 1) + 16
    length = 1 + sum(s * (n - 1) for s, n in zip(strides, cost.shape))
    far = torch.empty(length, dtype=torch.bfloat16).as_strided(cost.shape, strides)
    far.copy_(cost)
    counts = torch.tensor([2, 1])
    assert torch.equal(assignment_fused(far, counts)[0], assignment_fused(far.clone(), counts)[0])


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_whole_matching_reads_nothing_on_the_host(device):
    """On fake tensors, where a read of the host raises: from predictions to indices, as the step calls it."""
    with FakeTensorMode(), ops.kernels("fused"):
        logits, boxes = (torch.empty(6, 8, 100, n, device=device) for n in (92, 4))
        labels, counts = torch.empty(8, 20, dtype=torch.int64, device=device), torch.empty(8, device=device).int()
        cost = ops.match_cost(logits, boxes, labels, torch.empty(8, 20, 4, device=device), counts)
        query, flag = ops.assignment(cost, counts)
    assert (cost.shape, cost.stride()) == ((6, 8, 100, 20), (16000, 2000, 1, 100))
    assert (query.shape, query.dtype, query.device) == ((6, 8, 20), torch.int64, logits.device)
    assert (flag.shape, flag.dtype, flag.device) == ((6, 8), torch.int32, logits.device)


@needs_compiler
def test_one_launch_whatever_the_number_of_problems():
    def run():
        cost = torch.empty(48, 20, 100, device="cuda").mT
        module._launch(cost, torch.empty(8, dtype=torch.int32, device="cuda"))

    (launch,) = record.record(run, "a100")
    assert launch.grid == (48, 1, 1)


def test_binaries_depend_on_the_power_of_two_only():
    """Sizes and strides are values at run time."""
    constants = {name for name in module._assignment_kernel.arg_names if name.isupper()}
    assert constants == {"COLUMNS", "ROWS"}
    assert {module._columns(torch.empty(1, q, t)) for q, t in ((100, 7), (65, 65), (3, 128))} == {128}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(100, 7), (100, 100), (100, 150), (300, 100), (300, 300), (900, 60), (8, 16)])
def test_pairs_on_a_card(size, kind):
    cost, counts = problems(kind, 40, *size, torch.Generator().manual_seed(16))
    previous = torch.cuda.get_sync_debug_mode()
    device_cost, device_counts = cost.cuda(), counts.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        query, flag = assignment_fused(device_cost, device_counts)
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    expected = assignment_reference(cost, counts)
    assert torch.equal(query.cpu(), expected[0])
    assert torch.equal(flag.cpu(), expected[1])
