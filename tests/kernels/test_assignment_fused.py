"""The fused assignment: SciPy's own pairs, memory, strides, fakes, compilation, counts that are wrong.

Under ``TRITON_INTERPRET=1`` the kernel runs; else the reference that is registered for the CPU."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import assignment as module
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.assignment import assignment_fused, assignment_reference
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.assignment_problems import KINDS, problems, scipy_query
from tests.kernels.canaries import Canaries
from tests.kernels.common import assert_fake_is_real, guarded
from tests.planted_kernels import needs_compiler
from unit_fast import ops

SIZES = {
    "row": (1, 1),
    "odd": (5, 3),
    "square": (6, 6),
    "tail": (17, 5),
    "crowd": (4, 8),
    "crowd_tail": (9, 18),
    "many": (9, 9),
}
"""(Q, T); counts go from 0 to T, so that each size has problems of both orientations."""


def _equals_scipy(cost, counts):
    query, flag = assignment_fused(cost, counts)
    assert (query.shape, query.dtype) == ((cost.shape[0], cost.shape[2]), torch.int64)
    assert (flag.shape, flag.dtype) == (cost.shape[:1], torch.int32)
    for p, count in enumerate(counts.tolist()):
        assert (query[p].tolist(), int(flag[p])) == scipy_query(cost[p], count), (cost[p], count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIZES)
def test_pairs_are_those_of_scipy(name, kind):
    """4 problems of each size and kind, 224 in all."""
    rng = torch.Generator().manual_seed(100 * list(SIZES).index(name) + KINDS.index(kind))
    _equals_scipy(*problems(kind, 4, *SIZES[name], rng))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    cost, counts = problems("random", 3, 6, 5, torch.Generator().manual_seed(5))
    _equals_scipy(cost.to(dtype), counts)
    cost[0, 2, 1] = math.inf
    _equals_scipy(cost.to(dtype), counts)


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


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0), (4, 0, 3), (0, 0, 0)])
def test_nothing_to_pair(shape):
    query, flag = assignment_fused(torch.zeros(shape), torch.full(shape[:1], shape[2]))
    assert query.shape == (shape[0], shape[2])
    assert (query == -1).all()
    assert flag.shape == shape[:1]
    assert not flag.any()


def test_everything_else_is_zero_or_nothing_is_finite():
    cost = torch.full((3, 3, 5), math.nan)
    cost[1] = -math.inf
    cost[2] = torch.zeros(3, 5).fill_diagonal_(math.inf)
    _equals_scipy(cost, torch.tensor([5, 2, 3]))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tail", "crowd_tail"])
def test_reads_inside_and_writes_everything_and_nothing_else(name, monkeypatch):
    cost, counts = problems("random", 3, *SIZES[name], torch.Generator().manual_seed(8))
    counts[1] = min(2, counts[0])
    cost[1, :, 2:] = math.nan  # beyond the count: not looked at
    plain = assignment_fused(cost, counts)
    assert not plain[1].any()
    inside, wanted = guarded(cost), guarded(counts)
    canaries = Canaries(monkeypatch)
    found = assignment_fused(inside, wanted)
    assert canaries.unharmed() or not INTERPRETING  # the reference allocates with NumPy
    assert all(torch.equal(a, b) for a, b in zip(plain, found))
    assert torch.equal(inside.nan_to_num(99.0), cost.nan_to_num(99.0))
    assert torch.equal(wanted, counts)


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


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
def test_registration(strided):
    cost, counts = problems("random", 3, 4, 3, torch.Generator().manual_seed(12))
    cost = cost.mT.contiguous().mT if strided else cost
    torch.library.opcheck(module._operator, (cost, counts))
    assert_fake_is_real(module._operator, cost, counts)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
def test_compiles_whole():
    def function(cost, counts):
        query, flag = assignment_fused(cost * 2.0, counts)
        return query + 1, flag

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for targets in (4, 7) if dynamic else (4,):
            inputs = problems("random", 6, 5, targets, torch.Generator().manual_seed(13))
            assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), function(*inputs)))


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

    (launch,) = _record.record(run, "a100")
    assert launch.grid == (48, 1, 1)


def test_binaries_depend_on_the_power_of_two_only():
    """Sizes and strides are values at run time."""
    constants = {name for name in module._assignment_kernel.arg_names if name.isupper()}
    assert constants == {"COLUMNS", "ROWS"}
    assert {module._columns(torch.empty(1, q, t)) for q, t in ((100, 7), (65, 65), (3, 128))} == {128}


# --- Equal bits -------------------------------------------------------------------------------------------------------


def test_two_runs_are_equal_and_do_not_depend_on_launch_parameters(monkeypatch):
    cost, counts = problems("non_finite", 3, 9, 12, torch.Generator().manual_seed(14))
    first, second = (assignment_fused(cost, counts) for _ in range(2))
    monkeypatch.setattr(_tuned, "table", lambda card: {"assignment": {"columns16": {"warps": 2, "rows": 2}}})
    for other in (second, assignment_fused(cost, counts)):
        assert all(torch.equal(a, b) for a, b in zip(first, other))


# --- What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (torch.zeros(1, 2, 1025), "the larger of queries and targets is 1025: the kernel takes up to 1024"),
        (torch.zeros(1).expand(2**31, 1, 1), r"cost has 2\^31 problems or more: split it"),
        (torch.zeros(1, 2, 2, dtype=torch.float8_e5m2), "cost is torch.float8_e5m2: convert it to float32"),
    ],
)
def test_unfit_arguments_are_told(cost, text):
    counts = torch.ones(1, dtype=torch.int32).expand(cost.shape[0])
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^assignment: the mode is fused, but {text}"):
        ops.assignment(cost, counts)


def test_fused_mode_calls_the_kernel_or_says_why_not():
    cost, counts = problems("random", 3, 4, 3, torch.Generator().manual_seed(15))
    with ops.kernels("fused"):
        if INTERPRETING:
            assert torch.equal(ops.assignment(cost, counts)[0], assignment_fused(cost, counts)[0])
        else:
            with pytest.raises(ValueError, match="^assignment: the mode is fused, but tensors are on cpu"):
                ops.assignment(cost, counts)


# --- On a card --------------------------------------------------------------------------------------------------------


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
