"""Attention: values and gradients, masks, what is dropped, both regimes of the kernels, memory, each refusal.

Under ``TRITON_INTERPRET=1`` the kernels run, else the references that are registered for the CPU; what runs on a CPU is
tried on each of its paths."""

import dataclasses
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import attention
from unit_fast_kernels.assembly import budgets
from unit_fast_kernels.attention import blocks, cpu, launch, parameters
from unit_fast_kernels.attention.blocks import attention_keep, key_list
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.attention.launch import attention_fused
from unit_fast_kernels.attention.reference import attention_reference
from unit_fast_kernels.shared import tuned
from unit_fast_kernels.shared.random import keep_mask, keep_scale
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Cases, Problem, both, launched, patched
from tests.kernels.common import (
    SEED,
    assert_as_good_as_eager,
    assert_equal,
    assert_fake_is_real,
    values_and_gradients,
    within_sigmas,
)
from tests.planted_kernels import needs_compiler
from unit_fast import ops

# name: batch, queries, keys, heads, width, share of masked keys; splits of the keys where they are split
SIZES = {
    "row": (1, 1, 7, 1, 8, 0.0, 1),
    "odd": (3, 13, 29, 1, 20, 0.3, 1),
    "tail": (1, 31, 150, 2, 32, 0.2, 2),
    "two_thirds_of_a_tile": (1, 70, 150, 1, 32, 0.2, 2),
    "many": (1, 25, 421, 1, 16, 0.1, 3),
    "more_splits_than_blocks": (1, 5, 40, 1, 16, 0.2, 5),
    "full_tile": (1, 128, 130, 1, 16, 0.0, 1),
    "more_than_a_tile": (1, 131, 40, 1, 16, 0.2, 1),
    "square": (1, 37, 37, 1, 16, 0.2, 1),
    "head64": (2, 19, 70, 1, 64, 0.3, 2),
    "head96": (1, 25, 203, 1, 96, 0.2, 3),
    "head96_unmasked": (1, 32, 130, 1, 96, 0.0, 2),
    "head128": (1, 21, 33, 1, 128, 0.2, 1),
    "single_key": (2, 5, 1, 1, 16, 0.0, 1),
    "one_batch_without_keys": (2, 9, 70, 1, 16, 0.5, 2),
    "all_padded": (1, 5, 6, 1, 16, 1.0, 1),
    "all_padded_split": (1, 5, 70, 1, 16, 1.0, 2),
    "empty": (0, 4, 6, 2, 16, 0.0, 1),
    "no_queries": (2, 0, 6, 1, 16, 0.5, 1),
    "no_keys": (1, 3, 0, 2, 16, 0.0, 1),
}
CPU_SIZES = {
    "row": (1, 1, 7, 1, 4, 0.0),
    "odd": (3, 13, 29, 3, 5, 0.3),
    "tail": (2, 37, 130, 2, 8, 0.2),
    "many": (1, 70, 1301, 2, 16, 0.1),
    "single_key": (3, 5, 1, 2, 8, 0.0),
    "single_key_masked": (3, 5, 1, 2, 8, 0.5),
    "one_batch_without_keys": (3, 9, 11, 2, 4, 0.5),
    "all_padded": (2, 4, 6, 2, 4, 1.0),
    "empty": (0, 4, 6, 2, 4, 0.0),
    "no_queries": (2, 0, 6, 2, 4, 0.0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# How attention_cpu is made to take each of its paths on small inputs.
PATHS = {
    "few": patched(cpu, FEW=1 << 30, BLOCK=1 << 19, SAVED=1 << 23),
    "saved": patched(cpu, FEW=0, BLOCK=1 << 19, SAVED=1 << 23),
    "saved_in_blocks": patched(cpu, FEW=0, BLOCK=1 << 9, SAVED=1 << 23),
    "recomputed": patched(cpu, FEW=0, BLOCK=1 << 19, SAVED=0),
    "recomputed_in_blocks": patched(cpu, FEW=0, BLOCK=1 << 9, SAVED=0),
}


@pytest.fixture(params=PATHS)
def path(request):
    with PATHS[request.param](None):
        yield


@pytest.fixture(params=["tiles", "by_rule"] if INTERPRETING else ["by_rule"])
def regime(request, monkeypatch):
    """Sizes whose keys the rule would split are tried in tiles too."""
    if request.param == "tiles":
        monkeypatch.setattr(launch, "splits_keys", lambda queries, keys, dtype: False)
    return request.param


def _inputs(name, dtype=torch.bfloat16, sizes=SIZES):
    """[q, k, v], upstream and mask, float64 and exact in ``dtype``, so that both arithmetics start alike."""
    batch, queries, keys, heads, width, masked = sizes[name][:6]
    rng = torch.Generator().manual_seed(len(name))
    q, k, v, upstream = (
        torch.randn(batch, length, heads, width, generator=rng, dtype=torch.float64).to(dtype).double()
        for length in (queries, keys, keys, queries)
    )
    mask = torch.rand(batch, keys, generator=rng) < masked if masked else None
    if name == "one_batch_without_keys":
        mask[1] = True
    return [q, k, v], upstream, mask


def _fused(mask, dropout_p, seed=SEED):
    return lambda q, k, v: attention_fused(q, k, v, mask, dropout_p, seed if dropout_p else None)


def _with(**changes):
    """Launch with these parameters; the others as they are by default."""
    return launched(**changes)(None)


def _check(inputs, low, upstream, mask, dropout_p, seed=SEED):
    """Assert the bound against eager with the same decisions; our results."""
    batch, queries, heads, _ = inputs[0].shape
    keep = attention_keep(batch, heads, queries, inputs[1].shape[1], dropout_p, seed, mask)
    exact, eager = (
        values_and_gradients(lambda *x: attention_reference(*x, mask, dropout_p, keep=keep), x, upstream)
        for x in (inputs, low)
    )
    ours = values_and_gradients(_fused(mask, dropout_p, seed), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, low[0].dtype)
    return ours


# --- For the suite of all operators -----------------------------------------------------------------------------------


def make(name, dropout_p=0.1, masked=True):
    on_cpu = name.startswith("cpu_")
    inputs, _, mask = _inputs(name.removeprefix("cpu_"), sizes=CPU_SIZES if on_cpu else SIZES)
    others = {"key_padding_mask": mask if masked else None, "dropout_p": dropout_p, "seed": SEED}
    return Problem(dict(zip("qkv", inputs, strict=True)), others)


def by_rule(size):
    return _with(splits=SIZES[size][-1] if size in SIZES else 1)


def keep(q, k, v, key_padding_mask, dropout_p, seed):
    return attention_keep(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dropout_p, seed, key_padding_mask)


def also(arguments, found):
    """Nothing comes of a key that is masked, nor of a query without any other."""
    if (mask := arguments["key_padding_mask"]) is not None:
        for gradient in found[2:]:
            assert not gradient[mask].any()
        for row in found[:2]:
            assert not row[mask.all(1)].any()


def _zeros(*shape, dtype=torch.float32):
    x = torch.zeros(shape, dtype=dtype)
    return {"q": x, "k": x[:, :1], "v": x[:, :1]}


Q, K = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
CASES = Cases(
    op="attention",
    sizes={name: name for name in (*SIZES, *(f"cpu_{name}" for name in CPU_SIZES))},
    make=make,
    settings={"p10": {}, "p0": {"dropout_p": 0.0}, "p70": {"dropout_p": 0.7}, "unmasked": {"masked": False}},
    main=("p10", "p0", "unmasked"),
    keep=keep,
    ways={
        "cpu": PATHS,
        "fused": {"by_rule": by_rule}
        | ({"tiles": both(by_rule, patched(launch, splits_keys=lambda *_: False))} if INTERPRETING else {}),
    },
    close={"rtol": 1e-12, "atol": 1e-13},
    cpu_low=(),
    skip=lambda way, size, setting, dtype: (
        setting == "unmasked"
        or (way in PATHS) != size.startswith("cpu_")
        or (way not in PATHS and (size == "single_key" or setting == "p70"))
    ),
    also=also,
    memory=(
        "odd", "tail", "head96", "one_batch_without_keys", "more_splits_than_blocks", "all_padded_split", "no_queries",
        "no_keys",
    ),
    dynamic=("square", "odd"),
    valid=lambda: {"q": Q, "k": K, "v": K, "dropout_p": 0.1, "seed": SEED},
    refusals=[
        ({"q": torch.randn(2, 3, 8)}, r"q is of shape \[2, 3, 8\]; it must be \[B,Sq,H,D\]"),
        ({"k": K[..., :3]}, r"k is of shape \[2, 5, 2, 3\]; it must be \[B,Sk,H,D\] = \[2, any, 2, 4\]"),
        (
            {"v": torch.randn(2, 6, 2, 4)},
            r"v is of shape \[2, 6, 2, 4\]; it must be .* as k = \[2, 5, 2, 4\]",
        ),
        ({"q": torch.ones(2, 3, 2, 4, dtype=torch.int64)}, r"q is torch.int64; it must be floating point"),
        ({"v": K.double()}, r"q, k, v is .*float32.*float64; give them one dtype"),
        (
            {"key_padding_mask": torch.zeros(2, 4).bool()},
            r"key_padding_mask is of shape \[2, 4\]; it must be \[B,Sk\]",
        ),
        ({"key_padding_mask": torch.zeros(2, 5)}, r"key_padding_mask is torch.float32; it must be bool"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; it must be at least 0 and below 1"),
        ({"dropout_p": -0.1}, r"dropout_p is -0.1"),
        ({"seed": None}, r"seed is None; with dropout_p > 0 it must be an int64 tensor of two numbers"),
        ({"seed": SEED.int()}, r"seed is torch.int32 of shape \[2\]; it must be int64"),
        ({"k": torch.randn(2, 5, 2, 4, device="meta")}, r"k is on meta; move it to cpu"),
    ],
    unfit=[
        (_zeros(1, 2, 1, 32, dtype=torch.float64), r"q is torch.float64: the kernels take float32, bfloat16, float16"),
        (_zeros(1, 2, 1, 136), "heads are 136 wide: at most 128"),
        (_zeros(1, (1 << 17) + 1, 1, 1), "Sq is 131073: at most 131072"),
        (_zeros(1024, 1, 64, 1), "B H is 65536: at most 65535"),
    ],
)  # fmt: skip
# Another name of the same operator: what depends on the name, and a look at the rest.
dataclasses.replace(
    CASES,
    op="cross_attention",
    sizes={name: name for name in ("row", "odd", "tail", "square", "no_queries")},
    settings={"p10": {}},
    main=(),
    memory=("odd",),
    ways={"cpu": {"few": PATHS["few"]}, "fused": {"by_rule": by_rule}},
    skip=lambda way, size, setting, dtype: dtype == torch.float16,
)


# --- The kernels: values and gradients --------------------------------------------------------------------------------


# Of the regime in tiles, and of that with split keys.
BLOCKS = [
    *({"BM": rows, "BN": keys} for rows, keys in ((16, 64), (32, 128), (64, 32), (64, 128), (32, 32))),
    *({"keys": k, "splits": s, "second": c} for k, s in ((32, 1), (64, 3), (64, 4), (128, 2)) for c in (0, 32)),
]


@pytest.mark.parametrize("changes", BLOCKS, ids=str)
def test_gradients_depend_neither_on_blocks_nor_on_splits(changes, monkeypatch):
    if "BM" in changes:
        monkeypatch.setattr(launch, "splits_keys", lambda queries, keys, dtype: False)
    inputs, upstream, mask = _inputs("head96" if "keys" in changes else "tail")
    with _with(**changes):
        _check(inputs, [x.float() for x in inputs], upstream, mask, 0.4)


@pytest.mark.parametrize("dropout_p", [1e-7, 0.7, 0.99])
def test_dropout_at_its_limits(regime, dropout_p):
    """Nothing dropped, and more than the packed decisions can."""
    inputs, upstream, mask = _inputs("odd")
    _check(inputs, [x.bfloat16() for x in inputs], upstream, mask, dropout_p)


@pytest.mark.parametrize("same_sign", [False, True])
def test_kernels_with_scores_far_apart_neither_overflow_nor_vanish(regime, same_sign):
    """Probabilities of one against a logsumexp far from zero; all far below it, so that padding must not overflow."""
    (q, k, v), upstream, mask = _inputs("tail")
    inputs = [q.abs() * 256, -k.abs(), v] if same_sign else [q * 256, k, v]
    exact = values_and_gradients(lambda *x: attention_reference(*x, mask), inputs, upstream)
    with _with(splits=2):
        ours = values_and_gradients(_fused(mask, 0.0), [x.float() for x in inputs], upstream)
    for a, b in zip(ours, exact, strict=True):
        # Scores in the thousands leave probabilities an error of some 1e-4.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-3 * b.abs().max().item())


def test_one_key(regime):
    """The gradients of q and k are zero but for the rounding of out."""
    inputs, upstream, _ = _inputs("single_key")
    keep = attention_keep(2, 1, 5, 1, 0.1, SEED)
    exact = values_and_gradients(lambda *x: attention_reference(*x, None, 0.1, keep=keep), inputs, upstream)
    for dtype in DTYPES:
        ours = values_and_gradients(_fused(None, 0.1), [x.to(dtype) for x in inputs], upstream)
        for a, b in zip(ours, exact):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_shows(regime, poisoned):
    inputs, _, _ = _inputs("many")
    low = {name: x.float() for name, x in zip("qkv", inputs)}
    low[poisoned][0, 3, 0, 5] = math.nan
    with _with(splits=3):
        assert attention_fused(**low).isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["unit_encoder", "unit_detection", "unit_vqa", "detr_r50"])
def test_shapes_of_models_on_a_gpu(name, dtype, monkeypatch):
    shape = (1, 4201, 4201, 2, 32, True, 0.1) if name == "unit_encoder" else attention.SHAPES[name]
    arguments = attention.make(shape, torch.bfloat16, "cuda")
    inputs, mask, seed = [arguments[n].double() for n in "qkv"], arguments["key_padding_mask"], arguments["seed"]
    upstream, low = torch.randn_like(inputs[0]).bfloat16().double(), [x.to(dtype) for x in inputs]
    first = _check(inputs, low, upstream, mask, 0.1, seed)
    assert_equal(first, values_and_gradients(_fused(mask, 0.1, seed), low, upstream))
    # The packed decisions, which the interpreter does not know, give the bits of the plain ones.
    monkeypatch.setattr(launch, "packed", lambda dtype, p: False)
    assert_equal(first, values_and_gradients(_fused(mask, 0.1, seed), low, upstream))


# --- Which regime, how many splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "split"),
    [
        (100, 4200, torch.bfloat16, True),
        (25, 4225, torch.float16, True),
        (25, 4225, torch.float32, True),
        (25, 9, torch.bfloat16, True),  # a small image
        (128, 129, torch.bfloat16, True),
        (129, 4200, torch.bfloat16, False),
        (32, 9, torch.float32, True),
        (33, 9, torch.float32, False),
        (100, 4200, torch.float32, False),
        (4201, 4201, torch.bfloat16, False),
        *((n, n, dtype, False) for n in (1, 25, 100, 128) for dtype in (torch.bfloat16, torch.float32)),
    ],
)
def test_keys_are_split_where_queries_are_few_and_keys_are_not_theirs(queries, keys, dtype, split):
    assert parameters.splits_keys(queries, keys, dtype) == split


@needs_compiler
def test_every_shape_has_its_regime():
    """Self-attention is in tiles, cross-attention is split where one tile holds the queries."""
    for planned in budgets.plan(["attention"], ["sm_80"], ["bfloat16", "float32"]):
        few = attention.SHAPES[planned.shape][1] <= (32 if planned.dtype == "float32" else 128)
        split = planned.shape in attention.CROSS_SHAPES and few
        if planned.operator != "attention_key_list":
            assert planned.launch.name.startswith("_cross_attention_" if split else "_attention_"), planned.place


def test_number_of_splits():
    for rows, blocks_of_keys, places, most, expected in (
        (16, 66, 108, 8, 6),  # 96 of 108 places, where 5 splits fill 80 of them
        (64, 66, 108, 8, 3),  # two waves of 96, where one of 64 leaves 44 idle
        (87, 66, 108, 8, 1),
        (8, 66, 432, 33, 29),  # never enough: 85% of the most
        (8, 4, 432, 33, 4),
        (16, 66, 108, 0, 1),
    ):
        assert parameters.split_count(rows, blocks_of_keys, places, most) == expected
    for rows in range(1, 140):
        count = parameters.split_count(rows, 66, 132, 16)
        best = max(rows * n / 132 / math.ceil(rows * n / 132) for n in range(1, 17))
        assert count == 1 or rows * count / 132 / math.ceil(rows * count / 132) >= 0.85 * best
        assert count == 1 or rows < 0.8 * 132


@pytest.mark.parametrize("name", attention.CROSS_SHAPES)
def test_parts_are_a_tenth_of_what_must_move(name):
    batch, queries, keys, heads, width = attention.SHAPES[name][:5]
    splits = parameters.most_splits(queries, keys)
    for itemsize in (2, 4):
        assert splits * queries * itemsize <= 0.1 * 2 * keys * itemsize
    assert splits * queries * 4 <= 0.1 * 4 * keys * 2
    # No table says otherwise: what the launcher would take stays below.
    q = torch.empty(batch, queries, heads, width, dtype=torch.bfloat16, device="meta")
    for card in tuned.CARDS:
        with tuned.assume(card), _with():
            assert all(parameters.split_launch(kernel, q, keys)[0] <= max(1, splits) for kernel in ("fwd", "bwd"))


# --- What is dropped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", BLOCKS, ids=str)
def test_decisions_depend_neither_on_blocks_nor_on_splits(changes, monkeypatch):
    """Equal scores and one-hot values: what comes out says which probabilities were kept."""
    if "BM" in changes:
        monkeypatch.setattr(launch, "splits_keys", lambda queries, keys, dtype: False)
    queries, keys, width = 29, 203, 128
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    q, k = torch.zeros(2, queries, 1, width), torch.zeros(2, keys, 1, width)
    parts = []
    with _with(**{name: value for name, value in changes.items() if name != "second"}):
        for start in (0, width):
            v = torch.zeros(2, keys, 1, width)
            v[:, torch.arange(start, min(keys, start + width)), 0, torch.arange(min(width, keys - start))] = 1.0
            parts.append(attention_fused(q, k, v, mask, 0.3, SEED)[:, :, 0] > 0)
    expected = attention_keep(2, 1, queries, keys, 0.3, SEED, mask)[:, 0] & ~mask[:, None]
    assert torch.equal(torch.cat(parts, -1)[..., :keys], expected)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_decisions_are_independent(p):
    keep = attention_keep(2, 3, 400, 641, p, SEED)
    assert keep.numel() > 10**6
    assert within_sigmas(int(keep.sum()), keep.numel(), 1 / keep_scale(p))
    # No line of the matrix is alike, and none is all one or the other.
    for dim in (-1, -2):
        share = keep.double().mean(dim)
        assert (share - 1 + p).abs().max() < 6 * (p * (1 - p) / keep.shape[dim]) ** 0.5
    flat = keep.flatten(0, 1).double() - (1 - p)
    neighbours = [(flat[..., s:] * flat[..., :-s]).mean() for s in (1, 8, 64)]
    neighbours += [(flat[:, s:] * flat[:, :-s]).mean() for s in (1, 8, 16)] + [(flat[1:] * flat[:-1]).mean()]
    assert max(map(abs, neighbours)) < 5 * p * (1 - p) / 10**3
    halves = [attention_keep(1, 1, 64, 256, 0.5, torch.tensor(s)) for s in ([1, 2], [1, 3], [2, 2], [1 + 2**32, 2])]
    for i, a in enumerate(halves):
        assert all(0.45 < (a == b).double().mean() < 0.55 for b in halves[:i])


def _share_of_dropped(function, batch, queries, keys, heads):
    """Values of one and equal scores: the sums count the kept probabilities, over a million of them."""
    q, k, v = (torch.zeros(batch, n, heads, 16) for n in (queries, keys, keys))
    kept = function(q, k, v + 1.0, None, 0.1, SEED)[..., 0].double() * keys / keep_scale(0.1)
    assert batch * queries * keys * heads > 10**6
    assert within_sigmas(round(kept.sum().item()), batch * queries * keys * heads, 1 / keep_scale(0.1))


def test_share_of_dropped_probabilities():
    with _with(keys=128):
        _share_of_dropped(attention_fused, 2, 32, 1640, 10)


def test_share_of_dropped_probabilities_on_a_cpu(path):
    _share_of_dropped(attention_cpu, 2, 400, 641, 2)


def _assert_replays(function, inputs, upstream):
    """``function`` of a seed drops the same again, and other probabilities for another seed."""
    low = [x.float() for x in inputs]
    first, again, other = (values_and_gradients(function(s), low, upstream) for s in (SEED, SEED.clone(), SEED + 1))
    assert_equal(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_same_seed_replays_and_another_differs(regime):
    inputs, upstream, mask = _inputs("many")
    with _with(splits=3):
        _assert_replays(lambda seed: _fused(mask, 0.3, seed), inputs, upstream)


def test_the_same_seed_replays_and_another_differs_on_a_cpu(path):
    inputs, upstream, mask = _inputs("tail", torch.float32, CPU_SIZES)
    _assert_replays(lambda seed: lambda *x: attention_cpu(*x, mask, 0.1, seed), inputs, upstream)


@pytest.mark.parametrize("keys", [1, 7, 130, 5000])
def test_list_of_keys(keys):
    mask = torch.rand(4, keys, generator=torch.Generator().manual_seed(keys)) < 0.4
    mask[1], mask[2] = True, False
    for m in (mask, mask.t().contiguous().t()):
        order, count = key_list(m)
        assert torch.equal(count, (~m).sum(1, dtype=torch.int32))
        for b in range(4):
            n = int(count[b])
            assert torch.equal(order[b, :n].long(), (~m[b]).nonzero()[:, 0])
            assert torch.equal(order[b, n:].long().sort()[0], m[b].nonzero()[:, 0])


# --- Memory -----------------------------------------------------------------------------------------------------------


def _slices_of_layers(q, k, v):
    """k and v slices of products over three layers, q with heads outermost."""
    k, v = (torch.stack((x, x, x), 2)[:, :, 1] for x in (k, v))
    return [q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), k, v]


def _slices_of_one_product(q, k, v):
    """q and k slices of one product, v with heads outermost."""
    both = q.new_zeros(q.shape[0], max(q.shape[1], k.shape[1]), 2, *q.shape[2:])
    both[:, : q.shape[1], 0], both[:, : k.shape[1], 1] = q, k
    v = v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return [both[:, : q.shape[1], 0], both[:, : k.shape[1], 1], v]


LAYOUTS = [_slices_of_layers, _slices_of_one_product]


def _scattered(x):
    """x whose heads are not contiguous."""
    return x.transpose(1, 3).contiguous().transpose(1, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(regime, layout):
    inputs, upstream, mask = _inputs("head96")
    low, up = [x.float() for x in inputs], upstream.float()
    results = []
    for (q, k, v), grad, m, seed in (
        (low, up, mask, SEED),
        (layout(*low), _scattered(up), torch.stack((mask, ~mask), -1)[..., 0], torch.stack((SEED, SEED), 1)[:, 0]),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with _with(splits=2):
            out = attention_fused(*leaves, m, 0.1, seed)
        gradients = torch.autograd.grad(out, leaves, grad)
        assert all(x.is_contiguous() for x in (out, *gradients))
        results.append([out, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_are_not_copied(layout):
    inputs = layout(*_inputs("head96")[0])
    assert not inputs[1].is_contiguous()
    assert all(launch.rowwise(x) is x for x in inputs)


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "dropout_p", "masked"), [(torch.float32, 0.1, True), (torch.bfloat16, 0.0, False)])
def test_registration_with_slices(regime, dtype, dropout_p, masked, layout):
    inputs, upstream, mask = _inputs("odd")
    inputs, upstream = layout(*(x.to(dtype) for x in inputs)), upstream.to(dtype)
    upstream, mask = _scattered(upstream), mask.t().contiguous().t()
    lists = key_list(mask) if masked else (None, None)
    rest = (*lists, SEED if dropout_p else None, dropout_p)
    with _with(splits=2):
        out, lse = launch.attention_fwd(*inputs, *rest)
        for op, arguments in (
            (key_list, (mask,)),
            (launch.attention_fwd, (*inputs, *rest)),
            (launch.attention_bwd, (upstream, *inputs, out, lse, *rest)),
        ):
            torch.library.opcheck(op, arguments)
            assert_fake_is_real(op, *arguments)


# --- Through the door -------------------------------------------------------------------------------------------------

BOTH_NAMES = pytest.mark.parametrize("op", [ops.attention, ops.cross_attention], ids=lambda op: op.__name__)


@BOTH_NAMES
@pytest.mark.parametrize("queries", [9, 100, 129])
def test_fake_tensors_take_the_kernels(op, queries):
    with ops.kernels("fused"), FakeTensorMode():
        q = torch.empty(2, queries, 3, 32, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(2, 9, 3, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        out = op(q, k, v, torch.zeros(2, 9, dtype=torch.bool), 0.1, torch.zeros(2, dtype=torch.int64))
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in (out, *grads)] == [q.shape, q.shape, k.shape, v.shape]
    assert type(out.grad_fn).__name__ == "_AttentionBackward"


# --- What is counted --------------------------------------------------------------------------------------------------


def test_shapes_and_candidates():
    """Candidates are of known parameters and begin with the default."""
    for name, shape in attention.SHAPES.items():
        assert attention.flops_bwd(shape) == 2.5 * attention.flops(shape), name
        for dtype in (torch.bfloat16, torch.float32):
            assert attention.bytes_moved(shape, dtype) < attention.bytes_moved_bwd(shape, dtype)
            found = attention.candidates(shape, dtype)
            assert len({(c["op"], c["bucket"]) for c in found}) in (2, 3)
            for kernel in {c["op"] for c in found}:
                tried = [c["parameters"] for c in found if c["op"] == kernel]
                assert len(tried) > 4 or dtype == torch.float32
                assert all(parameters.keys() == tried[0].keys() for parameters in tried)
                assert all((p["keys"] if "keys" in p else p["BN"]) in (32, 64, 128) for p in tried)
                q = torch.empty(*(shape[i] for i in (0, 1, 3, 4)), dtype=dtype, device="meta")
                asked = []
                with tuned.assume("a100"), tuned.trying(lambda op, bucket, default, to=asked: to.append(default)):
                    if kernel.startswith("cross"):
                        parameters.split_launch(kernel.removeprefix("cross_attention_"), q, shape[2])
                    else:
                        parameters.tile_launch(kernel.removeprefix("attention_"), q, shape[6])
                assert asked == tried[:1]
    assert blocks.key_blocks(129, 64) == 4


# --- On a CPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "tail", "many", "one_batch_without_keys", "single_key_masked"])
def test_low_precision_is_as_good_as_eager(path, name, dtype, monkeypatch):
    inputs, upstream, mask = _inputs(name, dtype, CPU_SIZES)
    # Blocks of at least eight queries: for one to three the library multiplies a vector, and some add up its 1301 terms
    # one after the other, with two to three times the error of eager's product. Real blocks have hundreds of queries.
    monkeypatch.setattr(cpu, "BLOCK", max(cpu.BLOCK, 8 * inputs[1].shape[1]))
    low = [x.to(dtype) for x in inputs]
    batch, queries, heads, _ = inputs[0].shape
    keep = keep_mask((batch, heads, queries, inputs[1].shape[1]), 0.1, SEED)
    exact = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, keep=keep), inputs, upstream)
    eager = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, keep=keep), low, upstream)
    ours = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def test_single_key_gradients_of_query_and_key_are_zero_on_a_cpu():
    """The softmax is 1 whatever they are."""
    inputs, upstream, _ = _inputs("single_key", torch.float64, CPU_SIZES)
    _, grad_q, grad_k, grad_v = values_and_gradients(lambda *x: attention_cpu(*x, None, 0.1, SEED), inputs, upstream)
    assert not grad_q.any()
    assert not grad_k.any()
    assert grad_v.any()


