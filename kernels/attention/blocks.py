"""What the attention kernels share: which probabilities are dropped, and the list of real keys.

Decisions. Key j of batch entry b is its j-th *real* key (``key_list``: real keys first, in order, then padded ones), so
that kernels run over the real keys alone. The decision of (bh = b H + h, query i, key j) is number s of Philox call
(c, lane) of ``philox``, whatever the block sizes:

    c = 32 (j // 128) + 8 (j // 16 % 4) + j % 8,   lane = 2^16 bh + 8 (i // 16) + i % 8,
    s = 4 (i // 8 % 2) + 2 (j // 8 % 2) + j // 64 % 2

so the eight numbers of a call serve {i, i + 8} x {j, j + 8} x {j, j + 64}, which tensor-core layouts give to one thread
in both forms of the product (q k^T and k q^T). A probability is dropped where (0xFC00 - number) mod 2^16 is below
``threshold(p)`` of ``random``. Read as float16 these numbers are the ones below a limit near -infinity, so that one
packed instruction (``drop_pairs``) decides on two; NaN patterns compare as kept.

Blocks. A block of BN in {32, 64, 128} keys holds two runs of BN/2 keys that are 64 apart, so that whole calls fall into
it: ``first_key(t, BN)`` starts block t, ``columns`` and ``rows`` give the keys' offsets as columns (pairs 64 apart are
neighbours) and as rows. Limits: ``dropout_unfit``.
"""

import torch
from torch import Tensor
from unit_fast_kernels.shared.philox import numbers, philox
from unit_fast_kernels.shared.random import threshold
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.triton import cdiv, jit, power_of_two, tl

RUN = 128
"""Keys whose decisions share calls; every block of keys lies within one run."""
MOST_QUERIES, MOST_HEADS = 1 << 17, 65535


