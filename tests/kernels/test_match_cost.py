"""The matching cost against loops over layers, images, queries and targets; generalised IoU against its definition."""

import math

import pytest
import torch
from unit_fast_kernels.match_cost import match_cost_reference, pairwise_giou

from unit_fast import ops

# layers, batch, queries, classes, padded targets, counts
SIZES = {
    "row": (1, 1, 1, 2, 1, [1]),
    "odd": (2, 3, 5, 7, 4, [4, 1, 3]),
    "no_targets": (2, 2, 5, 7, 3, [0, 2]),
    "no_columns": (2, 2, 5, 7, 0, [0, 0]),
    "all_padded": (1, 2, 4, 5, 3, [0, 0]),
    "crowd": (1, 1, 3, 6, 17, [17]),
    "empty": (2, 0, 5, 7, 3, []),
}


def _inputs(name, dtype=torch.float64):
    layers, batch, queries, classes, targets, counts = SIZES[name]
    rng = torch.Generator().manual_seed(5)
    counts = torch.tensor(counts, dtype=torch.int32)
    padding = torch.arange(targets) >= counts[:, None]
    labels = torch.randint(0, classes, (batch, targets), generator=rng).masked_fill(padding, -1)

    def boxes(*shape):
        centre, size = torch.rand(*shape, 4, generator=rng, dtype=torch.float64).split(2, -1)
        return torch.cat((centre, 0.05 + 0.4 * size), -1).to(dtype)

    logits = torch.randn(layers, batch, queries, classes, generator=rng, dtype=torch.float64).to(dtype)
    return logits, boxes(layers, batch, queries), labels, boxes(batch, targets), counts


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


@pytest.mark.parametrize("weights", [{}, {"cost_class": 2.0, "cost_bbox": 1.0, "cost_giou": 0.5, "log_softmax": True}])
@pytest.mark.parametrize("name", SIZES)
def test_equals_loops(name, weights):
    inputs = _inputs(name)
    torch.testing.assert_close(ops.match_cost(*inputs, **weights), _loops(*inputs, **weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    inputs = _inputs("crowd", dtype)
    cost = ops.match_cost(*inputs)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost.double(), _loops(*inputs), rtol=1e-5, atol=1e-5)


def test_no_gradient_strides_and_no_writing():
    inputs = _inputs("odd")
    logits, boxes = (x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in inputs[:2])
    before = [x.detach().clone() for x in inputs]
    cost = ops.match_cost(logits, boxes, *inputs[2:])
    assert not cost.requires_grad
    assert torch.equal(cost, match_cost_reference(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


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
    a, b = (0.2 + 0.5 * torch.rand(6, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
    assert torch.autograd.gradcheck(pairwise_giou, (a.detach().requires_grad_(), b.detach().requires_grad_()))


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [
        (0, torch.randn(2, 3, 5), r"logits is of shape \[2, 3, 5\]; it must be \[L,B,Q,K\]"),
        (1, torch.rand(2, 3, 4, 4), r"boxes is of shape \[2, 3, 4, 4\]; it must be \[L,B,Q,4\] = \[2, 3, 5, 4\]"),
        (2, torch.zeros(2, 4).long(), r"labels is of shape \[2, 4\]; it must be \[B,N\] = \[3, any\]"),
        (3, torch.rand(3, 5, 4), r"target_boxes is of shape \[3, 5, 4\]; it must be \[B,N,4\] = \[3, 4, 4\]"),
        (4, torch.zeros(4).int(), r"counts is of shape \[4\]; it must be \[B\] = \[3\]"),
        (0, torch.ones(2, 3, 5, 7).int(), r"logits is torch.int32; it must be floating point"),
        (2, torch.zeros(3, 4), r"labels is torch.float32; it must be an integer tensor"),
        (4, torch.zeros(3), r"counts is torch.float32; it must be an integer tensor"),
    ],
)
def test_refusals(position, value, text):
    arguments = list(_inputs("odd"))
    arguments[position] = value
    with pytest.raises(ValueError, match=f"^match_cost: {text}"):
        ops.match_cost(*arguments)
