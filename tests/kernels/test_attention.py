"""Attention: forward and gradients against float64, masks, dropout decisions, shapes at the limits, each refusal."""

import pytest
import torch
from unit_fast_kernels.attention import attention_reference
from unit_fast_kernels.attention import cpu as module
from unit_fast_kernels.attention.cpu import attention_cpu
from unit_fast_kernels.shared.random import keep_mask, keep_scale

from tests.kernels.common import SEED, assert_as_good_as_eager, values_and_gradients, within_sigmas
from unit_fast import ops

# name: batch, queries, keys, heads, width, share of masked keys
SIZES = {
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
# How attention_cpu is made to take each of its paths on small inputs: FEW, BLOCK, SAVED.
PATHS = {
    "few": (1 << 30, 1 << 19, 1 << 23),
    "saved": (0, 1 << 19, 1 << 23),
    "saved_in_blocks": (0, 1 << 9, 1 << 23),
    "recomputed": (0, 1 << 19, 0),
    "recomputed_in_blocks": (0, 1 << 9, 0),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    few, block, saved = PATHS[request.param]
    monkeypatch.setattr(module, "FEW", few)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "SAVED", saved)
    return request.param


def _inputs(name, dtype=torch.float64):
    batch, queries, keys, heads, width, masked = SIZES[name]
    rng = torch.Generator().manual_seed(len(name))
    q, k, v, upstream = (
        torch.randn(batch, length, heads, width, generator=rng, dtype=torch.float64)
        for length in (queries, keys, keys, queries)
    )
    mask = torch.rand(batch, keys, generator=rng) < masked if masked else None
    if name == "one_batch_without_keys":
        mask[1] = True
    # Values exact in the low precision, so that both arithmetics start alike.
    return [x.to(dtype).double() for x in (q, k, v)], upstream.to(dtype).double(), mask


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_reference_in_float64(path, name, dropout_p):
    inputs, upstream, mask = _inputs(name)
    ours = values_and_gradients(lambda *x: attention_cpu(*x, mask, dropout_p, SEED), inputs, upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, mask, dropout_p, SEED), inputs, upstream)
    for a, b in zip(ours, expected):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "tail", "many", "one_batch_without_keys", "single_key_masked"])
def test_low_precision_is_as_good_as_eager(path, name, dtype, monkeypatch):
    inputs, upstream, mask = _inputs(name, dtype)
    # Blocks of at least eight queries: for one to three the library multiplies a vector, and some add up its 1301 terms
    # one after the other, with two to three times the error of eager's product. Real blocks have hundreds of queries.
    monkeypatch.setattr(module, "BLOCK", max(module.BLOCK, 8 * inputs[1].shape[1]))
    low = [x.to(dtype) for x in inputs]
    batch, queries, heads, _ = inputs[0].shape
    keep = keep_mask((batch, heads, queries, inputs[1].shape[1]), 0.1, SEED)
    exact = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, keep=keep), inputs, upstream)
    eager = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, keep=keep), low, upstream)
    ours = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def test_explicit_keep_equals_the_seeded_decisions():
    inputs, _, mask = _inputs("odd")
    keep = keep_mask((3, 3, 13, 29), 0.5, SEED)
    seeded = attention_cpu(*inputs, mask, 0.5, SEED)
    torch.testing.assert_close(attention_reference(*inputs, mask, 0.5, keep=keep), seeded, rtol=1e-12, atol=1e-13)
    other = attention_reference(*inputs, mask, 0.5, keep=~keep)
    assert not torch.allclose(other, seeded)


def test_share_of_dropped_probabilities(path):
    """Values of one and equal scores: the sum over keys counts the kept probabilities."""
    queries, keys = 400, 641
    q, k, v = torch.zeros(2, queries, 2, 4), torch.zeros(2, keys, 2, 4), torch.ones(2, keys, 2, 4)
    out = attention_cpu(q, k, v, None, 0.1, SEED)
    kept = out[..., 0] * keys / keep_scale(0.1)
    assert within_sigmas(round(kept.double().sum().item()), 2 * 2 * queries * keys, 0.9)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradcheck(path, dropout_p):
    inputs, _, _ = _inputs("odd")
    inputs = [x[:2, :6, :2].clone().requires_grad_() for x in inputs]
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    assert torch.autograd.gradcheck(lambda *x: attention_cpu(*x, mask, dropout_p, SEED), inputs)