def test_explicit_keep_equals_the_seeded_decisions():
    inputs, _, mask = _inputs("odd", torch.float64, CPU_SIZES)
    keep = keep_mask((3, 3, 13, 29), 0.5, SEED)
    seeded = attention_cpu(*inputs, mask, 0.5, SEED)
    torch.testing.assert_close(attention_reference(*inputs, mask, 0.5, keep=keep), seeded, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(attention_reference(*inputs, mask, 0.5, keep=~keep), seeded)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradcheck(path, dropout_p):
    inputs, _, _ = _inputs("odd", torch.float64, CPU_SIZES)
    inputs = [x[:2, :6, :2].clone().requires_grad_() for x in inputs]
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    assert torch.autograd.gradcheck(lambda *x: attention_cpu(*x, mask, dropout_p, SEED), inputs)


def test_slices_of_a_packed_product_and_permuted_inputs(path):
    rng = torch.Generator().manual_seed(3)
    packed = torch.randn(2, 17, 3 * 24, generator=rng, dtype=torch.float64)
    q, k, v = (x.unflatten(-1, (3, 8)) for x in packed.chunk(3, dim=-1))
    v = v.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    upstream = torch.randn(2, 3, 17, 8, generator=rng, dtype=torch.float64).transpose(1, 2)
    assert not q.is_contiguous()
    assert not v.is_contiguous()
    compact = [x.contiguous() for x in (q, k, v)]
    ours = values_and_gradients(lambda *x: attention_cpu(*x, None, 0.1, SEED), [q, k, v], upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, None, 0.1, SEED), compact, upstream)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_scores_far_apart_neither_overflow_nor_vanish(path):
    inputs, upstream, mask = _inputs("tail", torch.float32, CPU_SIZES)
    q, k, v = (x.float() for x in inputs)
    ours = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.0, None), [q * 300, k, v], upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.0, None), [q * 300, k, v], upstream)
    for a, b in zip(ours, expected):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CPU_SIZES)
