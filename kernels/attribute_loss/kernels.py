"""The Triton kernels of ``attribute_loss``: rows are the objects of one image in one layer, R of them a block.

A row's factor depends on the matching and on which slots are filled alone; forward and backward compute it alike. The
attributes come in blocks of BLOCK columns, with the log-sum-exp carried from one to the next. Everything is float32. A
program of the forward adds the objects of one block, the last of a layer's programs what all of them left, in a fixed
order; the backward has a program for every block and writes every element. MB is the power of two not below the SLOTS,
NB how many objects are counted at a time.
"""

from unit_fast_kernels.shared.ticket import is_last
from unit_fast_kernels.shared.triton import jit, tl

SUM_BLOCKS = 256
"""Partial sums that the last program of a layer loads at a time."""


@jit
def _valid_slots(attributes_ptr, query_ptr, row, rows, SLOTS: tl.constexpr, MB: tl.constexpr):
    """(attributes [len(row),MB], which slots count) of the objects ``row`` of ``rows``."""
    slot = tl.arange(0, MB)
    mask = (row < rows)[:, None] & (slot < SLOTS)[None, :]
    found = tl.load(attributes_ptr + row.to(tl.int64)[:, None] * SLOTS + slot[None, :], mask=mask, other=-1)
    query = tl.load(query_ptr + row, mask=row < rows, other=-1)
    return found, mask & (found >= 0) & (query >= 0)[:, None]


@jit
def _counted(attributes_ptr, query_ptr, rows, NB: tl.constexpr, SLOTS: tl.constexpr, MB: tl.constexpr):
    """float32: how many of the ``rows`` objects have attributes and a query."""
    total = tl.zeros([NB], tl.float32)
    for start in range(0, rows, NB):
        _, valid = _valid_slots(attributes_ptr, query_ptr, start + tl.arange(0, NB), rows, SLOTS, MB)
        total += tl.max(valid.to(tl.float32), 1)
    return tl.sum(total, 0)


@jit
def _number(
    attributes_ptr, query_ptr, layer, of_image, images, objects,
    NB: tl.constexpr, SLOTS: tl.constexpr, MB: tl.constexpr, PER_PROCESS: tl.constexpr,
):  # fmt: skip
    """float32: what the sum over the objects of an image, ``of_image`` of all layers' images, is divided by."""
    first = layer * images
    if PER_PROCESS:
        counted = _counted(attributes_ptr, query_ptr + first * objects, images * objects, NB, SLOTS, MB)
        return tl.maximum(counted, 1.0)
    else:
        attributes_ptr += (of_image - first) * objects * SLOTS
        return (
            tl.maximum(_counted(attributes_ptr, query_ptr + of_image * objects, objects, NB, SLOTS, MB), 1.0) * images
        )


@jit
def _attribute_loss_fwd_kernel(
    logits_ptr,  # [L,B,N,A]
    query_ptr,  # int64 [L,B,N]
    attributes_ptr,  # int64 [B,N,M]
    lse_ptr,  # [L,B,N] float32
    partials_ptr,  # [L,B,S] float32: the sum of each block of objects
    counters_ptr,  # int32 [L], 0
    loss_ptr,  # [L] float32
    images,  # B
    objects,  # N
    factor,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    MB: tl.constexpr,
    NB: tl.constexpr,
    PER_PROCESS: tl.constexpr,
    SB: tl.constexpr,
):
    layer, image = tl.program_id(2).to(tl.int64), tl.program_id(1)
    programs = images * tl.num_programs(0)
    of_image = layer * images + image
    number = _number(attributes_ptr, query_ptr, layer, of_image, images, objects, NB, SLOTS, MB, PER_PROCESS)
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < objects
    at = of_image * objects + row
    top = tl.full([R], -3.0e38, tl.float32)
    total = tl.zeros([R], tl.float32)
    for first in range(0, A, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < A)[None, :]
        x = tl.load(logits_ptr + at[:, None] * A + column[None, :], mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        above = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above[:, None]), 1)
        top = above
    lse = top + tl.log(tl.where(inside, total, 1.0))
    tl.store(lse_ptr + at, lse, mask=inside)
    slots_ptr = attributes_ptr + (of_image - layer * images) * objects * SLOTS
    slots, valid = _valid_slots(slots_ptr, query_ptr + of_image * objects, row, objects, SLOTS, MB)
    # An attribute that does not exist gives NaN, not another one's loss.
    z = tl.load(logits_ptr + at[:, None] * A + slots, mask=valid & (slots < A), other=float("nan"))
    ce = tl.sum(tl.where(valid, lse[:, None] - z.to(tl.float32), 0.0), 1)
    k = tl.sum(valid.to(tl.float32), 1)
    loss = tl.sum(ce / tl.maximum(k, 1.0) / number, 0)
    partials_ptr += layer * programs
    tl.store(partials_ptr + image * tl.num_programs(0) + tl.program_id(0), loss)
    if is_last(counters_ptr + layer, programs):
        # In an order that only the sizes decide.
        of_layer = tl.zeros([SB], tl.float32)
        for start in range(0, programs, SB):
            block = start + tl.arange(0, SB)
            of_layer += tl.load(partials_ptr + block, mask=block < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr + layer, tl.sum(of_layer, 0) * factor)


@jit
def _attribute_loss_bwd_kernel(
    by_loss_ptr,  # [L] float32
    logits_ptr,  # [L,B,N,A]
    query_ptr,  # int64 [L,B,N]
    attributes_ptr,  # int64 [B,N,M]
    lse_ptr,  # [L,B,N] float32
    dlogits_ptr,  # [L,B,N,A]
    images,  # B
    objects,  # N
    factor,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    MB: tl.constexpr,
    NB: tl.constexpr,
    PER_PROCESS: tl.constexpr,
):
    layer, image = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < objects
    of_image = layer * images + image
    at = of_image * objects + row
    number = _number(attributes_ptr, query_ptr, layer, of_image, images, objects, NB, SLOTS, MB, PER_PROCESS)
    slots_ptr = attributes_ptr + (of_image - layer * images) * objects * SLOTS
    slots, valid = _valid_slots(slots_ptr, query_ptr + of_image * objects, row, objects, SLOTS, MB)
    k = tl.sum(valid.to(tl.float32), 1)
    each = factor * tl.load(by_loss_ptr + layer) / tl.maximum(k, 1.0) / number
    each = tl.where(tl.max((valid & (slots >= A)).to(tl.int32), 1) > 0, float("nan"), each)
    matched = tl.load(query_ptr + at, mask=inside, other=-1) >= 0
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    for first in range(0, A, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < A)[None, :]
        offset = at[:, None] * A + column[None, :]
        x = tl.load(logits_ptr + offset, mask=mask & (k > 0)[:, None], other=0.0).to(tl.float32)
        hits = tl.zeros([R, BLOCK], tl.float32)
        for slot in range(SLOTS):
            attribute = tl.load(slots_ptr + row.to(tl.int64) * SLOTS + slot, mask=inside & matched, other=-1)
            hits += (attribute[:, None] == column[None, :]).to(tl.float32)
        grad = tl.where((k > 0)[:, None], each[:, None] * (k[:, None] * tl.exp(x - lse[:, None]) - hits), 0.0)
        tl.store(dlogits_ptr + offset, grad.to(dlogits_ptr.dtype.element_ty), mask=mask)
