"""The fused matching cost: bounds, memory, non-finite predictions, wrong labels and counts, fakes, compilation; and the
CPU's, which has the reference's bits.

Under ``TRITON_INTERPRET=1`` the kernel runs; else the reference that is registered for the CPU."""

import math

import pytest
import torch
from unit_fast_kernels import match_cost as module
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.match_cost import match_cost_cpu, match_cost_fused, match_cost_reference
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.canaries import Canaries
from tests.kernels.common import assert_as_good_as_eager, assert_fake_is_real, guarded
from tests.planted_kernels import needs_compiler
from unit_fast import ops

# layers, batch, queries, classes, padded targets, counts
SIZES = {
    "row": (1, 1, 1, 2, 1, [1]),
    "odd": (2, 3, 5, 7, 4, [4, 1, 3]),
    "tail": (1, 2, 17, 130, 18, [17, 3]),
    "many_classes": (1, 1, 8, 401, 5, [5]),
    "crowd": (1, 2, 3, 6, 50, [50, 33]),
    "no_targets": (2, 2, 5, 7, 3, [0, 2]),
    "all_padded": (1, 2, 4, 5, 3, [0, 0]),
    "no_columns": (2, 2, 5, 7, 0, [0, 0]),
    "empty": (2, 0, 5, 7, 3, []),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = ({}, {"cost_class": 2.0, "cost_bbox": 1.5, "cost_giou": 0.5, "log_softmax": True})


def _inputs(name, dtype=torch.float64, seed=5):
    """logits, boxes, labels, target boxes and counts, exact in float16 and bfloat16."""
    layers, batch, queries, classes, targets, counts = SIZES[name]
    rng = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts, dtype=torch.int32)
    labels = torch.randint(0, classes, (batch, targets), generator=rng)
    labels = labels.masked_fill(torch.arange(targets) >= counts[:, None], -1)

    def boxes(*shape):  # in 256ths, sides from 16 to 128
        centre = torch.randint(64, 193, (*shape, 2), generator=rng)
        return torch.cat((centre, torch.randint(16, 129, (*shape, 2), generator=rng)), -1).to(dtype) / 256

    logits = (3 * torch.randn(layers, batch, queries, classes, generator=rng)).bfloat16().half().to(dtype)
    return logits, boxes(layers, batch, queries), labels, boxes(batch, targets), counts


@pytest.mark.parametrize("weights", WEIGHTS, ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_is_as_good_as_eager(name, dtype, weights):
    exact = match_cost_reference(*_inputs(name), **weights)
    low = _inputs(name, dtype)
    eager, ours = (f(*low, **weights) for f in (match_cost_reference, match_cost_fused))
    assert_as_good_as_eager([ours], [eager], [exact], torch.float32)
    padding = torch.arange(ours.shape[3]) >= low[4][:, None]
    assert not ours.mT[:, padding].any()
    assert not ours.requires_grad


def test_dtypes_may_differ():
    logits, boxes, labels, target_boxes, counts = _inputs("odd", torch.float32)
    expected = match_cost_fused(logits, boxes, labels, target_boxes, counts)
    found = match_cost_fused(logits.bfloat16(), boxes, labels.int(), target_boxes.half(), counts.long())
    assert torch.equal(found, expected)


def _patterns(x):
    return x.isnan(), x == math.inf, x == -math.inf


@pytest.mark.parametrize("weights", WEIGHTS, ids=["softmax", "log_softmax"])
def test_non_finite_predictions_give_what_the_reference_gives(weights):
    """Where the reference is NaN or infinite, and only there: the assignment reports these."""
    logits, boxes, labels, target_boxes, counts = _inputs("tail", torch.float32)
    logits[0, 0, 0] = -math.inf
    logits[0, 0, 1, 5] = math.inf
    logits[0, 0, 2, 129] = math.nan
    logits[0, 0, 3, :128] = -math.inf  # a whole tile of classes
    logits[0, 0, 4, 128:] = -math.inf
    logits[0, 1] *= 1e4
    boxes[0, 0, 5, 0] = math.nan
    boxes[0, 0, 6, 3] = math.inf
    boxes[0, 1, 7, 2:] = 0.0  # no extent
    target_boxes[1, 0] = boxes[0, 1, 7]  # nor this: 0 / 0
    boxes[0, 1, 8, 2:] = -0.1
    arguments = logits, boxes, labels, target_boxes, counts
    expected, found = (f(*arguments, **weights) for f in (match_cost_reference, match_cost_fused))
    for a, b in zip(_patterns(expected), _patterns(found)):
        assert torch.equal(a, b)
    finite = expected.isfinite()
    assert 0.5 < finite.float().mean() < 1
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("name", SIZES)
def test_the_cpus_has_the_bits_of_the_reference(name, weights):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = _inputs(name, dtype)
        before = [x.clone() for x in inputs]
        found, expected = (f(*inputs, **weights) for f in (match_cost_cpu, match_cost_reference))
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    with ops.kernels("auto"):
        assert torch.equal(ops.match_cost(*inputs, **weights), expected)


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tail", "crowd"])
def test_reads_inside_and_writes_everything_and_nothing_else(name, monkeypatch):
    inputs = _inputs(name, torch.float32)
    plain = match_cost_fused(*inputs)
    logits, boxes, labels, target_boxes, counts = (guarded(x) for x in inputs)
    padding = torch.arange(labels.shape[1]) >= counts[:, None]
    labels[padding] = 2**40  # what stands beyond the counts is not looked at
    target_boxes[padding] = math.nan
    canaries = Canaries(monkeypatch)
    if INTERPRETING:
        found = match_cost_fused(logits, boxes, labels, target_boxes, counts)
        assert canaries.unharmed()
    else:  # the reference looks up every label
        found = match_cost_fused(logits, boxes, labels.where(~padding, 0), target_boxes, counts)
    assert torch.equal(found, plain)
    assert torch.equal(logits, inputs[0])
    assert torch.equal(boxes, inputs[1])


@pytest.mark.skipif(not INTERPRETING, reason="the reference on the CPU raises on a label that is no class")
def test_wrong_counts_and_labels_read_and_write_inside(monkeypatch):
    logits, boxes, labels, target_boxes, _ = (guarded(x) for x in _inputs("odd", torch.float32))
    labels.copy_(torch.tensor([[-9, 7, 2**40, 6], [0, -(2**40), 3, 8], [1, 2, 3, 4]]))
    canaries = Canaries(monkeypatch)
    found = match_cost_fused(logits, boxes, labels, target_boxes, torch.tensor([5, 2**40, -1]))
    assert canaries.unharmed()
    expected = match_cost_fused(logits, boxes, labels.clamp(0, 6), target_boxes, torch.tensor([4, 4, 0]))
    assert torch.equal(found, expected)
    assert found.isfinite().all()


def test_strides():
    inputs = _inputs("odd", torch.float32)
    expected = match_cost_fused(*inputs)
    logits, boxes = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in inputs[:2])
    labels, target_boxes, counts = (torch.stack((x, x), -1)[..., 0] for x in inputs[2:])
    assert torch.equal(match_cost_fused(logits.requires_grad_(), boxes, labels, target_boxes, counts), expected)
    assert expected.mT.is_contiguous()


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
def test_registration(strided):
    inputs = list(_inputs("odd", torch.float32))
    if strided:
        inputs[:2] = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in inputs[:2])
    arguments = (*inputs, 1.0, 5.0, 2.0, True)
    torch.library.opcheck(module._operator, arguments)
    assert_fake_is_real(module._operator, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
def test_compiles_whole():
    def function(logits, boxes, *targets):
        return match_cost_fused(logits * 2.0, boxes, *targets, log_softmax=True) + 1.0

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for name in ("odd", "tail") if dynamic else ("odd",):
            inputs = _inputs(name, torch.float32)
            assert torch.equal(compiled(*inputs), function(*inputs))


@needs_compiler
def test_one_launch_for_all_layers_and_images():
    (launch,) = _record.record(
        lambda: module._launch(*module.launches((6, 8, 100, 92, 20, False), torch.float32, "cuda")[0][1]), "a100"
    )
    assert launch.grid == (48, 7, 1)


# --- Equal bits -------------------------------------------------------------------------------------------------------


def test_two_runs_are_equal_and_equal_boxes_cost_the_same():
    logits, boxes, labels, target_boxes, counts = _inputs("tail", torch.float32)
    boxes[0, 0, 3] = boxes[0, 0, 16] = boxes[0, 0, 1]
    logits[0, 0, 3] = logits[0, 0, 16] = logits[0, 0, 1]
    first, second = (match_cost_fused(logits, boxes, labels, target_boxes, counts) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0, 0, 3], first[0, 0, 1])
    assert torch.equal(first[0, 0, 16], first[0, 0, 1])