def test_evaluation(name, dtype):
    """No gradient and no dropout; with a mask, with one that masks nothing and without."""
    inputs, _, mask = _inputs(name, dtype, CPU_SIZES)
    low = [x.to(dtype) for x in inputs]
    for m in {None, mask, torch.zeros(len(low[0]), low[1].shape[1], dtype=torch.bool)}:
        exact, eager = ([attention_reference(*x, m)] for x in (inputs, low))
        if dtype == torch.float64:
            torch.testing.assert_close(attention_cpu(*low, m), exact[0], rtol=1e-12, atol=1e-13)
        else:
            assert_as_good_as_eager([attention_cpu(*low, m)], eager, exact, dtype)


def test_without_gradient_and_used_twice():
    inputs, _, mask = _inputs("odd", torch.float64, CPU_SIZES)
    with torch.no_grad():
        out = attention_cpu(*inputs, mask, 0.1, SEED)
    assert not out.requires_grad
    q = inputs[0].clone().requires_grad_()
    twice = attention_cpu(q, *inputs[1:], mask, 0.1, SEED) + attention_cpu(q, *inputs[1:], mask, 0.1, SEED)
    (grad,) = torch.autograd.grad(twice.sum(), q, retain_graph=True)
    (again,) = torch.autograd.grad(twice.sum(), q)
    assert torch.equal(grad, again)
    torch.testing.assert_close(twice, 2 * out, rtol=1e-12, atol=1e-13)


def test_under_autocast(path):
    inputs, upstream, mask = _inputs("odd", torch.bfloat16, CPU_SIZES)
    low = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = values_and_gradients(lambda *x: ops.attention(*x, mask, 0.1, SEED), low, upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, SEED), inputs, upstream)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["odd", "many", "no_queries"])
def test_unwritten_memory_does_not_show(path, name, monkeypatch):
    """With deterministic algorithms torch fills what ``torch.empty`` gives with NaN."""
    inputs, upstream, mask = _inputs(name, torch.float64, CPU_SIZES)
    expected = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), inputs, upstream)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), inputs, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(poisoned, expected)
