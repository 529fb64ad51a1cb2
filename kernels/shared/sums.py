"""Column sums of partial results, the second stage of a deterministic reduction.

A backward kernel leaves one row of partial sums a program, partials [K,P,C] float32; ``sum_partials`` adds the P rows
of each of K <= 2 results in a fixed order. Bytes: reads partials, writes K C numbers.
"""

from torch import Tensor
from unit_fast_kernels.shared.triton import cdiv, jit, power_of_two, tl

COLUMNS, ROWS, WARPS = 16, 64, 4


@jit
def _sum_partials_kernel(
    partials_ptr,  # [K,P,C] float32
    first_ptr,  # [C]
    second_ptr,  # [C]
    P,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    which = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partials_ptr += which.to(tl.int64) * P * C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < P)[:, None] & (column < C)[None, :]
        total += tl.load(partials_ptr + row.to(tl.int64)[:, None] * C + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first_ptr + column, result.to(first_ptr.dtype.element_ty), mask=column < C)
    else:
        tl.store(second_ptr + column, result.to(second_ptr.dtype.element_ty), mask=column < C)


def sum_partials(partials: Tensor, *results: Tensor) -> None:
    """Write the sum over P of partials [K,P,C] (contiguous float32) into the K results [C], one or two."""
    count, rows, columns = partials.shape
    _sum_partials_kernel[cdiv(columns, COLUMNS), count](
        partials,
        results[0],
        results[-1],
        rows,
        columns,
        ROWS=min(ROWS, power_of_two(rows)),
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
