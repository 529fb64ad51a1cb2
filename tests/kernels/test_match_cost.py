"""The matching cost: its cases, loops over layers, images, queries and targets, non-finite predictions, counts."""

import math

import pytest
import torch
from unit_fast_kernels import match_cost as module
from unit_fast_kernels.assembly import record
from unit_fast_kernels.match_cost import match_cost_cpu, match_cost_fused, match_cost_reference, pairwise_giou
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Cases, Problem, as_it_is, exact, launched
from tests.kernels.common import Canaries, guarded
from tests.planted_kernels import needs_compiler
from unit_fast import ops

WEIGHTS = {"softmax": {}, "log_softmax": {"cost_class": 2.0, "cost_bbox": 1.5, "cost_giou": 0.5, "log_softmax": True}}


def make(size, **weights):
    layers, batch, queries, classes, targets, counts = size
    rng = torch.Generator().manual_seed(5)
    counts = torch.tensor(counts, dtype=torch.int32)
    labels = torch.randint(0, classes, (batch, targets), generator=rng)
    labels = labels.masked_fill(torch.arange(targets) >= counts[:, None], -1)

    def boxes(*shape):  # in 256ths, sides from 16 to 128
        centre = torch.randint(64, 193, (*shape, 2), generator=rng)
        return torch.cat((centre, torch.randint(16, 129, (*shape, 2), generator=rng)), -1).double() / 256

    inputs = {"logits": 3 * exact(layers, batch, queries, classes, rng=rng)}
    inputs["logits"] = inputs["logits"].bfloat16().half().double()
    inputs |= {"boxes": boxes(layers, batch, queries), "target_boxes": boxes(batch, targets)}
    return Problem(inputs, {"labels": labels, "counts": counts, **weights})


def also(arguments, found):
    padding = torch.arange(found[0].shape[3], device=found[0].device) >= arguments["counts"][:, None]
    assert not found[0].mT[:, padding].any()
    assert found[0].mT.is_contiguous()


def _inputs(name, dtype=torch.float64):
    """logits, boxes, labels, target boxes, counts."""
    problem = make(CASES.sizes[name])
    logits, boxes, target_boxes = (x.to(dtype) for x in problem.inputs.values())
    return logits, boxes, problem.others["labels"], target_boxes, problem.others["counts"]


def _valid():
    return dict(zip(("logits", "boxes", "labels", "target_boxes", "counts"), _inputs("odd", torch.float32)))


