"""How attention's kernels are launched: in which regime, in what blocks, over how many programs.

Two regimes. In *tiles* (``kernels``) a program takes a block of queries and every key. Where the queries are few that
leaves most of a card idle, so there the keys are *split* (``split_kernels``): a program takes all queries and a share
of the keys, and the shares are joined. ``splits_keys`` decides.
"""

import torch
from torch import Tensor
from unit_fast_kernels.attention.blocks import key_blocks
from unit_fast_kernels.shared.random import threshold
from unit_fast_kernels.shared.triton import cdiv, power_of_two
from unit_fast_kernels.shared.tuned import card, launch_parameters, multiprocessors

MOST_QUERIES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
"""Queries of one tile of the split kernels. Exact float32 products keep their operands in registers: a tile of 128
would spill."""


def splits_keys(queries: int, keys: int, dtype: torch.dtype) -> bool:
    """Whether the keys are split: where one tile holds the queries and the keys are not the queries' own.

    Self-attention, known by its having as many keys as queries, is in tiles whatever its length (UniT's encoder and its
    decoder's queries among themselves, BERT); the decoder's attention to the memory is split, up to the queries of a
    tile. What is computed does not depend on it but for the order of sums, and what is dropped does not at all.
    """
    return queries <= MOST_QUERIES[dtype] and keys != queries


# --- In tiles -------------------------------------------------------------------------------------------------------

# (kernel, padded head) -> by architecture BM, BN, warps, stages, cap of registers (0: none): no spills, then the fewest
# instructions per score. The cap lets three blocks of the forward share a multiprocessor.
_TILES = {
    ("fwd", 32): {"sm_80": (64, 128, 4, 2, 168), "sm_90": (64, 128, 4, 2, 168)},
    ("fwd", 64): {"sm_80": (64, 128, 4, 2, 0), "sm_90": (64, 128, 4, 2, 0)},
    ("fwd", 128): {"sm_80": (64, 32, 4, 2, 0), "sm_90": (128, 64, 8, 2, 0)},
    ("bwd_q", 32): {"sm_80": (128, 64, 4, 2, 0), "sm_90": (128, 64, 4, 2, 0)},
    ("bwd_q", 64): {"sm_80": (64, 64, 4, 2, 0), "sm_90": (64, 64, 4, 2, 0)},
    ("bwd_q", 128): {"sm_80": (64, 32, 4, 1, 0), "sm_90": (128, 64, 8, 2, 0)},
    ("bwd_kv", 32): {"sm_80": (32, 128, 4, 2, 0), "sm_90": (32, 128, 4, 2, 0)},
    ("bwd_kv", 64): {"sm_80": (32, 64, 4, 1, 0), "sm_90": (32, 64, 4, 2, 0)},
    ("bwd_kv", 128): {"sm_80": (32, 32, 4, 2, 0), "sm_90": (32, 32, 4, 2, 0)},
}
# The same where nothing is dropped, where it differs: the former would spill.
_UNDROPPED = {
    ("fwd", 32): {"sm_80": (64, 128, 4, 2, 0), "sm_90": (64, 128, 4, 2, 0)},
    ("bwd_q", 32): {"sm_80": (128, 64, 8, 2, 0), "sm_90": (128, 64, 4, 2, 0)},
}
_NAMES = ("BM", "BN", "warps", "stages", "registers")


def padded_head(width: int) -> int:
    """Columns of a head in a tile."""
    return max(16, power_of_two(width))


def _tile_bucket(width: int, dtype: torch.dtype, dropout_p: float) -> str:
    fp32, drop = "_fp32" if dtype == torch.float32 else "", "_drop" if threshold(dropout_p) else ""
    return f"head{padded_head(width)}{fp32}{drop}"


def _tile_default(kernel: str, width: int, dtype: torch.dtype, dropout_p: float, card_name: str) -> dict[str, int]:
    if dtype == torch.float32:  # exact products keep their operands in registers: small tiles for wide heads
        return dict(zip(_NAMES, (16, 32, 8, 1, 0) if padded_head(width) > 64 else (32, 32, 4, 1, 0)))
    key = kernel, max(32, padded_head(width))
    values = _TILES[key] if threshold(dropout_p) else _UNDROPPED.get(key, _TILES[key])
    return dict(zip(_NAMES, values["sm_80" if card_name == "a100" else "sm_90"]))


def tile_launch(kernel: str, q: Tensor, dropout_p: float) -> tuple[dict, dict]:
    """(blocks, options of the launch) of a kernel: ``fwd``, ``bwd_q`` or ``bwd_kv``."""
    width = q.shape[-1]
    default = _tile_default(kernel, width, q.dtype, dropout_p, card(q.device))
    found = launch_parameters(f"attention_{kernel}", _tile_bucket(width, q.dtype, dropout_p), default, q.device)
    options = {"num_warps": found["warps"], "num_stages": found["stages"], "maxnreg": found["registers"] or None}
    return {"BM": found["BM"], "BN": found["BN"]}, options


# --- With split keys ------------------------------------------------------------------------------------------------


def query_tile(queries: int) -> int:
    """Rows of the one tile of queries."""
    return max(32, power_of_two(queries))


