"""The Triton kernels of attention in tiles: forward; backward to q; backward to k and v.

One program computes a tile of BM queries (or BN keys) of one head and runs over the other side in blocks, the last of
which is a loop of its own so that the main one masks nothing. Blocks of keys, their order and dropout's decisions are
those of ``blocks``. Scores are in units of log 2: ``scale`` = log2(e) / sqrt(D). Heads are padded to DP
columns. DROP is 0 where nothing is dropped, 1 where decisions come one by one, 2 two by two.
"""

from unit_fast_kernels.attention.blocks import (
    block_keys,
    blocks_of,
    column_of_query,
    drop_pairs,
    first_key,
    keep_block,
    query_columns,
    random_words,
    random_words_t,
    real_keys,
    rows,
    select_pairs,
)
from unit_fast_kernels.shared.triton import dot, jit, tl


@jit
def _rows_of(base, row, stride, inside, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``row`` of a matrix [*,D] with row stride ``stride``, zeros outside: [len(row),DP]."""
    d = tl.arange(0, DP)
    at = (base + d)[None, :] + row.to(tl.int64)[:, None] * stride
    if MASKED:
        x = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D == DP:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return x


@jit
def _fwd_block(
    acc, top, total, q, t, count, k_ptr, v_ptr, order_ptr, seed_ptr, scale, limit, head, query,
    K_S: tl.constexpr, V_S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    first, inside, row = block_keys(t, count, order_ptr, BN, LISTED, TAIL)
    k = _rows_of(k_ptr, row, K_S, inside, D, DP, TAIL)
    v = _rows_of(v_ptr, row, V_S, inside, D, DP, TAIL)
    scores = dot(q, tl.trans(k), tl.zeros((BM, BN), tl.float32), INTERPRET)
    if TAIL:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.math.exp2(scores * scale - (new_top * scale)[:, None])
    shrink = tl.math.exp2((top - new_top) * scale)
    total = total * shrink + tl.sum(p, 1)
    if DROP == 2:
        words = random_words(head, query, first, seed_ptr, BM, BN)
        p = drop_pairs(p, words, limit, v.dtype == tl.bfloat16)
    elif DROP == 1:
        words = random_words(head, query, first, seed_ptr, BM, BN)
        p = tl.where(keep_block(words, limit, BN), p, 0.0)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRET)
    return acc, new_top, total


@jit(do_not_specialize=["heads", "queries", "keys", "limit"])
def _attention_fwd_kernel(
    q_ptr,  # [B,Sq,H,D]
    k_ptr,  # [B,Sk,H,D]
    v_ptr,  # [B,Sk,H,D]
    out_ptr,  # [B,Sq,H,D] contiguous
    lse_ptr,  # [B,H,Sq] float32
    order_ptr,  # [B,Sk] int32, with LISTED
    count_ptr,  # [B] int32, with LISTED
    seed_ptr,  # [2] int64, with DROP
    q_b, q_s, q_h, k_b, k_h, v_b, v_h,
    heads,
    queries,
    keys,
    scale,  # log2(e) / sqrt(D)
    limit,  # threshold(p)
    kept,  # keep_scale(p)
    K_S: tl.constexpr,  # row strides: products with constants save a sixth of the addresses' cost
    V_S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    LISTED: tl.constexpr,
    DROP: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0) * BM, tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    count = real_keys(count_ptr, b, keys, LISTED)
    if LISTED:
        order_ptr += b * keys
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    i = query + tl.arange(0, BM)
    q = _rows_of(q_ptr + b * q_b + h * q_h, i, q_s, i < queries, D, DP, True)
    acc = tl.zeros((BM, DP), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    full, some = blocks_of(count, BN)
    for TAIL in tl.static_range(2):
        for t in range(full * TAIL, some if TAIL else full):
            acc, top, total = _fwd_block(
                acc, top, total, q, t, count, k_ptr, v_ptr, order_ptr, seed_ptr, scale, limit, head, query,
                K_S, V_S, D, DP, BM, BN, LISTED, DROP, INTERPRET, TAIL,
            )  # fmt: skip
    # Without a key: zeros, and a logsumexp that makes every probability of the backward zero.
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    out = acc * (kept / total)[:, None]
    lse = tl.where(none, float("inf"), top * scale + tl.math.log2(total))
    d = tl.arange(0, DP)
    at = out_ptr + ((b * queries + i)[:, None] * heads + h) * D + d[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(i < queries)[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + head.to(tl.int64) * queries + i, lse, mask=i < queries)


@jit
def _dq_block(
    acc, q, grad, lse, less, t, count, k_ptr, v_ptr, order_ptr, seed_ptr, scale, limit, head, query,
    K_S: tl.constexpr, V_S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, DROP: tl.constexpr, INTERPRET: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    first, inside, row = block_keys(t, count, order_ptr, BN, LISTED, TAIL)
    k = _rows_of(k_ptr, row, K_S, inside, D, DP, TAIL)
    v = _rows_of(v_ptr, row, V_S, inside, D, DP, TAIL)
    scores = dot(q, tl.trans(k), tl.zeros((BM, BN), tl.float32), INTERPRET)
    p = tl.math.exp2(scores * scale - lse[:, None])
    if TAIL:
        p = tl.where(inside[None, :], p, 0.0)
    # The accumulator starts at -delta: where a probability was dropped its gradient is that alone.
    less = tl.broadcast_to(less[:, None], (BM, BN))
    grad_p = dot(grad, tl.trans(v), less, INTERPRET)
    if DROP == 2:
        words = random_words(head, query, first, seed_ptr, BM, BN)
        grad_s = select_pairs(p, grad_p, less, words, limit, k.dtype == tl.bfloat16)
    elif DROP == 1:
        words = random_words(head, query, first, seed_ptr, BM, BN)
        grad_s = p * tl.where(keep_block(words, limit, BN), grad_p, less)
    else:
        grad_s = p * grad_p
    return dot(grad_s.to(k.dtype), k, acc, INTERPRET)


@jit(do_not_specialize=["heads", "queries", "keys", "limit"])
def _attention_bwd_q_kernel(
    grad_ptr,  # [B,Sq,H,D]
    q_ptr,  # [B,Sq,H,D]
    k_ptr,  # [B,Sk,H,D]
    v_ptr,  # [B,Sk,H,D]
    out_ptr,  # [B,Sq,H,D]
    lse_ptr,  # [B,H,Sq] float32
    order_ptr,  # [B,Sk] int32, with LISTED
    count_ptr,  # [B] int32, with LISTED
    seed_ptr,  # [2] int64, with DROP
    grad_q_ptr,  # [B,Sq,H,D] contiguous
    stats_ptr,  # [B,H,2,padded] float32, written here for the other kernel: lse and ``less`` in its order of columns
    g_b, g_s, g_h, q_b, q_s, q_h, k_b, k_h, v_b, v_h, o_b, o_s, o_h,
    heads,
    queries,
    keys,
    padded,  # a multiple of 16
    scale,  # log2(e) / sqrt(D)
    limit,  # threshold(p)
    kept,  # keep_scale(p)
    grad_scale,  # keep_scale(p) / sqrt(D)
    K_S: tl.constexpr,
    V_S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    LISTED: tl.constexpr,
    DROP: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0) * BM, tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    count = real_keys(count_ptr, b, keys, LISTED)
    if LISTED:
        order_ptr += b * keys
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    i = query + tl.arange(0, BM)
    inside = i < queries
    grad = _rows_of(grad_ptr + b * g_b + h * g_h, i, g_s, inside, D, DP, True)
    out = _rows_of(out_ptr + b * o_b + h * o_h, i, o_s, inside, D, DP, True)
    # Everything is in units of keep_scale, which the end multiplies by.
    less = -tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) / kept
    q = _rows_of(q_ptr + b * q_b + h * q_h, i, q_s, inside, D, DP, True)
    lse = tl.load(lse_ptr + head.to(tl.int64) * queries + i, mask=inside, other=float("inf"))
    stats_ptr += head.to(tl.int64) * 2 * padded + column_of_query(i)
    tl.store(stats_ptr, lse, mask=inside)
    tl.store(stats_ptr + padded, less, mask=inside)
    acc = tl.zeros((BM, DP), tl.float32)
    full, some = blocks_of(count, BN)
    for TAIL in tl.static_range(2):
        for t in range(full * TAIL, some if TAIL else full):
            acc = _dq_block(
                acc, q, grad, lse, less, t, count, k_ptr, v_ptr, order_ptr, seed_ptr, scale, limit, head, query,
                K_S, V_S, D, DP, BM, BN, LISTED, DROP, INTERPRET, TAIL,
            )  # fmt: skip
    d = tl.arange(0, DP)
    at = grad_q_ptr + ((b * queries + i)[:, None] * heads + h) * D + d[None, :]
    tl.store(at, (acc * grad_scale).to(grad_q_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@jit
def _dkv_block(
    acc_k, acc_v, k, v, query, queries, q_ptr, grad_ptr, stats_ptr, padded, seed_ptr, scale, limit, head, first,
    Q_S: tl.constexpr, G_S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DROP: tl.constexpr, INTERPRET: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    i = query + query_columns(BM)
    inside = i < queries
    q = _rows_of(q_ptr, i, Q_S, inside, D, DP, TAIL)
    grad = _rows_of(grad_ptr, i, G_S, inside, D, DP, TAIL)
    column = query + tl.arange(0, BM)
    if TAIL:
        lse = tl.load(stats_ptr + column, mask=inside, other=float("inf"))
        less = tl.load(stats_ptr + padded + column, mask=inside, other=0.0)
    else:
        lse = tl.load(stats_ptr + column)
        less = tl.load(stats_ptr + padded + column)
    # Transposed, so that the products below take P and its gradient from registers. Rows beyond the real keys hold
    # nonsense, which stays in them and is not stored.
    scores = dot(k, tl.trans(q), tl.zeros((BN, BM), tl.float32), INTERPRET)
    p = tl.math.exp2(scores * scale - lse[None, :])
    less = tl.broadcast_to(less[None, :], (BN, BM))
    grad_p = dot(v, tl.trans(grad), less, INTERPRET)
    dropped = p
    if DROP == 2:
        words = random_words_t(head, query, first, seed_ptr, BM, BN, DROP)
        dropped = drop_pairs(p, words, limit, k.dtype == tl.bfloat16)
        grad_s = select_pairs(p, grad_p, less, words, limit, k.dtype == tl.bfloat16)
    elif DROP == 1:
        keep = keep_block(random_words_t(head, query, first, seed_ptr, BM, BN, DROP), limit, BM)
        dropped = tl.where(keep, p, 0.0)
        grad_s = p * tl.where(keep, grad_p, less)
    else:
        grad_s = p * grad_p
    acc_v = dot(dropped.to(k.dtype), grad, acc_v, INTERPRET)
    acc_k = dot(grad_s.to(k.dtype), q, acc_k, INTERPRET)
    return acc_k, acc_v


@jit(do_not_specialize=["heads", "queries", "keys", "limit"])
def _attention_bwd_kv_kernel(
    grad_ptr,  # [B,Sq,H,D]
    q_ptr,  # [B,Sq,H,D]
    k_ptr,  # [B,Sk,H,D]
    v_ptr,  # [B,Sk,H,D]
    stats_ptr,  # [B,H,2,padded] float32
    order_ptr,  # [B,Sk] int32, with LISTED
    count_ptr,  # [B] int32, with LISTED
    seed_ptr,  # [2] int64, with DROP
    grad_k_ptr,  # [B,Sk,H,D] contiguous
    grad_v_ptr,  # [B,Sk,H,D] contiguous
    g_b, g_h, q_b, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    heads,
    queries,
    keys,
    padded,  # a multiple of 16
    scale,  # log2(e) / sqrt(D)
    limit,  # threshold(p)
    kept,  # keep_scale(p)
    grad_scale,  # keep_scale(p) / sqrt(D)
    Q_S: tl.constexpr,
    G_S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    LISTED: tl.constexpr,
    DROP: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    first, head = first_key(tl.program_id(0), BN), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    j = first + rows(BN)
    row = j
    if LISTED:
        row = tl.load(order_ptr + b * keys + j, mask=j < keys, other=0)
    count = real_keys(count_ptr, b, keys, LISTED)
    real = j < count
    k = _rows_of(k_ptr + b * k_b + h * k_h, row, k_s, real, D, DP, True)
    v = _rows_of(v_ptr + b * v_b + h * v_h, row, v_s, real, D, DP, True)
    grad_ptr += b * g_b + h * g_h
    q_ptr += b * q_b + h * q_h
    stats_ptr += head.to(tl.int64) * 2 * padded
    acc_k, acc_v = tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DP), tl.float32)
    wanted = tl.where(first < count, queries, 0)
    full = wanted // BM * BM
    for TAIL in tl.static_range(2):
        for query in range(full * TAIL, wanted if TAIL else full, BM):
            acc_k, acc_v = _dkv_block(
                acc_k, acc_v, k, v, query, queries, q_ptr, grad_ptr, stats_ptr, padded, seed_ptr, scale, limit,
                head, first, Q_S, G_S, D, DP, BM, BN, DROP, INTERPRET, TAIL,
            )  # fmt: skip
    d = tl.arange(0, DP)
    at = ((b * keys + row)[:, None] * heads + h) * D + d[None, :]
    mask = (j < keys)[:, None] & (d < D)[None, :]
    grad_k = tl.where(real[:, None], acc_k * grad_scale, 0.0)
    grad_v = tl.where(real[:, None], acc_v * kept, 0.0)
    tl.store(grad_k_ptr + at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
