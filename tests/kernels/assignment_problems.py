"""Assignment problems of every kind that can go wrong, and SciPy's answer to one."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unit_fast import ops

KINDS = ("random", "ties", "few_values", "duplicates", "equal", "wide", "predictions", "non_finite")


def problems(kind: str, count: int, queries: int, targets: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """cost [P,Q,T] and counts [P] of that kind, counts from 0 to T; float64 where sums shall be rounded."""
    shape = count, queries, targets
    cost = torch.randn(shape, generator=rng)
    counts = torch.randint(0, targets + 1, (count,), generator=rng, dtype=torch.int32)
    counts[0] = targets
    if kind == "ties":
        cost = torch.randint(-2, 3, shape, generator=rng).float()
    elif kind == "few_values":  # sums of which are equal or not by the order of their terms
        cost = torch.tensor([0.1, 0.2, 0.3, 0.7], dtype=torch.float64)[torch.randint(0, 4, shape, generator=rng)]
    elif kind == "duplicates" and queries * targets:
        cost = cost[:, torch.randint(0, queries, (queries,), generator=rng)]
        cost = cost[:, :, torch.randint(0, targets, (targets,), generator=rng)]
    elif kind == "equal":
        cost = cost[:, :1, :1].expand(shape).clone() if queries * targets else cost
    elif kind == "wide":  # from 1e-6 to 1e30, of either sign
        cost = cost.sign() * 10.0 ** (36 * torch.rand(shape, generator=rng) - 6)
    elif kind == "predictions":
        cost = _costs_of_predictions(shape, counts, rng)
    elif kind == "non_finite":
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.randint(0, 3, shape, generator=rng)]
        cost = torch.where(torch.rand(shape, generator=rng) < 0.2, bad, cost)
    return cost, counts


def _costs_of_predictions(shape, counts, rng) -> Tensor:
    """Costs of DETR with huge logits, duplicated boxes, and boxes without extent (two of which have no GIoU)."""
    count, queries, targets = shape
    logits = 1e4 * torch.randn(1, count, queries, 5, generator=rng)
    boxes, target_boxes = (torch.rand(count, n, 4, generator=rng) for n in (queries, targets))
    for b in (boxes, target_boxes):
        b[:, ::3, 2:] = 0.0
        b[:, 1::3, 2:3] = 0.0
        if b.shape[1] > 3:
            b[:, 2] = b[:, 3] = b[:, 1]
    labels = torch.randint(0, 5, (count, targets), generator=rng)
    return ops.match_cost(logits, boxes[None], labels, target_boxes, counts)[0]


def scipy_query(cost: Tensor, count: int) -> tuple[list[int], int]:
    """What SciPy pairs each of T targets with (-1: nothing), and 1 where costs were not finite, else 0.

    cost [Q,T] as it is, transposed by SciPy where it does that itself.
    """
    problem = cost[:, :count].double().numpy()
    finite = np.isfinite(problem)
    if not finite.all():
        known = problem[finite]
        problem = problem.copy()
        problem[~finite] = known.max() + abs(known).max() + 1 if known.size else 1.0
    rows, columns = linear_sum_assignment(problem)
    query = np.full(cost.shape[1], -1)
    query[columns] = rows
    return query.tolist(), int(not finite.all())
