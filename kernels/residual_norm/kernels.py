"""The Triton kernels of ``residual_norm``: N rows of C columns, R rows and all columns to a program.

BLOCK is the power of two not below C. Statistics and sums are float32. The backward computes the sum and the dropped
elements again; its program i of P takes the blocks i, i + P ... of rows and leaves a row of sums for weight and bias.
"""

from unit_fast_kernels.shared.philox import keep_rows
from unit_fast_kernels.shared.triton import jit, tl


@jit
def _sum_rows(x_ptr, branch_ptr, seed_ptr, row, offset, inside, limit, scale, C: tl.constexpr, DROPOUT: tl.constexpr):
    """float32 (x + dropout(branch), what the branch was multiplied with or 1.0) of the block [R,BLOCK]."""
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        kept = tl.where(keep_rows(row, 0, C, offset.shape[1], limit, seed_ptr), scale, 0.0)
        return x + branch * kept, kept
    else:
        return x + branch, 1.0


@jit
def _columns(ptr, column, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [R,BLOCK] of a vector [C]. Loaded once a row (from L1): loaded as [BLOCK] it takes a trip through shared
    memory to the block's layout, which costs more."""
    everywhere = tl.broadcast_to(column[None, :], [R, BLOCK])
    return tl.load(ptr + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)


@jit
def _residual_norm_fwd_kernel(
    x_ptr,  # [N,C]
    branch_ptr,  # [N,C]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    pos_ptr,  # [B,S,C] by strides, or None
    seed_ptr,  # int64 [2], or None
    y_ptr,  # [N,C]
    y_pos_ptr,  # [N,C], or None
    mean_ptr,  # [N] float32
    rstd_ptr,  # [N] float32
    rows,  # N
    inner,  # S
    pos_stride_b,
    pos_stride_s,
    pos_stride_c,
    eps,
    scale,
    limit,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0) * R + tl.arange(0, R)
    row = number.to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (number < rows)[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    total, _ = _sum_rows(
        x_ptr, branch_ptr, seed_ptr, row, offset, inside, limit, scale, C=C, DROPOUT=seed_ptr is not None
    )
    mean = tl.sum(total, 1) / C
    centred = total - mean[:, None]
    if C != BLOCK:
        centred = tl.where((column < C)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    y = centred * rstd[:, None] * _columns(weight_ptr, column, R, C, BLOCK) + _columns(bias_ptr, column, R, C, BLOCK)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    if pos_ptr is not None:
        start = (number // inner).to(tl.int64) * pos_stride_b + (number % inner).to(tl.int64) * pos_stride_s
        pos = tl.load(pos_ptr + start[:, None] + column[None, :] * pos_stride_c, mask=inside, other=0.0)
        tl.store(y_pos_ptr + offset, (y + pos.to(tl.float32)).to(y_pos_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + number, mean, mask=number < rows)
    tl.store(rstd_ptr + number, rstd, mask=number < rows)


@jit
def _residual_norm_bwd_kernel(
    dy_ptr,  # [N,C], or None
    dy_pos_ptr,  # [N,C], or None
    x_ptr,  # [N,C]
    branch_ptr,  # [N,C]
    weight_ptr,  # [C]
    mean_ptr,  # [N] float32
    rstd_ptr,  # [N] float32
    seed_ptr,  # int64 [2], or None
    dx_ptr,  # [N,C]
    dbranch_ptr,  # [N,C], or None: the gradient of the branch is dx
    partials_ptr,  # [2,programs,C] float32: sums for weight and bias over the rows of one program
    rows,  # N
    scale,
    limit,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    for_weight = tl.zeros([R, BLOCK], tl.float32)
    for_bias = tl.zeros([R, BLOCK], tl.float32)
    for block in range(program, tl.cdiv(rows, R), programs):
        number = block * R + tl.arange(0, R)
        row = number.to(tl.int64)
        inside = (number < rows)[:, None] & (column < C)[None, :]
        offset = row[:, None] * C + column[None, :]
        total, kept = _sum_rows(
            x_ptr, branch_ptr, seed_ptr, row, offset, inside, limit, scale, C=C, DROPOUT=seed_ptr is not None
        )
        mean = tl.load(mean_ptr + number, mask=number < rows, other=0.0)
        rstd = tl.load(rstd_ptr + number, mask=number < rows, other=0.0)
        grad = tl.zeros([R, BLOCK], tl.float32)
        if dy_ptr is not None:
            grad += tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if dy_pos_ptr is not None:
            grad += tl.load(dy_pos_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        # Beyond the columns and rows the gradient is zero, so that what the normalised sum is there does not count.
        normalised = (total - mean[:, None]) * rstd[:, None]
        for_weight += grad * normalised
        for_bias += grad
        grad *= _columns(weight_ptr, column, R, C, BLOCK)
        # One reduction for both, so that warps which share a row wait for each other once.
        along, level = tl.split(tl.sum(tl.join(grad * normalised, grad), 1) / C)
        dx = (grad - level[:, None] - normalised * along[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offset, (dx * kept).to(dbranch_ptr.dtype.element_ty), mask=inside)
    place = partials_ptr + program.to(tl.int64) * C + column
    tl.store(place, tl.sum(for_weight, 0), mask=column < C)
    tl.store(place + programs.to(tl.int64) * C, tl.sum(for_bias, 0), mask=column < C)