def _split_bucket(queries: int, width: int, dtype: torch.dtype) -> str:
    return f"queries{query_tile(queries)}_width{width}" + ("_fp32" if dtype == torch.float32 else "")


def _split_default(kernel: str, queries: int, width: int, dtype: torch.dtype, card_name: str) -> dict[str, int]:
    """Without spills, the fewest instructions a score.

    ``keys`` of a step; ``second`` columns of the head in a part of their own (96 = 64 + 32, 128 = 64 + 64; 0: one
    part); ``warps``: one for every 16 queries, more would repeat each other's products; ``stages``; ``splits`` of the
    keys (0: as many as ``split_count`` says)."""
    tile, wide = query_tile(queries), width > 96
    tight = dtype == torch.float32 or (kernel == "bwd" and card_name == "a100")  # one part of 128 spills there
    second = 32 if width == 96 else 64 if wide and tight else 0
    parameters = {"keys": 64, "second": second, "warps": tile // 16, "stages": 2, "splits": 0}
    if dtype == torch.float32:
        return parameters | {"keys": 32, "warps": 4, "stages": 1}
    if kernel == "fwd":
        return parameters | ({"keys": 128} if width <= 32 else {})
    return parameters | {"keys": 32 if wide or (width > 64 and tile < 128) else 64, "stages": 1}


def split_count(rows: int, blocks: int, places: int, most: int) -> int:
    """Splits of the keys for ``rows`` = B H programs on a card that runs ``places`` programs at once.

    The fewest whose waves are filled to 85% of what the best number fills; one where the rows alone fill 80% of the
    places. At most ``most``, and at least one block of keys each.
    """
    if rows >= 0.8 * places:
        return 1
    counts = range(1, max(1, min(most, blocks)) + 1)
    filled = [rows * n / places / cdiv(rows * n, places) for n in counts]
    return next(n for n, share in zip(counts, filled) if share >= 0.85 * max(filled))


def most_splits(queries: int, keys: int) -> int:
    """Splits whose parts stay below a tenth of the bytes that must move: of k and v forward (parts of their dtype), of
    k, v and their gradients backward (fp32 parts of 16-bit inputs)."""
    return min(64, keys // (5 * queries))


def split_launch(kernel: str, q: Tensor, keys: int) -> tuple[int, dict, dict]:
    """(splits, blocks, options of the launch) of a kernel: ``fwd`` or ``bwd``."""
    batch, queries, heads, width = q.shape
    default = _split_default(kernel, queries, width, q.dtype, card(q.device))
    found = launch_parameters(f"cross_attention_{kernel}", _split_bucket(queries, width, q.dtype), default, q.device)
    whole, second, warps = padded_head(width), found["second"], found["warps"]
    blocks = {"DA": whole // 2 if second else whole, "DB": second, "BM": query_tile(queries), "BN": found["keys"]}
    # Threads take up to 255 registers: eight warps fill a multiprocessor.
    places = multiprocessors(q.device) * max(1, 8 // warps)
    rule = split_count(batch * heads, key_blocks(keys, found["keys"]), places, most_splits(queries, keys))
    return found["splits"] or rule, blocks, {"num_warps": warps, "num_stages": found["stages"]}


# --- For tuning -----------------------------------------------------------------------------------------------------


def candidates(shape: tuple, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Launch parameters worth trying for (B, Sq, Sk, H, D, mask, dropout_p): {"op", "bucket", "parameters"}, the
    default of an A100 first. How many splits stays with ``split_count``, since a bucket has batches of every size."""
    _, queries, keys, _, width, _, dropout_p = shape
    if splits_keys(queries, keys, dtype):
        op, kernels, bucket = "cross_attention", ("fwd", "bwd"), _split_bucket(queries, width, dtype)
        default, arguments, tried = _split_default, (queries, width, dtype), _split_candidates(queries, width)
    else:
        op, kernels, bucket = "attention", ("fwd", "bwd_q", "bwd_kv"), _tile_bucket(width, dtype, dropout_p)
        default, arguments, tried = _tile_default, (width, dtype, dropout_p), _tile_candidates()
    return [
        {"op": f"{op}_{kernel}", "bucket": bucket, "parameters": parameters}
        for kernel in kernels
        for parameters in [*(default(kernel, *arguments, name) for name in ("a100", "h100")), *tried]
    ]


def _tile_candidates() -> list[dict[str, int]]:
    return [
        dict(zip(_NAMES, (rows, columns, warps, stages, registers)))
        for rows, columns in ((32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
        for warps in (4, 8)
        if 32 <= rows * columns // (32 * warps) <= 64
        for stages in (1, 2, 3)
        for registers in ((0, 128, 168) if warps == 4 else (0, 128))
    ]


def _split_candidates(queries: int, width: int) -> list[dict[str, int]]:
    tile = query_tile(queries)
    return [
        {"keys": keys, "second": second, "warps": warps, "stages": stages, "splits": 0}
        for keys in (32, 64, 128)
        for second in ((0, 32) if width == 96 else (0, 64) if width > 96 else (0,))
        for warps in (tile // 16, tile // 8)
        if warps <= 8 and 16 <= tile * keys // (32 * warps) <= 64
        for stages in (1, 2, 3)
    ]