def test_the_same_seed_replays_and_another_differs(path):
    inputs, upstream, mask = _inputs("tail", torch.float32)
    inputs = [x.float() for x in inputs]

    def run(seed):
        return values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, seed), inputs, upstream)

    first, again, other = run(SEED), run(SEED), run(SEED + 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


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


def test_inputs_and_upstream_are_not_written_to(path):
    inputs, upstream, mask = _inputs("one_batch_without_keys")
    leaves = [x.clone().requires_grad_() for x in inputs]
    grad, mask_before, seed = upstream.clone(), mask.clone(), SEED.clone()
    attention_cpu(*leaves, mask, 0.1, seed).backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(leaves, inputs))
    assert torch.equal(grad, upstream)
    assert torch.equal(mask, mask_before)
    assert torch.equal(seed, SEED)


def test_scores_far_apart_neither_overflow_nor_vanish(path):
    inputs, upstream, mask = _inputs("tail", torch.float32)
    q, k, v = (x.float() for x in inputs)
    ours = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.0, None), [q * 300, k, v], upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.0, None), [q * 300, k, v], upstream)
    for a, b in zip(ours, expected):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_single_key_gradients_of_query_and_key_are_zero():
    inputs, upstream, _ = _inputs("single_key")
    _, grad_q, grad_k, grad_v = values_and_gradients(lambda *x: attention_cpu(*x, None, 0.1, SEED), inputs, upstream)
    assert not grad_q.any()
    assert not grad_k.any()
    assert grad_v.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_evaluation(name, dtype):
    """No gradient and no dropout; with a mask, with one that masks nothing and without."""
    inputs, _, mask = _inputs(name, dtype)
    low = [x.to(dtype) for x in inputs]
    for m in {None, mask, torch.zeros(len(low[0]), low[1].shape[1], dtype=torch.bool)}:
        exact, eager = ([attention_reference(*x, m)] for x in (inputs, low))
        if dtype == torch.float64:
            torch.testing.assert_close(attention_cpu(*low, m), exact[0], rtol=1e-12, atol=1e-13)
        else:
            assert_as_good_as_eager([attention_cpu(*low, m)], eager, exact, dtype)


def test_without_gradient_and_used_twice():
    inputs, _, mask = _inputs("odd")
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
    inputs, upstream, mask = _inputs("odd", torch.bfloat16)
    low = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = values_and_gradients(lambda *x: ops.attention(*x, mask, 0.1, SEED), low, upstream)
    expected = values_and_gradients(lambda *x: attention_reference(*x, mask, 0.1, SEED), inputs, upstream)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["odd", "many", "no_queries"])
def test_unwritten_memory_does_not_show(path, name, monkeypatch):
    """With deterministic algorithms torch fills what ``torch.empty`` gives with NaN."""
    inputs, upstream, mask = _inputs(name)
    expected = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), inputs, upstream)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = values_and_gradients(lambda *x: attention_cpu(*x, mask, 0.1, SEED), inputs, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, expected))


def _arguments(**changes):
    arguments = {"q": torch.randn(2, 3, 2, 4), "k": torch.randn(2, 5, 2, 4), "v": torch.randn(2, 5, 2, 4)}
    return arguments | changes


@pytest.mark.parametrize("op", [ops.attention, ops.cross_attention])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": torch.randn(2, 3, 8)}, r"q is of shape \[2, 3, 8\]; it must be \[B,Sq,H,D\]"),
        ({"k": torch.randn(2, 5, 2, 3)}, r"k is of shape \[2, 5, 2, 3\]; it must be \[B,Sk,H,D\] = \[2, any, 2, 4\]"),
        ({"v": torch.randn(2, 6, 2, 4)}, r"v is of shape \[2, 6, 2, 4\]; it must be .* as k = \[2, 5, 2, 4\]"),
        ({"q": torch.ones(2, 3, 2, 4, dtype=torch.int64)}, r"q is torch.int64; it must be floating point"),
        ({"v": torch.randn(2, 5, 2, 4).double()}, r"q, k, v is .*float32.*float64; give them one dtype"),
        ({"key_padding_mask": torch.zeros(2, 4).bool()}, r"key_padding_mask is of shape \[2, 4\]; it must be \[B,Sk\]"),
        ({"key_padding_mask": torch.zeros(2, 5)}, r"key_padding_mask is torch.float32; it must be bool"),
        ({"dropout_p": 1.0, "seed": SEED}, r"dropout_p is 1.0; it must be at least 0 and below 1"),
        ({"dropout_p": -0.1, "seed": SEED}, r"dropout_p is -0.1"),
        ({"dropout_p": 0.1}, r"seed is None; with dropout_p > 0 it must be an int64 tensor of two numbers"),
        (
            {"dropout_p": 0.1, "seed": SEED.int()},
            r"seed is torch.int32 of shape \[2\]; it must be int64",
        ),
        ({"k": torch.randn(2, 5, 2, 4, device="meta")}, r"k is on meta; move it to cpu"),
    ],
)
def test_refusals(op, changes, text):
    with pytest.raises(ValueError, match=f"^{op.__name__}: {text}"):
        op(**_arguments(**changes))
