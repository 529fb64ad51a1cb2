"""The Triton kernels of ``adamw``: three launches for all n tensors of an optimiser, found by their addresses.

The tensors are cut into chunks of CHUNK elements, C in all; a program of the first and of the last kernel takes one.
``addresses`` [ROWS,n] int64, by row: parameter, gradient, first moment, second moment, copy in bfloat16; 0
where there is none. ``layout`` [3,n] int64: elements, first chunk, group. ``chunks`` [2,C] int32: tensor, and which of
its chunks.

Arithmetic is float32 with every product and sum rounded by itself (launched without fp fusion), as PyTorch's; what is
computed once a tensor is float64.
"""

from unit_fast_kernels.shared.triton import jit, tl

ROWS = 5
GRADIENT_ROW = 1
"""The row of ``addresses`` that changes from step to step."""
CHUNK = 16384
SCALARS = 9
"""Numbers that the second kernel leaves for the third, by tensor."""


@jit
def _adamw_norms_kernel(
    addresses_ptr,  # [ROWS,n] int64
    layout_ptr,  # [3,n] int64
    chunks_ptr,  # [2,C] int32
    used_ptr,  # [n] uint8, or None: those that have a gradient
    partials_ptr,  # [2,C] float32: sum of squares and largest magnitude; zeros for what is not used
    n,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    tensor = tl.load(chunks_ptr + chunk)
    address = tl.load(addresses_ptr + n + tensor)
    if used_ptr is not None:
        address = tl.where(tl.load(used_ptr + tensor) != 0, address, 0)
    squares = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    if address != 0:
        start = tl.load(chunks_ptr + chunks + chunk).to(tl.int64) * CHUNK
        count = tl.minimum(tl.load(layout_ptr + tensor) - start, CHUNK).to(tl.int32)
        grad_ptr = address.to(tl.pointer_type(GRAD)) + start
        # Accesses of 16 bytes come with a pointer known to be aligned and without a mask only.
        whole = tl.where(address % 16 == 0, count // BLOCK, 0)
        aligned_ptr = tl.multiple_of(grad_ptr, 16)
        for block in range(whole):
            grad = tl.load(aligned_ptr + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            squares += grad * grad
            largest = tl.maximum(largest, tl.abs(grad))
        for block in range(whole, tl.cdiv(count, BLOCK)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(tl.float32)
            squares += grad * grad
            largest = tl.maximum(largest, tl.abs(grad))
    tl.store(partials_ptr + chunk, tl.sum(squares, 0))
    tl.store(partials_ptr + chunks + chunk, tl.max(largest, 0))


@jit
def _power(base, exponent):
    """base ** exponent in float64 by squaring; exponent int32, not negative."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@jit
def _adamw_decide_kernel(
    partials_ptr,  # [2,C] float32
    addresses_ptr,  # [ROWS,n] int64
    layout_ptr,  # [3,n] int64
    used_ptr,  # [n] uint8, or None
    counts_ptr,  # [n] int32: updates so far, written
    lr_ptr,  # [G] float64
    hyper_ptr,  # [G,4] float64: beta1, beta2, eps, weight decay
    max_norm_ptr,  # one float64, or None: no clipping
    scale_ptr,  # one number, what the gradients were multiplied with, or None
    found_ptr,  # one number, not 0 where something else found a gradient that is not finite, or None
    norm_ptr,  # float32
    nonfinite_ptr,  # int32
    actions_ptr,  # [n] int32: 0 nothing, else a sum of 1 moves, 2 reads its gradient, 4 writes its gradient
    scalars_ptr,  # [n,SCALARS] float32: gradient's factor, beta1, 1-, beta2, 1-, eps, rate, factor of sqrt(v), decay
    n,
    chunks,  # C
    IN_PLACE: tl.constexpr,
    HF: tl.constexpr,
    POLICY: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a tensor. Every program adds up the squares of all chunks, in the same order: they are few and come
    from the L2 cache, and neither atomics nor another launch are needed."""
    tensor = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, chunks, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + at, mask=at < chunks, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0))
    one = norm * 0.0 + 1.0
    factor = one
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float64)
        norm = norm / scale
    if max_norm_ptr is not None:
        factor = tl.minimum(tl.load(max_norm_ptr) / (norm + 1e-6), 1.0)
    if scale_ptr is not None:
        factor = factor / scale
    factor = factor.to(tl.float32)
    norm = norm.to(tl.float32)
    finite = norm < float("inf")
    if found_ptr is not None:
        finite = finite & (tl.load(found_ptr).to(tl.float32) == 0.0)
    if tensor == 0:
        tl.store(norm_ptr, norm)
        tl.store(nonfinite_ptr, tl.where(finite, 0, 1))

    size = tl.load(layout_ptr + tensor)
    first = tl.load(layout_ptr + n + tensor).to(tl.int32)
    last = first + tl.cdiv(size, CHUNK).to(tl.int32)
    largest = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(partials_ptr + chunks + at, mask=at < last, other=0.0))
    address = tl.load(addresses_ptr + n + tensor)
    used = address != 0
    if used_ptr is not None:
        used = tl.load(used_ptr + tensor) != 0
    count = tl.load(counts_ptr + tensor)
    moves = used
    if POLICY == "skip":
        moves = used & (tl.max(largest, 0) * factor > 0.0)
    elif POLICY == "update_all":
        moves = used | (count > 0)
    moves = finite & moves
    reads = finite & used & (address != 0)
    action = tl.where(moves, 1, 0)
    if IN_PLACE:
        writes = reads & (factor != 1.0)
        reads = reads & (moves | writes)
        action += tl.where(writes, 4, 0)
    else:
        reads = reads & moves
    action += tl.where(reads, 2, 0)
    tl.store(actions_ptr + tensor, action)

    count += tl.where(moves, 1, 0)
    tl.store(counts_ptr + tensor, count)
    group = tl.load(layout_ptr + 2 * n + tensor)
    rate = tl.load(lr_ptr + group)
    hyper_ptr += 4 * group
    beta1, beta2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    count = tl.maximum(count, 1)  # of what does not move the numbers below are not used
    correction1 = one - _power(beta1, count)
    correction2 = tl.sqrt(one - _power(beta2, count))
    scalars_ptr += SCALARS * tensor
    tl.store(scalars_ptr, factor)
    tl.store(scalars_ptr + 1, beta1.to(tl.float32))
    tl.store(scalars_ptr + 2, (1.0 - beta1).to(tl.float32))
    tl.store(scalars_ptr + 3, beta2.to(tl.float32))
    tl.store(scalars_ptr + 4, (1.0 - beta2).to(tl.float32))
    tl.store(scalars_ptr + 5, tl.load(hyper_ptr + 2).to(tl.float32))
    if HF:
        tl.store(scalars_ptr + 6, (rate * (correction2 / correction1)).to(tl.float32))
        tl.store(scalars_ptr + 7, 1.0)
    else:
        tl.store(scalars_ptr + 6, (rate / correction1).to(tl.float32))
        tl.store(scalars_ptr + 7, (1.0 / correction2).to(tl.float32))
    tl.store(scalars_ptr + 8, (rate * tl.load(hyper_ptr + 3)).to(tl.float32))


