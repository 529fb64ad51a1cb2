"""Cross-attention's kernels: bounds, masks, splits, dropped probabilities, memory, registration, refusals.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import cross_attention as module
from unit_fast_kernels.attention.blocks import attention_keep, key_list
from unit_fast_kernels.cross_attention import cross_attention_fused, cross_attention_reference
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.random import keep_scale
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.common import (
    SEED,
    assert_as_good_as_eager,
    assert_fake_is_real,
    guarded,
    poison_new_memory,
    values_and_gradients,
    within_sigmas,
)
from unit_fast import ops

# name: batch, queries, keys, heads, width, share of masked keys, splits
SIZES = {
    "row": (1, 1, 7, 1, 8, 0.0, 1),
    "odd": (3, 13, 29, 1, 20, 0.3, 1),
    "tail": (1, 31, 150, 2, 32, 0.2, 2),
    "two_thirds_of_a_tile": (1, 70, 150, 1, 32, 0.2, 2),
    "many": (1, 25, 421, 1, 16, 0.1, 3),
    "more_splits_than_blocks": (1, 5, 40, 1, 16, 0.2, 5),
    "full_tile": (1, 128, 128, 1, 16, 0.0, 1),
    "more_than_a_tile": (1, 131, 40, 1, 16, 0.2, 1),
    "head64": (2, 19, 70, 1, 64, 0.3, 2),
    "head96": (1, 25, 203, 1, 96, 0.2, 3),
    "head96_unmasked": (1, 32, 130, 1, 96, 0.0, 2),
    "head128": (1, 21, 33, 1, 128, 0.2, 1),
    "one_batch_without_keys": (2, 9, 70, 1, 16, 0.5, 2),
    "all_padded": (1, 5, 6, 1, 16, 1.0, 1),
    "all_padded_split": (1, 5, 70, 1, 16, 1.0, 2),
    "empty": (0, 4, 6, 2, 16, 0.0, 1),
    "no_queries": (2, 0, 6, 1, 16, 0.5, 1),
    "no_keys": (1, 3, 0, 2, 16, 0.0, 1),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(name):
    """[q, k, v], upstream, mask; exact in bf16."""
    batch, queries, keys, heads, width, masked, _ = SIZES[name]
    rng = torch.Generator().manual_seed(len(name))
    q, k, v, upstream = (
        torch.randn(batch, length, heads, width, generator=rng).bfloat16().double()
        for length in (queries, keys, keys, queries)
    )
    mask = torch.rand(batch, keys, generator=rng) < masked if masked else None
    if name == "one_batch_without_keys":
        mask[1] = True
    return [q, k, v], upstream, mask


def _fused(mask, dropout_p, seed=SEED):
    return lambda q, k, v: cross_attention_fused(q, k, v, mask, dropout_p, seed if dropout_p else None)


def _with(**parameters):
    """Launch with these parameters; the others as they are by default."""
    return _tuned.trying(lambda op, bucket, default: default | {k: parameters[k] for k in default if k in parameters})


def _check(inputs, low, upstream, mask, dropout_p, seed=SEED):
    """Assert the bound against eager with the same decisions; our results."""
    batch, queries, heads, _ = inputs[0].shape
    keep = attention_keep(batch, heads, queries, inputs[1].shape[1], dropout_p, seed, mask)
    exact, eager = (
        values_and_gradients(lambda *x: cross_attention_reference(*x, mask, dropout_p, keep=keep), x, upstream)
        for x in (inputs, low)
    )
    ours = values_and_gradients(_fused(mask, dropout_p, seed), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, low[0].dtype)
    return ours


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", SIZES)
def test_is_as_good_as_eager(name, dropout_p, dtype):
    inputs, upstream, mask = _inputs(name)
    with _with(splits=SIZES[name][-1]):
        ours = _check(inputs, [x.to(dtype) for x in inputs], upstream, mask, dropout_p)
    if mask is not None:
        for gradient in ours[2:]:
            assert not gradient[mask].any()
        for row in ours[:2]:
            assert not row[mask.all(1)].any()


@pytest.mark.parametrize("second", [0, 32])
@pytest.mark.parametrize(("keys", "splits"), [(32, 1), (64, 4), (128, 2)])
def test_does_not_depend_on_blocks_and_splits(keys, splits, second):
    inputs, upstream, mask = _inputs("head96")
    with _with(keys=keys, splits=splits, second=second):
        _check(inputs, [x.float() for x in inputs], upstream, mask, 0.4)


@pytest.mark.parametrize("dropout_p", [1e-7, 0.7, 0.99])
def test_dropout_at_its_limits(dropout_p):
    """Nothing dropped, and more than the packed decisions can."""
    inputs, upstream, mask = _inputs("odd")
    _check(inputs, [x.bfloat16() for x in inputs], upstream, mask, dropout_p)


@pytest.mark.parametrize("same_sign", [False, True])
def test_scores_far_apart_neither_overflow_nor_vanish(same_sign):
    """Probabilities of one against a logsumexp far from zero; all far below it, so that padding must not overflow."""
    (q, k, v), upstream, mask = _inputs("tail")
    inputs = [q.abs() * 256, -k.abs(), v] if same_sign else [q * 256, k, v]
    exact = values_and_gradients(lambda *x: cross_attention_reference(*x, mask), inputs, upstream)
    with _with(splits=2):
        ours = values_and_gradients(_fused(mask, 0.0), [x.float() for x in inputs], upstream)
    for a, b in zip(ours, exact, strict=True):
        # Scores in the thousands leave probabilities an error of some 1e-4.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_shows(poisoned):
    inputs, _, _ = _inputs("many")
    low = {name: x.float() for name, x in zip("qkv", inputs)}
    low[poisoned][0, 3, 0, 5] = math.nan
    with _with(splits=3):
        assert cross_attention_fused(**low).isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["unit_detection", "unit_vqa", "detr_r50"])
def test_decoders_on_a_gpu(name, dtype, monkeypatch):
    arguments = module.make(module.SHAPES[name], torch.bfloat16, "cuda")
    inputs, mask, seed = [arguments[n].double() for n in "qkv"], arguments["key_padding_mask"], arguments["seed"]
    upstream, low = torch.randn_like(inputs[0]).bfloat16().double(), [x.to(dtype) for x in inputs]
    first = _check(inputs, low, upstream, mask, 0.1, seed)
    again = values_and_gradients(_fused(mask, 0.1, seed), low, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # The packed decisions, which the interpreter does not know, give the bits of the plain ones.
    monkeypatch.setattr(module, "packed", lambda dtype, p: False)
    plain = values_and_gradients(_fused(mask, 0.1, seed), low, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))


# --- How many splits --------------------------------------------------------------------------------------------------


def test_number_of_splits():
    for rows, blocks, places, most, expected in (
        (16, 66, 108, 8, 6),  # 96 of 108 places, where 5 splits fill 80 of them
        (64, 66, 108, 8, 3),  # two waves of 96, where one of 64 leaves 44 idle
        (87, 66, 108, 8, 1),
        (8, 66, 432, 33, 29),  # never enough: 85% of the most
        (8, 4, 432, 33, 4),
        (16, 66, 108, 0, 1),
    ):
        assert module.split_count(rows, blocks, places, most) == expected
    for rows in range(1, 140):
        count = module.split_count(rows, 66, 132, 16)
        best = max(rows * n / 132 / math.ceil(rows * n / 132) for n in range(1, 17))
        assert count == 1 or rows * count / 132 / math.ceil(rows * count / 132) >= 0.85 * best
        assert count == 1 or rows < 0.8 * 132


@pytest.mark.parametrize("name", module.SHAPES)
def test_parts_are_a_tenth_of_what_must_move(name):
    shape = module.SHAPES[name]
    batch, queries, keys, heads, width = shape[:5]
    splits = module.most_splits(queries, keys)
    for itemsize in (2, 4):
        assert splits * queries * itemsize <= 0.1 * 2 * keys * itemsize
    assert splits * queries * 4 <= 0.1 * 4 * keys * 2
    # No table says otherwise: what the launcher would take stays below.
    q = torch.empty(batch, queries, heads, width, dtype=torch.bfloat16, device="meta")
    for card in _tuned.CARDS:
        with _tuned.assume(card), _tuned.trying(lambda op, bucket, default: default):
            assert all(module._launching(kernel, q, keys)[0] <= max(1, splits) for kernel in ("fwd", "bwd"))


# --- What is dropped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys_a_step", "splits"), [(32, 1), (64, 3), (128, 2)])
def test_decisions_depend_neither_on_blocks_nor_on_splits(keys_a_step, splits):
    """Equal scores and one-hot values: what comes out says which probabilities were kept."""
    queries, keys, width = 29, 203, 128
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    q, k = torch.zeros(2, queries, 1, width), torch.zeros(2, keys, 1, width)
    parts = []
    with _with(keys=keys_a_step, splits=splits):
        for start in (0, width):
            v = torch.zeros(2, keys, 1, width)
            v[:, torch.arange(start, min(keys, start + width)), 0, torch.arange(min(width, keys - start))] = 1.0
            parts.append(cross_attention_fused(q, k, v, mask, 0.3, SEED)[:, :, 0] > 0)
    expected = attention_keep(2, 1, queries, keys, 0.3, SEED, mask)[:, 0] & ~mask[:, None]
    assert torch.equal(torch.cat(parts, -1)[..., :keys], expected)


def test_share_of_dropped_probabilities():
    """Values of one and equal scores: the sums count the kept probabilities, over a million of them."""
    batch, queries, keys, heads = 2, 32, 1640, 10
    q, k, v = (torch.zeros(batch, n, heads, 16) for n in (queries, keys, keys))
    with _with(keys=128):
        out = cross_attention_fused(q, k, v + 1.0, None, 0.1, SEED)
    kept = (out[..., 0].double() * keys / keep_scale(0.1)).sum()
    assert batch * queries * keys * heads > 10**6
    assert within_sigmas(round(kept.item()), batch * queries * keys * heads, 1 / keep_scale(0.1))


def test_the_same_seed_replays_and_another_differs():
    inputs, upstream, mask = _inputs("many")
    low = [x.float() for x in inputs]
    with _with(splits=3):
        first, again, other = (
            values_and_gradients(_fused(mask, 0.3, seed), low, upstream) for seed in (SEED, SEED.clone(), SEED + 1)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["odd", "tail", "head96", "one_batch_without_keys", "more_splits_than_blocks", "all_padded_split", "no_keys"],
)
def test_reads_inside_and_writes_everything(name, monkeypatch):
    inputs, upstream, mask = _inputs(name)
    low = [x.float() for x in inputs]
    with _with(splits=SIZES[name][-1]):
        plain = values_and_gradients(_fused(mask, 0.1), low, upstream)
        poison_new_memory(monkeypatch)
        leaves = [guarded(x).requires_grad_() for x in low]
        before = [x.detach().clone() for x in leaves]
        out = _fused(mask, 0.1, guarded(SEED))(*leaves)
        poisoned = [out, *torch.autograd.grad(out, leaves, guarded(upstream.float()))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def _strided(inputs, upstream):
    """k and v slices of products over three layers, q with heads outermost, an upstream with scattered heads."""
    q, k, v = inputs
    products = [torch.stack((x, x, x), 2) for x in (k, v)]
    q = q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    upstream = upstream.transpose(1, 3).contiguous().transpose(1, 3)
    return [q, *(x[:, :, 1] for x in products)], upstream


def test_strided_inputs():
    inputs, upstream, mask = _inputs("head96")
    low, up = [x.float() for x in inputs], upstream.float()
    results = []
    for (q, k, v), grad, m, seed in (
        (low, up, mask, SEED),
        (*_strided(low, up), torch.stack((mask, ~mask), -1)[..., 0], torch.stack((SEED, SEED), 1)[:, 0]),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with _with(splits=2):
            out = cross_attention_fused(*leaves, m, 0.1, seed)
        gradients = torch.autograd.grad(out, leaves, grad)
        assert all(x.is_contiguous() for x in (out, *gradients))
        results.append([out, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_slices_of_a_product_are_not_copied(monkeypatch):
    inputs, upstream, _ = _inputs("head96")
    (q, k, v), _ = _strided(inputs, upstream)
    assert not k.is_contiguous()
    assert all(module._rowwise(x) is x for x in (q, k, v))


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "dropout_p", "masked"), [(torch.float32, 0.1, True), (torch.bfloat16, 0.0, False)])
def test_registration(dtype, dropout_p, masked, strided):
    inputs, upstream, mask = _inputs("odd")
    inputs, upstream = [x.to(dtype) for x in inputs], upstream.to(dtype)
    if strided:
        inputs, upstream = _strided(inputs, upstream)
    lists = key_list(mask) if masked else (None, None)
    rest = (*lists, SEED if dropout_p else None, dropout_p)
    with _with(splits=2):
        out, lse = module._fwd(*inputs, *rest)
        for op, arguments in ((module._fwd, (*inputs, *rest)), (module._bwd, (upstream, *inputs, out, lse, *rest))):
            torch.library.opcheck(op, arguments)
            assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(masked):
    def function(q, k, v, mask, seed):
        return cross_attention_fused(q, k, v, mask if masked else None, 0.1, seed)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for keys in (6, 11) if dynamic else (6,):
            q, k, v, upstream = (torch.randn(2, length, 2, 16) for length in (5, keys, keys, 5))
            mask = torch.arange(keys).expand(2, -1) >= keys - 2
            results = []
            for f in (function, compiled):
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                out = f(*leaves, mask, SEED)
                results.append([out, *torch.autograd.grad(out, leaves, upstream)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Through the door -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "dtype", "node"),
    [
        (128, torch.bfloat16, "_CrossAttentionBackward"),
        (129, torch.bfloat16, "_AttentionBackward"),
        (32, torch.float32, "_CrossAttentionBackward"),
        (33, torch.float32, "_AttentionBackward"),
    ],
)
def test_fake_tensors_take_the_kernels(queries, dtype, node):
    with ops.kernels("fused"), FakeTensorMode():
        q = torch.empty(2, queries, 3, 32, dtype=dtype, requires_grad=True)
        k, v = (torch.empty(2, 9, 3, 32, dtype=dtype, requires_grad=True) for _ in range(2))
        mask, seed = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
        out = ops.cross_attention(q, k, v, mask, 0.1, seed)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in (out, *grads)] == [q.shape, q.shape, k.shape, v.shape]
    assert type(out.grad_fn).__name__ == node


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((1, 2, 1, 32), torch.float64, r"q is torch.float64: the kernels take float32, bfloat16, float16"),
        ((1, 2, 1, 136), torch.float32, "heads are 136 wide: at most 128"),
        ((1, (1 << 17) + 1, 1, 1), torch.float32, "Sq is 131073: at most 131072"),
        ((1024, 1, 64, 1), torch.float32, "B H is 65536: at most 65535"),
    ],
)
def test_refusals(shape, dtype, text):
    x = torch.zeros(shape, dtype=dtype)
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^cross_attention: the mode is fused, but {text}"):
        ops.cross_attention(x, x[:, :1], x[:, :1])


def test_candidates_name_known_parameters_and_start_with_the_default():
    for shape in module.SHAPES.values():
        found = module.candidates(shape)
        for kernel in ("fwd", "bwd"):
            tried = [c for c in found if c["op"] == f"cross_attention_{kernel}"]
            default = module._default(kernel, shape[1], shape[4], torch.bfloat16, "a100")
            assert tried[0]["parameters"] == default
            assert len(tried) > 4
            assert all(c["parameters"].keys() == default.keys() for c in tried)
            assert {c["bucket"] for c in tried} == {module.bucket(shape[1], shape[4], torch.bfloat16)}