MANY = torch.ones(1).expand(2**30, 2, 1, 4)
CASES = Cases(
    op="match_cost",
    sizes={  # layers, batch, queries, classes, padded targets, counts
        "row": (1, 1, 1, 2, 1, [1]),
        "odd": (2, 3, 5, 7, 4, [4, 1, 3]),
        "tail": (1, 2, 17, 130, 18, [17, 3]),
        "many_classes": (1, 1, 8, 401, 5, [5]),
        "crowd": (1, 2, 3, 6, 50, [50, 33]),
        "no_targets": (2, 2, 5, 7, 3, [0, 2]),
        "all_padded": (1, 2, 4, 5, 3, [0, 0]),
        "no_columns": (2, 2, 5, 7, 0, [0, 0]),
        "empty": (2, 0, 5, 7, 3, []),
    },
    make=make,
    settings=WEIGHTS,
    main=("log_softmax",),
    gives=torch.float32,
    leaves=(),
    ways={"fused": {"as_it_is": as_it_is, "small_tiles": launched(queries=4, targets=32, classes=64, warps=1)}},
    close={"rtol": 0, "atol": 0},
    skip=lambda way, size, setting, dtype: (
        way == "small_tiles" and (size not in ("tail", "crowd") or setting != "softmax" or dtype != torch.float32)
    ),
    also=also,
    memory=("odd", "tail", "crowd"),
    card={
        name: (layers, batch, queries, classes, targets, [(7 * b) % (targets + 1) for b in range(batch)])
        for name, (layers, batch, queries, classes, targets, _) in module.SHAPES.items()
    },
    valid=_valid,
    refusals=[
        ({"logits": torch.randn(2, 3, 5)}, r"logits is of shape \[2, 3, 5\]; it must be \[L,B,Q,K\]"),
        (
            {"boxes": torch.rand(2, 3, 4, 4)},
            r"boxes is of shape \[2, 3, 4, 4\]; it must be \[L,B,Q,4\] = \[2, 3, 5, 4\]",
        ),
        ({"labels": torch.zeros(2, 4).long()}, r"labels is of shape \[2, 4\]; it must be \[B,N\] = \[3, any\]"),
        (
            {"target_boxes": torch.rand(3, 5, 4)},
            r"target_boxes is of shape \[3, 5, 4\]; it must be \[B,N,4\] = \[3, 4, 4\]",
        ),
        ({"counts": torch.zeros(4).int()}, r"counts is of shape \[4\]; it must be \[B\] = \[3\]"),
        ({"logits": torch.ones(2, 3, 5, 7).int()}, r"logits is torch.int32; it must be floating point"),
        ({"labels": torch.zeros(3, 4)}, r"labels is torch.float32; it must be an integer tensor"),
        ({"counts": torch.zeros(3)}, r"counts is torch.float32; it must be an integer tensor"),
    ],
    unfit=[
        (
            {"logits": torch.ones(2, 3, 5, 7).double()},
            "logits is torch.float64: convert it to float32, bfloat16 or float16",
        ),
        ({"boxes": torch.ones(2, 3, 5, 4).double()}, "boxes is torch.float64: convert it"),
        ({"target_boxes": torch.ones(3, 4, 4).double()}, "target_boxes is torch.float64: convert it"),
        ({"logits": torch.ones(2, 3, 5, 0)}, "logits has no classes"),
        (
            {
                "logits": MANY, "boxes": MANY, "labels": torch.zeros(2, 1).long(), "target_boxes": torch.ones(2, 1, 4),
                "counts": torch.ones(2).int(),
            },
            r"logits has 2\^31 problems",
        ),
    ],
)  # fmt: skip


def _giou(a, b):
    """Generalised IoU of two boxes of four Python numbers, case by case."""
    ax, ay = (a[0] - a[2] / 2, a[0] + a[2] / 2), (a[1] - a[3] / 2, a[1] + a[3] / 2)
    bx, by = (b[0] - b[2] / 2, b[0] + b[2] / 2), (b[1] - b[3] / 2, b[1] + b[3] / 2)
    overlap = [max(0.0, min(p[1], q[1]) - max(p[0], q[0])) for p, q in ((ax, bx), (ay, by))]
    union = a[2] * a[3] + b[2] * b[3] - overlap[0] * overlap[1]
    hull = math.prod(max(p[1], q[1]) - min(p[0], q[0]) for p, q in ((ax, bx), (ay, by)))
    return overlap[0] * overlap[1] / union - (hull - union) / hull


