"""The Triton kernels of attention with split keys: forward, backward, and the joining of the splits.

A program takes one (b, h), all queries (one tile of BM) and one share of the blocks of keys. Blocks, the list of real
keys and dropout's decisions are those of ``blocks``; blocks without a real key are not visited. The head is
one part of DA columns, or two of DA + DB (96 = 64 + 32, where 128 would compute 32 columns of zeros). Scores are in
units of log 2: ``scale`` = log2(e) / sqrt(D). DROP: 0 nothing, 1 by selects, 2 two at a time.
"""

from unit_fast_kernels.attention.blocks import block_keys, blocks_of, drop_pairs, keep_block, random_words, real_keys
from unit_fast_kernels.shared.triton import dot, jit, tl


@jit
def _share(split, splits, count, BN: tl.constexpr):
    """Blocks of a split: (first, the end of those whose keys are all real, the end)."""
    full, all_blocks = blocks_of(count, BN)
    first, end = split * all_blocks // splits, (split + 1) * all_blocks // splits
    return first, tl.maximum(first, tl.minimum(full, end)), end


@jit
def _part(rows_ptr, column, inside, D: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """[R,C] from rows_ptr [R] at the columns [C] of a head of D; rows not ``inside`` and columns past D are zero."""
    pointers = rows_ptr[:, None] + column[None, :]
    if EXACT and not MASKED:
        return tl.load(pointers)
    elif EXACT:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)


# --- Forward ----------------------------------------------------------------------------------------------------------


