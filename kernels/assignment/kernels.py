"""The Triton kernel of ``assignment``: shortest augmenting paths, one problem to a program.

The smaller side of a problem are its rows (queries where both are equal, as SciPy has it), the other its columns. Row
after row is added by a search from it (Dijkstra over reduced costs) to the nearest column without a row: a scan takes
one row's costs, lowers the distances of the columns not yet left behind and leaves the nearest behind. All state lies
with the columns, in registers: COLUMNS is the power of two not below the larger side of any problem; a row's potential
stands at the column that the row holds. Sizes are values at run time.

Distances and potentials are float64, added in SciPy's order, and of equally near columns it is SciPy's that is taken
(``position``), so that the pairs are SciPy's own, ties included. A float64 minimum over the columns is three integer
minima: upper half, lower half among its equals, order among those; Hopper and Ampere have one instruction for each.
"""

from unit_fast_kernels.shared.triton import jit, tl


@jit
def _ordered(x):
    """(upper, lower) int32 whose lexicographic order is that of the float64 x. There is no -0.0 here: a sum or
    difference is -0.0 only where its first term is, and first terms start from 0.0."""
    bits = x.to(tl.int64, bitcast=True)
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return (bits >> 32).to(tl.int32), bits.to(tl.int32) ^ -0x80000000


@jit
def _unordered(upper, lower):
    """The float64 scalar that ``_ordered`` took apart."""
    bits = (upper.to(tl.int64) << 32) | ((lower ^ -0x80000000).to(tl.int64) & 0xFFFFFFFF)
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@jit
def _at(chosen, x):
    """The int32 of x [COLUMNS] in the one column that is chosen."""
    return tl.max(tl.where(chosen, x, -0x80000000), 0)


