"""Batched exact rectangular assignment.

For each of P problems: the minimum-cost one-to-one pairing of min(Q, T) of the Q queries and the T = counts[p] targets.
SciPy's Jonker-Volgenant solver on the CPU, with a single copy of all costs to the host.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assignment_reference(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """cost [P,Q,T] float, counts [P] int -> query [P,T] int64, flag [P] int32.

    ``query[p,t]`` is the query that target t got, -1 beyond ``counts`` and for targets left over when there are more
    targets than queries. Non-finite costs are replaced by (largest finite + largest magnitude + 1) of the problem and
    reported as flag 1; SciPy alone would raise.
    """
    host = cost.detach().to("cpu", torch.float64).numpy()
    sizes = counts.tolist()
    query = np.full((cost.shape[0], cost.shape[2]), -1, dtype=np.int64)
    flag = np.zeros(cost.shape[0], dtype=np.int32)
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