def attention_keep(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    p: float,
    seed: Tensor,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """bool [B,H,Sq,Sk]: what the kernels keep; ``key_padding_mask`` [B,Sk] where they got one."""
    i, j = torch.arange(queries, device=seed.device), torch.arange(keys, device=seed.device)
    head = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    call = (j >> 7) * 32 + ((j >> 4) & 3) * 8 + (j & 7)
    lane = (head << 16) + (i[:, None] >> 4) * 8 + (i[:, None] & 7)
    slot = ((i[:, None] >> 3) & 1) * 4 + ((j >> 3) & 1) * 2 + ((j >> 6) & 1)
    drawn = numbers(call, lane, seed).gather(-1, slot.expand(batch, heads, queries, keys)[..., None])[..., 0]
    keep = ((0xFC00 - drawn) & 0xFFFF) >= threshold(p)
    if key_padding_mask is None:
        return keep
    order, _ = key_list_reference(key_padding_mask)
    place = order.long()[:, None, None, :].expand(keep.shape)
    return torch.empty_like(keep).scatter_(-1, place, keep)


# --- The list of real keys ------------------------------------------------------------------------------------------


@jit
def _key_list_kernel(mask_ptr, order_ptr, count_ptr, mask_b, mask_s, keys, BLOCK: tl.constexpr):
    """One batch entry: mask [B,Sk] uint8 -> order [B,Sk], count [B]. Padded keys fill the list from its end."""
    b = tl.program_id(0).to(tl.int64)
    real_before = 0
    for start in range(0, keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        inside = key < keys
        padded = tl.load(mask_ptr + b * mask_b + key.to(tl.int64) * mask_s, mask=inside, other=1) != 0
        real = tl.where(padded, 0, 1)
        rank = real_before + tl.cumsum(real, 0) - real
        place = tl.where(padded, keys - 1 - (key - rank), rank)
        tl.store(order_ptr + b * keys + place, key, mask=inside)
        real_before += tl.sum(real, 0)
    tl.store(count_ptr + b, real_before)


def _key_list_launch(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, keys = mask.shape
    order, count = _key_list_fake(mask)
    if batch == 0 or keys == 0:
        return order, count.zero_()
    block = min(4096, power_of_two(keys))
    _key_list_kernel[(batch,)](mask.view(torch.uint8), order, count, *mask.stride(), keys, BLOCK=block, num_warps=4)
    return order, count


def key_list_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    keys = mask.shape[1]
    rank = (~mask).cumsum(1) - (~mask).long()
    key = torch.arange(keys, device=mask.device).expand(mask.shape)
    place = torch.where(mask, keys - 1 - (key - rank), rank)
    order = torch.empty(mask.shape, dtype=torch.int32, device=mask.device).scatter_(1, place, key.to(torch.int32))
    return order, (~mask).sum(1, dtype=torch.int32)


def _key_list_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(mask.shape[:1], dtype=torch.int32)


key_list = register(
    "attention_key_list",
    "(Tensor mask) -> (Tensor, Tensor)",
    reference=key_list_reference,
    launch=_key_list_launch,
    fake=_key_list_fake,
)
"""key_padding_mask [B,Sk] bool -> (order int32 [B,Sk]: real keys first and in order, then the padded ones; count int32
[B]: how many are real). One launch, no host read; B programs that read B Sk bytes and write 4 B Sk."""


# --- Blocks of keys -------------------------------------------------------------------------------------------------


@jit
def first_key(t, BN: tl.constexpr):
    """First key of block t."""
    return (t * BN // 128) * 128 + (t * (BN // 2)) % 64


@jit
def columns(BN: tl.constexpr):
    """Offsets from ``first_key`` of a block's keys as columns: neighbours are 64 apart."""
    n = tl.arange(0, BN)
    return (n >> 1) + (n & 1) * 64


@jit
def rows(BN: tl.constexpr):
    """Offsets from ``first_key`` of a block's keys as rows: two runs."""
    n = tl.arange(0, BN)
    return n % (BN // 2) + (n // (BN // 2)) * 64


@jit
def query_columns(BM: tl.constexpr):
    """Offsets of a block's queries as columns: neighbours are 8 apart."""
    m = tl.arange(0, BM)
    return (m // 16) * 16 + (m % 16) // 2 + (m % 2) * 8


@jit
def column_of_query(i):
    """Where ``query_columns`` puts query i."""
    return (i // 16) * 16 + (i % 8) * 2 + i % 16 // 8


@jit
def blocks_of(count, BN: tl.constexpr):
    """(number of blocks whose keys are all real, number of blocks with a real key)."""
    full = (count // 128) * (128 // BN)
    return full, full + tl.minimum(tl.cdiv(count % 128, BN // 2), 128 // BN)


@jit
def real_keys(count_ptr, b, keys, LISTED: tl.constexpr):
    """How many keys of batch entry b are real."""
    if LISTED:
        count = tl.load(count_ptr + b)
    else:
        count = keys
    return count


@jit
def block_keys(t, count, order_ptr, BN: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr):
    """Block t as columns: (first key, which are real, their rows in k and v). ``order_ptr`` is that of the batch entry;
    only blocks with TAIL may have keys that are not real."""
    first = first_key(t, BN)
    key = first + columns(BN)
    inside = key < count
    row = key
    if LISTED:
        if TAIL:
            row = tl.load(order_ptr + key, mask=inside, other=0)
        else:
            row = tl.load(order_ptr + key)
    return first, inside, row


# --- Dropout inside a block -----------------------------------------------------------------------------------------


@jit
def random_words(head, query, key, seed_ptr, BM: tl.constexpr, BN: tl.constexpr):
    """uint32 [BM,BN], queries x ``columns``: the word whose low half decides on even columns and whose high half on odd
    ones. ``query`` is a multiple of 16, ``key`` a ``first_key``."""
    call = (key >> 7) * 32 + ((key >> 4) & 3) * 8 + tl.arange(0, BN // 4)
    lane = (head << 16) + (query >> 1) + tl.arange(0, BM // 2)
    w0, w1, w2, w3 = philox(call[None, :], lane[:, None], seed_ptr)
    w0 = w0.reshape(BM // 16, 1, 8, BN // 32, 1, 8, 1)
    w1 = w1.reshape(BM // 16, 1, 8, BN // 32, 1, 8, 1)
    w2 = w2.reshape(BM // 16, 1, 8, BN // 32, 1, 8, 1)
    w3 = w3.reshape(BM // 16, 1, 8, BN // 32, 1, 8, 1)
    # Which word is a matter of the place alone: in tensor-core layouts these selects fold away (a join would not).
    first = tl.arange(0, 2) == 0
    i8, j8 = first[None, :, None, None, None, None, None], first[None, None, None, None, :, None, None]
    words = tl.where(i8, tl.where(j8, w0, w1), tl.where(j8, w2, w3))
    return words.broadcast_to(BM // 16, 2, 8, BN // 32, 2, 8, 2).reshape(BM, BN)


@jit
def random_words_t(head, query, key, seed_ptr, BM: tl.constexpr, BN: tl.constexpr, DROP: tl.constexpr):
    """uint32 [BN,BM], ``rows`` x ``query_columns``: as ``random_words``, for the transposed form. DROP 2: compiled."""
    call = (key >> 7) * 32 + ((key >> 4) & 3) * 8 + tl.arange(0, BN // 4)
    lane = (head << 16) + (query >> 1) + tl.arange(0, BM // 2)
    w0, w1, w2, w3 = philox(call[:, None], lane[None, :], seed_ptr)
    # Neighbouring columns are queries 8 apart, whose numbers are halves of different words: put them into one.
    low_even, high_even = _halves(w0, w2, DROP)
    low_odd, high_odd = _halves(w1, w3, DROP)
    low_even = low_even.reshape(1, BN // 32, 1, 8, BM // 2, 1)
    low_odd = low_odd.reshape(1, BN // 32, 1, 8, BM // 2, 1)
    high_even = high_even.reshape(1, BN // 32, 1, 8, BM // 2, 1)
    high_odd = high_odd.reshape(1, BN // 32, 1, 8, BM // 2, 1)
    first = tl.arange(0, 2) == 0
    j64, j8 = first[:, None, None, None, None, None], first[None, None, :, None, None, None]
    words = tl.where(j64, tl.where(j8, low_even, low_odd), tl.where(j8, high_even, high_odd))
    return words.broadcast_to(2, BN // 32, 2, 8, BM // 2, 2).reshape(BN, BM)


@jit
def _halves(a, b, DROP: tl.constexpr):
    """(the low halves of a and b in one word, their high halves)."""
    if DROP == 2:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=r,r,r", [a, b], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = (a & 0xFFFF) | (b << 16), (a >> 16) | (b & 0xFFFF0000)
    return low, high


@jit
def keep_block(words, limit, BN: tl.constexpr):
    """bool [BM,BN] from ``random_words``; ``limit`` is ``threshold(p)``."""
    low = tl.arange(0, BN)[None, :] % 2 == 0
    number = tl.where(low, 0xFC000000 - (words << 16), 0xFC00FFFF - words)
    return number >= (limit.to(tl.uint32) << 16)


@jit
def drop_pairs(p, words, limit, BF16: tl.constexpr):
    """``where(keep_block(words, limit), p, 0)`` in bf16 or fp16, p fp32; for limit <= 0x7C00, compiled code only."""
    bits = (0xFC00 - limit) * 0x10001
    if BF16:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 m, t; set.geu.u32.f16x2 m, $3, $5; cvt.rn.bf16x2.f32 t, $2, $1; and.b32 $0, m, t; }",
            "=r,f,f,r,r,r,r", [p, words, bits], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 m, t; set.geu.u32.f16x2 m, $3, $5; cvt.rn.f16x2.f32 t, $2, $1; and.b32 $0, m, t; }",
            "=r,f,f,r,r,r,r", [p, words, bits], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return out


@jit
def select_pairs(p, kept, dropped, words, limit, BF16: tl.constexpr):
    """``p * where(keep_block(words, limit), kept, dropped)`` in bf16 or fp16, all fp32; as ``drop_pairs``."""
    bits = (0xFC00 - limit) * 0x10001
    if BF16:
        out = tl.inline_asm_elementwise(
            "{ .reg .pred a, b; .reg .f32 x, y; setp.geu.f16x2 a|b, $7, $9; selp.f32 x, $3, $5, a; "
            "selp.f32 y, $4, $6, b; mul.f32 x, x, $1; mul.f32 y, y, $2; cvt.rn.bf16x2.f32 $0, y, x; }",
            "=r,f,f,f,f,f,f,r,r,r,r", [p, kept, dropped, words, bits], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .pred a, b; .reg .f32 x, y; setp.geu.f16x2 a|b, $7, $9; selp.f32 x, $3, $5, a; "
            "selp.f32 y, $4, $6, b; mul.f32 x, x, $1; mul.f32 y, y, $2; cvt.rn.f16x2.f32 $0, y, x; }",
            "=r,f,f,f,f,f,f,r,r,r,r", [p, kept, dropped, words, bits], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return out


def dropout_unfit(batch: int, heads: int, queries: int) -> str | None:
    """Why the numbering of the decisions cannot hold these sizes, or None."""
    if batch * heads > MOST_HEADS:
        return f"B H is {batch * heads}: at most {MOST_HEADS}"
    return f"Sq is {queries}: at most {MOST_QUERIES}" if queries > MOST_QUERIES else None


def packed(dtype: torch.dtype, p: float) -> bool:
    """Whether ``drop_pairs`` can decide: two values in a register, and numbers that are no NaN patterns."""
    return dtype in (torch.bfloat16, torch.float16) and threshold(p) <= 0x7C00


def key_blocks(keys: int, block: int) -> int:
    """Programs that cover every key."""
    return cdiv(keys, RUN) * (RUN // block)