def _loops(
    logits, boxes, labels, target_boxes, counts, cost_class=1.0, cost_bbox=5.0, cost_giou=2.0, log_softmax=False
):
    layers, batch, queries, _ = logits.shape
    cost = torch.zeros(layers, batch, queries, labels.shape[1], dtype=torch.float64)
    for l in range(layers):
        for b in range(batch):
            for q in range(queries):
                exponentials = [math.exp(x) for x in logits[l, b, q].tolist()]
                box = boxes[l, b, q].tolist()
                for t in range(int(counts[b])):
                    share = exponentials[labels[b, t]] / sum(exponentials)
                    target = target_boxes[b, t].tolist()
                    distance = sum(abs(x - y) for x, y in zip(box, target))
                    score = math.log(share) if log_softmax else share
                    cost[l, b, q, t] = cost_bbox * distance - cost_class * score - cost_giou * _giou(box, target)
    return cost


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", CASES.sizes)
def test_equals_loops(name, weights):
    inputs = _inputs(name)
    torch.testing.assert_close(ops.match_cost(*inputs, **weights), _loops(*inputs, **weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    inputs = _inputs("crowd", dtype)
    cost = ops.match_cost(*inputs)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost.double(), _loops(*inputs), rtol=1e-5, atol=1e-5)


def test_strided_inputs_with_gradient_give_the_bits_of_the_reference():
    logits, boxes, *targets = _inputs("odd", torch.float32)
    inputs = [x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in (logits, boxes)] + targets
    cost = ops.match_cost(*inputs)
    assert not cost.requires_grad
    assert torch.equal(cost, match_cost_reference(*inputs))
    assert not match_cost_fused(*inputs).requires_grad


def test_non_finite_predictions_reach_the_cost_where_they_are():
    logits, boxes, labels, target_boxes, counts = _inputs("odd")
    clean = ops.match_cost(logits, boxes, labels, target_boxes, counts)
    boxes = boxes.clone()
    boxes[1, 0, 2, 0] = math.nan
    cost = ops.match_cost(logits, boxes, labels, target_boxes, counts)
    assert cost[1, 0, 2, : counts[0]].isnan().all()
    cost[1, 0, 2] = clean[1, 0, 2]
    assert torch.equal(cost, clean)


def test_giou_of_known_pairs_and_broadcast():
    box = torch.tensor([0.5, 0.5, 0.2, 0.2], dtype=torch.float64)
    beside = torch.tensor([0.7, 0.5, 0.2, 0.2], dtype=torch.float64)
    inside = torch.tensor([0.5, 0.5, 0.1, 0.1], dtype=torch.float64)
    apart = torch.tensor([0.9, 0.5, 0.2, 0.2], dtype=torch.float64)
    values = pairwise_giou(box, torch.stack((box, beside, inside, apart)))
    expected = torch.tensor([1.0, 0.0, 0.25, -1 / 3], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    a, b = torch.rand(3, 1, 4), torch.rand(1, 5, 4)
    assert torch.equal(pairwise_giou(a, b), pairwise_giou(a.expand(3, 5, 4), b.expand(3, 5, 4)))


def test_giou_gradcheck():
    a, b = (0.2 + 0.5 * torch.rand(6, 4, dtype=torch.float64) for _ in "ab")
    assert torch.autograd.gradcheck(pairwise_giou, (a.requires_grad_(), b.requires_grad_()))


def test_dtypes_may_differ():
    logits, boxes, labels, target_boxes, counts = _inputs("odd", torch.float32)
    expected = match_cost_fused(logits, boxes, labels, target_boxes, counts)
    found = match_cost_fused(logits.bfloat16(), boxes, labels.int(), target_boxes.half(), counts.long())
    assert torch.equal(found, expected)


def _patterns(x):
    return x.isnan(), x == math.inf, x == -math.inf


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
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


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", CASES.sizes)
def test_the_cpus_has_the_bits_of_the_reference(name, weights):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = ops.OPERATORS["match_cost"].validate(*_inputs(name, dtype), **weights)
        found, expected = (f(*arguments) for f in (match_cost_cpu, match_cost_reference))
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tail", "crowd"])
def test_what_stands_beyond_the_counts_is_not_looked_at(name):
    inputs = _inputs(name, torch.float32)
    logits, boxes, labels, target_boxes, counts = (x.clone() for x in inputs)
    padding = torch.arange(labels.shape[1]) >= counts[:, None]
    labels[padding] = 2**40 if INTERPRETING else 0  # the reference looks up every label
    target_boxes[padding] = math.nan
    assert torch.equal(match_cost_fused(logits, boxes, labels, target_boxes, counts), match_cost_fused(*inputs))


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


@needs_compiler
def test_one_launch_for_all_layers_and_images():
    (launch,) = record.record(
        lambda: module._launch(*module.launches((6, 8, 100, 92, 20, False), torch.float32, "cuda")[0][1]), "a100"
    )
    assert launch.grid == (48, 7, 1)


def test_equal_boxes_cost_the_same():
    logits, boxes, labels, target_boxes, counts = _inputs("tail", torch.float32)
    boxes[0, 0, 3] = boxes[0, 0, 16] = boxes[0, 0, 1]
    logits[0, 0, 3] = logits[0, 0, 16] = logits[0, 0, 1]
    first = match_cost_fused(logits, boxes, labels, target_boxes, counts)
    assert torch.equal(first[0, 0, 3], first[0, 0, 1])
    assert torch.equal(first[0, 0, 16], first[0, 0, 1])