@jit
def _update(
    param_ptr, grad_ptr, first_ptr, second_ptr, copy_ptr, at, count, moves, reads, writes, copied, factor, beta1, rest1,
    beta2, rest2, eps, rate, root, decay, HF: tl.constexpr, IN_PLACE: tl.constexpr, COPY: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block, at the elements ``at``. MASKED: only those below ``count``. Else a mask is one value for the whole
    block, so that accesses stay wide."""
    if MASKED:
        inside = at < tl.where(moves != 0, count, 0)
        read = at < tl.where(reads != 0, count, 0)
    else:
        inside = tl.broadcast_to(moves != 0, at.shape)
        read = tl.broadcast_to(reads != 0, at.shape)
    grad = tl.load(grad_ptr + at, mask=read, other=0.0)
    param = tl.load(param_ptr + at, mask=inside, other=0.0)
    m = tl.load(first_ptr + at, mask=inside, other=0.0)
    v = tl.load(second_ptr + at, mask=inside, other=0.0)
    clipped = (grad.to(tl.float32) * factor).to(grad_ptr.dtype.element_ty)
    if IN_PLACE:
        if MASKED:
            written = at < tl.where(writes != 0, count, 0)
        else:
            written = tl.broadcast_to(writes != 0, at.shape)
        tl.store(grad_ptr + at, clipped, mask=written)
    grad = clipped.to(tl.float32)
    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * (grad * grad)
    if HF:
        param = param - tl.div_rn(rate * m, tl.sqrt_rn(v) + eps)
        param = param - decay * param
    else:
        param = param - decay * param
        param = param - tl.div_rn(rate * m, tl.sqrt_rn(v) * root + eps)
    tl.store(first_ptr + at, m, mask=inside)
    tl.store(second_ptr + at, v, mask=inside)
    tl.store(param_ptr + at, param, mask=inside)
    if COPY:
        if MASKED:
            kept = at < tl.where((moves & copied) != 0, count, 0)
        else:
            kept = tl.broadcast_to((moves & copied) != 0, at.shape)
        tl.store(copy_ptr + at, param.to(tl.bfloat16), mask=kept)


@jit
def _adamw_update_kernel(
    addresses_ptr,  # [ROWS,n] int64
    layout_ptr,  # [3,n] int64
    chunks_ptr,  # [2,C] int32
    actions_ptr,  # [n] int32
    scalars_ptr,  # [n,SCALARS] float32
    n,
    GRAD: tl.constexpr,
    HF: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COPY: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    tensor = tl.load(chunks_ptr + chunk)
    action = tl.load(actions_ptr + tensor)
    if action == 0:
        return
    moves, reads, writes = action & 1, action & 2, action & 4
    start = tl.load(chunks_ptr + chunks + chunk).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(layout_ptr + tensor) - start, CHUNK).to(tl.int32)
    scalars_ptr += SCALARS * tensor
    factor = tl.load(scalars_ptr)
    beta1, rest1 = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    beta2, rest2 = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4)
    eps, rate = tl.load(scalars_ptr + 5), tl.load(scalars_ptr + 6)
    root, decay = tl.load(scalars_ptr + 7), tl.load(scalars_ptr + 8)
    addresses_ptr += tensor
    param = tl.load(addresses_ptr)
    grad = tl.load(addresses_ptr + n)
    first = tl.load(addresses_ptr + 2 * n)
    second = tl.load(addresses_ptr + 3 * n)
    together = param | grad | first | second
    copy = param
    if COPY:
        copy = tl.load(addresses_ptr + 4 * n)
        together |= copy
    param_ptr = param.to(tl.pointer_type(tl.float32)) + start
    grad_ptr = grad.to(tl.pointer_type(GRAD)) + start
    first_ptr = first.to(tl.pointer_type(tl.float32)) + start
    second_ptr = second.to(tl.pointer_type(tl.float32)) + start
    copy_ptr = copy.to(tl.pointer_type(tl.bfloat16)) + start
    copied = tl.where(copy != 0, 1, 0)
    whole = tl.where(together % 16 == 0, count // BLOCK, 0)
    for block in range(whole):
        _update(
            tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16), tl.multiple_of(first_ptr, 16),
            tl.multiple_of(second_ptr, 16), tl.multiple_of(copy_ptr, 16), block * BLOCK + tl.arange(0, BLOCK), count,
            moves, reads, writes, copied, factor, beta1, rest1, beta2, rest2, eps, rate, root, decay, HF=HF,
            IN_PLACE=IN_PLACE, COPY=COPY, MASKED=False,
        )  # fmt: skip
    for block in range(whole, tl.cdiv(count, BLOCK)):
        _update(
            param_ptr, grad_ptr, first_ptr, second_ptr, copy_ptr, block * BLOCK + tl.arange(0, BLOCK), count, moves,
            reads, writes, copied, factor, beta1, rest1, beta2, rest2, eps, rate, root, decay, HF=HF, IN_PLACE=IN_PLACE,
            COPY=COPY, MASKED=True,
        )  # fmt: skip