@pytest.mark.parametrize("name", ["tail", "crowd"])
def test_launch_parameters_do_not_change_the_result(name, monkeypatch):
    inputs = _inputs(name, torch.float32)
    first = match_cost_fused(*inputs)
    bucket = module._bucket(*inputs[0].shape[2:])
    other = {"match_cost": {bucket: {"queries": 4, "targets": 32, "classes": 64, "warps": 1}}}
    monkeypatch.setattr(_tuned, "table", lambda card: other)
    torch.testing.assert_close(match_cost_fused(*inputs), first, rtol=1e-6, atol=1e-6)


# --- What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [
        (0, torch.ones(2, 3, 5, 7).double(), "logits is torch.float64: convert it to float32, bfloat16 or float16"),
        (1, torch.ones(2, 3, 5, 4).double(), "boxes is torch.float64: convert it"),
        (3, torch.ones(3, 4, 4).double(), "target_boxes is torch.float64: convert it"),
        (0, torch.ones(2, 3, 5, 0), "logits has no classes"),
    ],
)
def test_unfit_arguments_are_told(position, value, text):
    arguments = list(_inputs("odd", torch.float32))
    arguments[position] = value
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^match_cost: the mode is fused, but {text}"):
        ops.match_cost(*arguments)


def test_too_many_problems_are_told():
    boxes = torch.ones(1).expand(2**30, 2, 1, 4)
    targets = torch.zeros(2, 1).long(), torch.ones(2, 1, 4), torch.ones(2).int()
    with ops.kernels("fused"), pytest.raises(ValueError, match=r"but logits has 2\^31 problems"):
        ops.match_cost(boxes, boxes, *targets)


def test_fused_mode_calls_the_kernel_or_says_why_not():
    inputs = _inputs("odd", torch.float32)
    with ops.kernels("fused"):
        if INTERPRETING:
            assert torch.equal(ops.match_cost(*inputs), match_cost_fused(*inputs))
        else:
            with pytest.raises(ValueError, match="^match_cost: the mode is fused, but tensors are on cpu"):
                ops.match_cost(*inputs)


# --- On a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", module.SHAPES.values(), ids=module.SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_card(shape, dtype):
    made = module.make(shape, dtype, "cuda")
    floating = {k: v.double() for k, v in made.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    exact = match_cost_reference(**(made | floating))
    eager, ours = (f(**made) for f in (match_cost_reference, match_cost_fused))
    assert_as_good_as_eager([ours], [eager], [exact], torch.float32)