@jit
def _fwd_block(
    q_a, q_b, out_a, out_b, top, total,  # [BM,DA], [BM,DB], fp32 accumulators, running maximum and sum [BM]
    k_ptr, v_ptr, order_ptr, seed_ptr,
    k_sn, v_sn, bh, block, count, scale, limit,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, TAIL: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the running softmax."""
    start, real, at = block_keys(block, count, order_ptr, BN, LISTED, TAIL)
    at = at.to(tl.int64)
    column_a = tl.arange(0, DA)
    k_a = _part(k_ptr + at * k_sn, column_a, real, D, D >= DA, TAIL)
    s = dot(q_a, tl.trans(k_a), tl.zeros((BM, BN), tl.float32), INTERPRET)
    if DB:
        column_b = DA + tl.arange(0, DB)
        k_b = _part(k_ptr + at * k_sn, column_b, real, D, D == DA + DB, TAIL)
        s = dot(q_b, tl.trans(k_b), s, INTERPRET)
    if TAIL:
        s = tl.where(real[None, :], s, float("-inf"))
    # Every visited block has a real key, and all queries see the same keys: the maximum is finite.
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, 1)
    v_a = _part(v_ptr + at * v_sn, column_a, real, D, D >= DA, TAIL)
    if DROP:
        words = random_words(bh, 0, start, seed_ptr, BM, BN)
        if DROP == 2:
            w = drop_pairs(p, words, limit, v_a.dtype == tl.bfloat16)
        else:
            w = tl.where(keep_block(words, limit, BN), p, 0.0).to(v_a.dtype)
    else:
        w = p.to(v_a.dtype)
    out_a = dot(w, v_a, out_a * fade[:, None], INTERPRET)
    if DB:
        v_b = _part(v_ptr + at * v_sn, column_b, real, D, D == DA + DB, TAIL)
        out_b = dot(w, v_b, out_b * fade[:, None], INTERPRET)
    return out_a, out_b, new_top, total


@jit
def _cross_attention_fwd_kernel(
    q_ptr,  # [B,Q,H,D] by strides
    k_ptr,  # [B,Sk,H,D] by strides
    v_ptr,  # [B,Sk,H,D] by strides
    order_ptr,  # [B,Sk] int32 or None
    count_ptr,  # [B] int32 or None
    seed_ptr,  # [2] int64 or None
    out_ptr,  # [splits,B,Q,H,D]
    lse_ptr,  # [splits,B,H,Q] fp32, base 2
    q_sb, q_sq, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    batch, queries, keys, heads, splits, scale, keep_scale, limit,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys of one split: its output and its logsumexp (-inf where it has no real key)."""
    bh, split = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    m = tl.arange(0, BM)
    inside = m < queries
    column_a = tl.arange(0, DA)
    q_rows = q_ptr + b * q_sb + h * q_sh + m.to(tl.int64) * q_sq
    q_a = _part(q_rows, column_a, inside, D, D >= DA, True)
    out_a = tl.zeros((BM, DA), tl.float32)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    if DB:
        column_b = DA + tl.arange(0, DB)
        q_b = _part(q_rows, column_b, inside, D, D == DA + DB, True)
        out_b = tl.zeros((BM, DB), tl.float32)
    else:  # no second part: something to pass on
        q_b, out_b = q_a, top
    k_ptr += b * k_sb + h * k_sh
    v_ptr += b * v_sb + h * v_sh
    count = real_keys(count_ptr, b, keys, LISTED)
    if LISTED:
        order_ptr += b * keys
    first, full_end, end = _share(split, splits, count, BN)
    for TAIL in tl.static_range(2):
        for block in range(full_end if TAIL else first, end if TAIL else full_end):
            out_a, out_b, top, total = _fwd_block(
                q_a, q_b, out_a, out_b, top, total, k_ptr, v_ptr, order_ptr, seed_ptr, k_sn, v_sn, bh, block, count,
                scale, limit, D, DA, DB, BM, BN, LISTED, TAIL, DROP, INTERPRET,
            )  # fmt: skip
    # Without a real key the sum, and so the output, is zero.
    some = tl.where(total == 0.0, 1.0, total)
    norm = (keep_scale / some)[:, None]
    row = (split * batch + b) * queries
    out_rows = out_ptr + ((row + m) * heads + h) * D
    tl.store(out_rows[:, None] + column_a[None, :], out_a * norm, mask=inside[:, None] & (column_a < D)[None, :])
    if DB:
        tl.store(out_rows[:, None] + column_b[None, :], out_b * norm, mask=inside[:, None] & (column_b < D)[None, :])
    # As a whole such a row has the logsumexp +inf, so that 2^(score - lse) is zero; as a part it has no weight.
    nothing = tl.where(splits == 1, float("inf"), float("-inf"))
    lse = tl.where(total == 0.0, nothing, top + tl.log2(some))
    tl.store(lse_ptr + row * heads + h * queries + m, lse, mask=inside)


# --- Joining the splits -----------------------------------------------------------------------------------------------


@jit
def _cross_attention_join_kernel(
    part_ptr,  # [splits,B,Q,H,D]
    part_lse_ptr,  # [splits,B,H,Q] fp32, or None: the parts are added up
    out_ptr,  # [B,Q,H,D]
    lse_ptr,  # [B,H,Q] fp32 or None
    queries, heads, splits,
    D: tl.constexpr, D_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One row of one head: the parts, each with the share 2^(its lse - the common one), in the order of the splits."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    s, d = tl.arange(0, S_BLOCK), tl.arange(0, D_BLOCK)
    inside = s < splits
    pointers = part_ptr + ((s[:, None] * rows + row) * heads + h) * D + d[None, :]
    part = tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if WEIGHTED:
        line = (row // queries * heads + h) * queries + row % queries
        lse = tl.load(part_lse_ptr + s * (rows * heads) + line, mask=inside, other=float("-inf"))
        top = tl.max(lse, 0)
        share = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(share, 0)
        total = tl.where(total == 0.0, 1.0, total)
        part *= (share / total)[:, None]
        tl.store(lse_ptr + line, tl.where(top == float("-inf"), float("inf"), top + tl.log2(total)))
    tl.store(out_ptr + (row * heads + h) * D + d, tl.sum(part, 0), mask=d < D)


# --- Backward ---------------------------------------------------------------------------------------------------------


@jit
def _bwd_block(
    q_a, q_b, grad_a, grad_b, dq_a, dq_b,  # [BM,DA], [BM,DB] twice, fp32 accumulators
    lse, delta,  # [BM] of base 2, without the keep scale
    k_ptr, v_ptr, dk_ptr, dv_ptr, order_ptr, seed_ptr,
    k_sn, v_sn, g_n, bh, block, count, scale, softmax_scale, limit,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, TAIL: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys are written; that of the queries grows."""
    start, real, at = block_keys(block, count, order_ptr, BN, LISTED, TAIL)
    at = at.to(tl.int64)
    column_a = tl.arange(0, DA)
    k_a = _part(k_ptr + at * k_sn, column_a, real, D, D >= DA, TAIL)
    v_a = _part(v_ptr + at * v_sn, column_a, real, D, D >= DA, TAIL)
    s = dot(q_a, tl.trans(k_a), tl.zeros((BM, BN), tl.float32), INTERPRET)
    dp = dot(grad_a, tl.trans(v_a), tl.zeros((BM, BN), tl.float32), INTERPRET)
    if DB:
        column_b = DA + tl.arange(0, DB)
        k_b = _part(k_ptr + at * k_sn, column_b, real, D, D == DA + DB, TAIL)
        v_b = _part(v_ptr + at * v_sn, column_b, real, D, D == DA + DB, TAIL)
        s = dot(q_b, tl.trans(k_b), s, INTERPRET)
        dp = dot(grad_b, tl.trans(v_b), dp, INTERPRET)
    p = tl.exp2(s * scale - lse[:, None])
    if TAIL:
        p = tl.where(real[None, :], p, 0.0)
    w = p
    if DROP:
        w = tl.where(keep_block(random_words(bh, 0, start, seed_ptr, BM, BN), limit, BN), p, 0.0)
    ds = (w * dp - p * delta[:, None]).to(q_a.dtype)
    w_t, ds_t = tl.trans(w.to(q_a.dtype)), tl.trans(ds)
    out = at[:, None] * g_n
    written = real[:, None] & (column_a < D)[None, :]
    dv_a = dot(w_t, grad_a, tl.zeros((BN, DA), tl.float32), INTERPRET)
    tl.store(dv_ptr + out + column_a[None, :], dv_a, mask=written)
    dk_a = dot(ds_t, q_a, tl.zeros((BN, DA), tl.float32), INTERPRET)
    tl.store(dk_ptr + out + column_a[None, :], dk_a * softmax_scale, mask=written)
    dq_a = dot(ds, k_a, dq_a, INTERPRET)
    if DB:
        written = real[:, None] & (column_b < D)[None, :]
        dv_b = dot(w_t, grad_b, tl.zeros((BN, DB), tl.float32), INTERPRET)
        tl.store(dv_ptr + out + column_b[None, :], dv_b, mask=written)
        dk_b = dot(ds_t, q_b, tl.zeros((BN, DB), tl.float32), INTERPRET)
        tl.store(dk_ptr + out + column_b[None, :], dk_b * softmax_scale, mask=written)
        dq_b = dot(ds, k_b, dq_b, INTERPRET)
    return dq_a, dq_b


@jit
def _cross_attention_bwd_kernel(
    grad_ptr,  # [B,Q,H,D] by strides
    q_ptr,  # [B,Q,H,D] by strides
    k_ptr,  # [B,Sk,H,D] by strides
    v_ptr,  # [B,Sk,H,D] by strides
    out_ptr,  # [B,Q,H,D] by strides
    lse_ptr,  # [B,H,Q] fp32, base 2
    order_ptr,  # [B,Sk] int32 or None
    count_ptr,  # [B] int32 or None
    seed_ptr,  # [2] int64 or None
    dq_ptr,  # [splits,B,Q,H,D]
    dk_ptr,  # [B,Sk,H,D]
    dv_ptr,  # [B,Sk,H,D]
    grad_sb, grad_sq, grad_sh, q_sb, q_sq, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh,
    out_sb, out_sq, out_sh, batch, queries, keys, heads, splits, scale, softmax_scale, keep_scale, limit,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys of one split, and its part of dq. 1 / (1 - p) sits in the probabilities' exponent."""
    bh, split = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    m = tl.arange(0, BM)
    inside = m < queries
    column_a = tl.arange(0, DA)
    q_rows = q_ptr + b * q_sb + h * q_sh + m.to(tl.int64) * q_sq
    grad_rows = grad_ptr + b * grad_sb + h * grad_sh + m.to(tl.int64) * grad_sq
    out_rows = out_ptr + b * out_sb + h * out_sh + m.to(tl.int64) * out_sq
    q_a = _part(q_rows, column_a, inside, D, D >= DA, True)
    grad_a = _part(grad_rows, column_a, inside, D, D >= DA, True)
    out_a = _part(out_rows, column_a, inside, D, D >= DA, True)
    delta = tl.sum(grad_a.to(tl.float32) * out_a.to(tl.float32), 1)
    dq_a = tl.zeros((BM, DA), tl.float32)
    if DB:
        column_b = DA + tl.arange(0, DB)
        q_b = _part(q_rows, column_b, inside, D, D == DA + DB, True)
        grad_b = _part(grad_rows, column_b, inside, D, D == DA + DB, True)
        out_b = _part(out_rows, column_b, inside, D, D == DA + DB, True)
        delta += tl.sum(grad_b.to(tl.float32) * out_b.to(tl.float32), 1)
        dq_b = tl.zeros((BM, DB), tl.float32)
    else:
        q_b, grad_b, dq_b = q_a, grad_a, delta
    lse = tl.load(lse_ptr + (b * heads + h) * queries + m, mask=inside, other=float("inf"))
    if DROP:
        lse -= tl.log2(keep_scale)
        delta /= keep_scale
    k_ptr += b * k_sb + h * k_sh
    v_ptr += b * v_sb + h * v_sh
    dk_ptr += (b * keys * heads + h) * D
    dv_ptr += (b * keys * heads + h) * D
    count = real_keys(count_ptr, b, keys, LISTED)
    if LISTED:
        order_ptr += b * keys
    first, full_end, end = _share(split, splits, count, BN)
    for TAIL in tl.static_range(2):
        for block in range(full_end if TAIL else first, end if TAIL else full_end):
            dq_a, dq_b = _bwd_block(
                q_a, q_b, grad_a, grad_b, dq_a, dq_b, lse, delta, k_ptr, v_ptr, dk_ptr, dv_ptr, order_ptr, seed_ptr,
                k_sn, v_sn, heads * D, bh, block, count, scale, softmax_scale, limit, D, DA, DB, BM, BN,
                LISTED, TAIL, DROP, INTERPRET,
            )  # fmt: skip
    if LISTED:  # padded keys, in turns: their gradients are zero
        D_ALL: tl.constexpr = 2 * DA if DB else DA
        d = tl.arange(0, D_ALL)
        for start in range(count + split * BN, keys, splits * BN):
            j = start + tl.arange(0, BN)
            at = tl.load(order_ptr + j, mask=j < keys, other=0).to(tl.int64)
            to = at[:, None] * (heads * D) + d[None, :]
            zero = tl.zeros((BN, D_ALL), tl.float32)
            tl.store(dk_ptr + to, zero, mask=(j < keys)[:, None] & (d < D)[None, :])
            tl.store(dv_ptr + to, zero, mask=(j < keys)[:, None] & (d < D)[None, :])
    row = (split * batch + b) * queries
    dq_rows = dq_ptr + ((row + m) * heads + h) * D
    written = inside[:, None] & (column_a < D)[None, :]
    tl.store(dq_rows[:, None] + column_a[None, :], dq_a * softmax_scale, mask=written)
    if DB:
        written = inside[:, None] & (column_b < D)[None, :]
        tl.store(dq_rows[:, None] + column_b[None, :], dq_b * softmax_scale, mask=written)
