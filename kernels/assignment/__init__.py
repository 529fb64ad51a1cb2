"""Batched exact rectangular assignment, for any DETR.

For each of P problems: the minimum-cost one-to-one pairing of min(Q, T) of the Q queries and the T = counts[p] targets.

Shapes: cost [P,Q,T], counts [P] (or [G], P a multiple of it: problem p has counts[p % G], as for P = layers x images),
query [P,T], flag [P]. Replaces, per image and decoder layer, a copy of the cost to the host and
``scipy.optimize.linear_sum_assignment``. On a CPU SciPy's Jonker-Volgenant solver runs, in float64.

Fused: one launch, one problem a program, nothing read by the host, results of fixed size on the device. The same
algorithm in the same order, so that the pairs are SciPy's, ties included (``_assignment_kernels``). The costs are read
from memory once to look for what is not finite, and then as often as the search scans a row, from cache. It is latency
that counts: at least one scan a target, one after the other; problems run side by side. FLOPs: 3 a column and scan.
Limits of the fused path: max(Q, T) <= 1024; fewer than 2^31 problems. Costs of any floating dtype, float64 as it is.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from unit_fast_kernels.assignment.kernels import _assignment_kernel
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import DTYPES, register
from unit_fast_kernels.shared.triton import power_of_two
from unit_fast_kernels.shared.tuned import candidates_of, launch_parameters
from unit_fast_kernels.shared.validation import check_floating, check_integer, check_one_device, check_shape

MAX_COLUMNS = 1024


def assignment_reference(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """cost [P,Q,T] float, counts [P] or [G] -> query [P,T] int64, flag [P] int32.

    ``query[p,t]`` is the query that target t got, -1 beyond ``counts`` and for targets left over when there are more
    targets than queries. Non-finite costs are replaced by (largest finite + largest magnitude + 1) of the problem and
    reported as flag 1; SciPy alone would raise. ``ValueError`` for a count outside 0..T.
    """
    if torch.compiler.is_compiling():  # one operator to the compiler, which cannot look into SciPy
        return assignment_fused(cost, counts)
    # SciPy solves for the shorter side, and would transpose (copy) each problem with fewer targets than queries.
    host = cost.detach().flatten(0, -3).mT.to("cpu", torch.float64).contiguous()
    all_finite = math.isfinite(host.sum())  # a sum that is not finite may yet have finite terms only
    by_target = host.numpy()
    problems, targets, queries = by_target.shape
    sizes = counts.tolist()
    if any(not 0 <= size <= targets for size in sizes):
        p = next(p for p, size in enumerate(sizes) if not 0 <= size <= targets)
        raise ValueError(
            f"assignment: counts[{p}] is {sizes[p]}; it must be between 0 and the {targets} columns of cost"
        )
    query = np.full((problems, targets), -1, dtype=np.int64)
    flag = np.zeros(problems, dtype=np.int32)
    for p in range(problems):
        size = sizes[p % len(sizes)]
        problem = by_target[p, :size]
        if not all_finite and not (finite := np.isfinite(problem)).all():
            flag[p] = 1
            values = problem[finite]
            sentinel = values.max() + np.abs(values).max() + 1.0 if values.size else 1.0
            problem = np.where(finite, problem, sentinel)
        if size < queries:
            query[p, :size] = linear_sum_assignment(problem)[1]
        else:
            rows, columns = linear_sum_assignment(problem.T)
            query[p, columns] = rows
    query, flag = (torch.from_numpy(found).to(cost.device) for found in (query, flag))
    return query.view(*cost.shape[:-2], targets), flag.view(cost.shape[:-2])


# --- Launcher, registration -----------------------------------------------------------------------------------------


def defaults(columns: int) -> dict[str, int]:
    """Warps, and rows of a turn of the first pass. One warp has no barriers, but is slow at many columns;
    a thread has 32 loads under way."""
    warps = 1 if columns <= 256 else columns // 128
    return {"warps": warps, "rows": min(16, 1024 * warps // columns)}


def _columns(cost: Tensor) -> int:
    return max(16, power_of_two(max(cost.shape[1:])))


def _outputs(cost: Tensor, *_) -> tuple[Tensor, Tensor]:
    problems, _, targets = cost.shape
    query = torch.empty((problems, targets), dtype=torch.int64, device=cost.device)
    return query, torch.empty(problems, dtype=torch.int32, device=cost.device)


def _launch(cost, counts):
    query, flag = outputs = _outputs(cost)
    if cost.numel() == 0:
        query.fill_(-1)
        flag.zero_()
        return outputs
    problems, queries, targets = cost.shape
    columns = _columns(cost)
    tune = launch_parameters("assignment", f"columns{columns}", defaults(columns), cost.device)
    _assignment_kernel[(problems,)](
        cost,
        counts.contiguous(),
        query,
        flag,
        counts.shape[0],
        queries,
        targets,
        *cost.stride(),
        COLUMNS=columns,
        ROWS=tune["rows"],
        num_warps=tune["warps"],
        enable_fp_fusion=False,  # nothing to fuse; bits are promised
    )
    return outputs


_operator = register(
    "assignment",
    "(Tensor cost, Tensor counts) -> (Tensor query, Tensor flag)",
    reference=assignment_reference,
    launch=_launch,
    fake=_outputs,
)


def why_not(cost: Tensor, counts: Tensor) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if cost.dtype not in (*DTYPES, torch.float64):
        return f"cost is {cost.dtype}: convert it to float32, bfloat16, float16 or float64"
    if max(cost.shape[-2:]) > MAX_COLUMNS:
        return f"the larger of queries and targets is {max(cost.shape[-2:])}: the kernel takes up to {MAX_COLUMNS}"
    if cost.shape[:-2].numel() >= 2**31:
        return "cost has 2^31 problems or more: split it"
    return None


def assignment_fused(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """``assignment_reference`` in one launch, with the same pairs. No gradient.

    cost of any strides (fastest where those of Q, the queries, are 1), of DTYPES or float64; counts of any integer
    dtype. Nothing is read on the host, so that a count outside 0..T is no error but taken as the nearest legal one.
    What does not fit: ``why_not``.
    """
    query, flag = _operator(cost.detach().flatten(0, -3), counts)
    return query.unflatten(0, cost.shape[:-2]), flag.unflatten(0, cost.shape[:-2])


def validate(cost: Tensor, counts: Tensor) -> tuple:
    """Exact batched assignment: the cheapest one-to-one pairing of queries and targets in each of P problems.

    For any DETR: what ``scipy.optimize.linear_sum_assignment`` does image by image, ties included, for all images and
    decoder layers at once. On CUDA one launch, and the host reads nothing, so that a graph can hold it.

    cost [P,Q,T] floating, any strides, of which problem p uses the first counts[p] columns; counts [P] integer, 0..T
    (on CUDA a count outside is taken as the nearest of these). Returns query [P,T] int64: the query of each target, -1
    beyond counts, and for the targets left over where there are more than Q; flag [P] int32: 1 where the problem held
    non-finite costs, which count as dearer than every finite one. No gradient.

    With cost [L,B,Q,T] and counts [B] for L layers of the same B images the results are [L,B,T] and [L,B].
    ``ValueError`` on arguments that do not fit.
    """
    op = "assignment"
    layered = cost.dim() == 4
    check_shape(op, "cost", cost, (None,) * (4 if layered else 3), "[P,Q,T]")
    check_shape(op, "counts", counts, tuple(cost.shape[-3:-2]), "[B]" if layered else "[P]")
    check_floating(op, cost=cost)
    check_integer(op, counts=counts)
    check_one_device(op, cost, counts=counts)
    return cost, counts


ASSIGNMENT = Operator(
    name="assignment",
    validate=validate,
    reference=assignment_reference,
    fused=assignment_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "unit_coco": (48, 100, 20, 8, 7),
    "unit_coco_batch64": (384, 100, 32, 64, 7),
    "performance_target": (96, 100, 32, 16, 32),
    "unit_crowded": (48, 100, 64, 8, 60),
    "full": (48, 100, 100, 8, 100),
    "rf_detr_groups": (208, 300, 32, 4, 7),
    "torch_hungarian": (208, 300, 100, 208, 100),
    "few_queries": (192, 8, 16, 32, 7),
    "dino_queries": (42, 900, 64, 6, 20),
}
"""(P, Q, T, G, mean count): problems, queries, padded targets, images; RF-DETR: 4 layers x 13 groups x 4 images."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``assignment_fused``: costs as of a trained model (each target has a few near queries), laid out as
    ``match_cost_fused`` does it; counts around the mean."""
    problems, queries, targets, groups, mean = shape
    cost = torch.rand(problems, targets, queries, device=device) * 4.0
    cost -= 6.0 * torch.rand(problems, targets, queries, device=device) ** 12
    far = min(mean, targets - mean)
    counts = mean - far + torch.arange(groups, device=device, dtype=torch.int32) * 5 % (2 * far + 1)
    return {"cost": cost.to(dtype).mT, "counts": counts}


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operator with arguments: there is no backward."""
    return [("assignment", tuple(make(shape, dtype, device).values()))]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the default first."""
    columns = max(16, power_of_two(max(shape[1:3])))
    tried = [defaults(columns)] + [
        {"warps": warps, "rows": rows}
        for warps in (1, 2, 4, 8)
        for rows in (1, 2, 4, 8, 16)
        if columns <= 512 * warps and 1 <= rows * columns // (32 * warps) <= 64
    ]
    return candidates_of(["assignment"], f"columns{columns}", tried)


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """The costs of real targets (mean count) read once, query and flag written."""
    problems, queries, targets, groups, mean = shape
    return problems * (queries * min(mean, targets) * dtype.itemsize + 8 * targets + 4) + 4 * groups


def flops(shape: tuple) -> int:
    """Three additions a column in one scan a target: the least there can be."""
    problems, queries, targets, _, mean = shape
    return 3 * problems * queries * min(mean, targets)
