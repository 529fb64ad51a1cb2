"""The matching against SciPy, one image and layer at a time, with a cost written out with loops."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.model.test_criterion import COUNTS, giou, make
from unit_fast.config import LossConfig
from unit_fast.detection.matcher import match


def naive_cost(logits, boxes, labels, targets, loss):
    """[Q,n] of one image: three nested loops over plain numbers."""
    cost = torch.zeros(len(boxes), len(labels), dtype=torch.float64)
    for q in range(len(boxes)):
        p = torch.softmax(logits[q], 0)
        score = p.log() if loss.balanced_class_loss else p
        for t in range(len(labels)):
            l1 = sum(abs(float(boxes[q, i] - targets[t, i])) for i in range(4))
            cost[q, t] = (
                loss.cost_bbox * l1
                - loss.cost_class * score[labels[t]]
                - loss.cost_giou * giou(boxes[q].tolist(), targets[t].tolist())
            )
    return cost


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("bcl", [False, True], ids=["softmax", "log_softmax"])
def test_match_is_the_cheapest_pairing(counts, bcl):
    loss = LossConfig(balanced_class_loss=bcl, cost_class=1.5)
    given = make(counts, seed=3)
    query = match(given.logits, given.boxes, given.batch, loss)
    assert query.dtype == torch.int64
    assert query.shape == (*given.logits.shape[:2], given.batch.labels.shape[1])
    assert not query.requires_grad
    for l in range(len(query)):
        for b, n in enumerate(counts):
            cost = naive_cost(
                given.logits[l, b].detach(),
                given.boxes[l, b].detach(),
                given.batch.labels[b, :n],
                given.batch.boxes[b, :n],
                loss,
            )
            rows, columns = linear_sum_assignment(cost.numpy())
            expected = [-1] * query.shape[2]
            for q, t in zip(rows, columns, strict=True):
                expected[t] = q
            assert query[l, b].tolist() == expected


def test_weights_of_the_cost_are_respected():
    given = make((4, 4), seed=5)
    by = {
        name: match(given.logits, given.boxes, given.batch, LossConfig(**{**dict.fromkeys(_COSTS, 0.0), name: 1.0}))
        for name in _COSTS
    }
    assert not torch.equal(by["cost_class"], by["cost_bbox"])
    assert not torch.equal(by["cost_giou"], by["cost_bbox"])


_COSTS = ("cost_class", "cost_bbox", "cost_giou")
