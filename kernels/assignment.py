"""Batched exact rectangular assignment.

For each of P problems: the minimum-cost one-to-one pairing of min(Q, T) of the Q queries and the T = counts[p] targets.

Shapes: cost [P,Q,T], counts [P], query [P,T], flag [P]. Replaces, per image and decoder layer, a copy of the cost to
the host and ``scipy.optimize.linear_sum_assignment``. Here too SciPy's Jonker-Volgenant solver runs on the host, in
float64, after one copy of all costs.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assignment_reference(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """cost [P,Q,T] float, counts [P] -> query [P,T] int64, flag [P] int32.

    ``query[p,t]`` is the query that target t got, -1 beyond ``counts`` and for targets left over when there are more
    targets than queries. Non-finite costs are replaced by (largest finite + largest magnitude + 1) of the problem and
    reported as flag 1; SciPy alone would raise. ``ValueError`` for a count outside 0..T.
    """
    host = cost.detach().to("cpu", torch.float64).numpy()
    problems, _, targets = host.shape
    sizes = counts.tolist()
    if any(not 0 <= size <= targets for size in sizes):
        p = next(p for p, size in enumerate(sizes) if not 0 <= size <= targets)
        raise ValueError(
            f"assignment: counts[{p}] is {sizes[p]}; it must be between 0 and the {targets} columns of cost"
        )
    query = np.full((problems, targets), -1, dtype=np.int64)
    flag = np.zeros(problems, dtype=np.int32)
    for p, size in enumerate(sizes):
        problem = host[p, :, :size]
        finite = np.isfinite(problem)
        if not finite.all():
            flag[p] = 1
            values = problem[finite]
            sentinel = values.max() + np.abs(values).max() + 1.0 if values.size else 1.0
            problem = np.where(finite, problem, sentinel)
        rows, columns = linear_sum_assignment(problem)
        query[p, columns] = rows
    return torch.from_numpy(query).to(cost.device), torch.from_numpy(flag).to(cost.device)