@jit
def _float_at(chosen, x):
    """The float64 of x [COLUMNS] in the one column that is chosen."""
    bits = x.to(tl.int64, bitcast=True)
    upper, lower = _at(chosen, (bits >> 32).to(tl.int32)), _at(chosen, bits.to(tl.int32))
    return ((upper.to(tl.int64) << 32) | (lower.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@jit
def _wide(x):
    """(x as float64, whether it is finite), x of any floating dtype."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(tl.float64), tl.abs(x) < float("inf")


@jit
def _assignment_kernel(
    cost_ptr,  # [P,Q,T] by strides, any floating dtype
    counts_ptr,  # [groups] integer
    query_ptr,  # [P,T] int64
    flag_ptr,  # [P] int32
    groups,
    queries,  # Q
    targets,  # T
    stride_p,
    stride_q,
    stride_t,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    # A count outside 0..T would read and write out of bounds.
    count = tl.minimum(tl.maximum(tl.load(counts_ptr + problem % groups), 0), targets).to(tl.int32)
    by_target = count < queries
    rows, columns = tl.minimum(count, queries), tl.maximum(count, queries)
    row_stride = tl.where(by_target, stride_t, stride_q).to(tl.int64)
    column_stride = tl.where(by_target, stride_q, stride_t).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    exists = column < columns
    cost_ptr += problem * stride_p
    column_ptr = cost_ptr + column.to(tl.int64) * column_stride

    # What is not finite counts as the largest finite cost plus the largest magnitude plus one. Nearly always there is
    # nothing of the kind, which takes one pass; it also brings the costs nearer.
    row = tl.arange(0, ROWS)
    bad = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, rows, ROWS):
        read = (start + row < rows)[:, None] & exists[None, :]
        tile_ptr = column_ptr[None, :] + (start + row)[:, None] * row_stride
        _, finite = _wide(tl.load(tile_ptr, mask=read, other=0.0))
        bad |= tl.where(finite, 0, 1)
    flag = tl.max(tl.max(bad, 1), 0)
    tl.store(flag_ptr + problem, flag)
    dearest = tl.full([], 0.0, tl.float64)
    if flag != 0:
        largest = tl.full([COLUMNS], float("-inf"), tl.float64)
        magnitude = tl.full([COLUMNS], 0.0, tl.float64)
        for i in range(rows):
            x, finite = _wide(tl.load(column_ptr + i * row_stride, mask=exists, other=float("inf")))
            largest = tl.maximum(largest, tl.where(finite, x, float("-inf")))
            magnitude = tl.maximum(magnitude, tl.where(finite, tl.abs(x), 0.0))
        top = tl.max(largest, 0)
        top = tl.where(top == float("-inf"), 0.0, top)  # nothing is finite: all cost 1
        dearest = top + tl.max(magnitude, 0) + 1.0

    infinity = tl.full([COLUMNS], float("inf"), tl.float64)
    zero = tl.full([], 0.0, tl.float64)
    potential = tl.zeros([COLUMNS], tl.float64)  # of the column
    row_potential = tl.zeros([COLUMNS], tl.float64)  # of the row that the column holds
    held = tl.full([COLUMNS], -1, tl.int32)  # that row, or -1
    for current in range(rows):
        distance = infinity
        previous = tl.full([COLUMNS], -1, tl.int32)  # column of the row that the distance comes from; -1: current
        # SciPy scans its array of columns left; this is each one's place in it, -1 once it is left behind.
        position = tl.where(exists, columns - 1 - column, -1)
        left = columns
        scanned, scanned_column, scanned_potential, least = current, -1, zero, zero
        sink = -1
        while sink < 0:
            x, finite = _wide(tl.load(column_ptr + scanned * row_stride, mask=exists, other=0.0))
            reached = least + tl.where(finite, x, dearest) - scanned_potential - potential
            waiting = position >= 0
            nearer = waiting & (reached < distance)
            distance = tl.where(nearer, reached, distance)
            previous = tl.where(nearer, scanned_column, previous)
            # The nearest: of equals the last without a row, or the first where all have one. One number says which it
            # is and which row it holds, since the next scan waits for that.
            upper, lower = _ordered(distance)
            upper = tl.where(waiting, upper, 0x7FFFFFFF)  # infinity's is less
            least_upper = tl.min(upper, 0)
            equal = upper == least_upper
            least_lower = tl.min(tl.where(equal, lower, 0x7FFFFFFF), 0)
            equal = equal & (lower == least_lower)
            order = tl.where(held < 0, COLUMNS - 1 - position, COLUMNS + position)
            order = tl.where(equal, order * (2 * COLUMNS) + held + 1, 0x7FFFFFFF)
            first = tl.min(order, 0)
            chosen = order == first
            scanned = first % (2 * COLUMNS) - 1
            first = first // (2 * COLUMNS)
            least = _unordered(least_upper, least_lower)
            scanned_column = _at(chosen, column)
            scanned_potential = _float_at(chosen, row_potential)
            sink = tl.where(scanned < 0, scanned_column, -1)
            # It leaves the array; the last one takes its place.
            place = tl.where(first < COLUMNS, COLUMNS - 1 - first, first - COLUMNS)
            left -= 1
            position = tl.where(chosen, -1, tl.where(position == left, place, position))
        change = tl.where(exists & (position < 0), least - distance, 0.0)
        potential -= change
        row_potential += change
        # Along the path back from the sink each column takes the row of the one before.
        here = sink
        while here >= 0:
            at = column == here
            before = _at(at, previous)
            from_before = column == before
            if before < 0:
                held = tl.where(at, current, held)
                row_potential = tl.where(at, least, row_potential)
            else:
                held = tl.where(at, _at(from_before, held), held)
                row_potential = tl.where(at, _float_at(from_before, row_potential), row_potential)
            here = before

    query_ptr += problem * targets
    if by_target:
        tl.store(query_ptr + held, column.to(tl.int64), mask=held >= 0)
    else:
        tl.store(query_ptr + column, held.to(tl.int64), mask=column < count)
    tl.store(query_ptr + column, tl.full([COLUMNS], -1, tl.int64), mask=(column >= count) & (column < targets))
