"""Attention's kernels: bounds, memory, fakes, compilation, which probabilities are dropped, the list of real keys.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import attention as module
from unit_fast_kernels.attention import attention_fused, attention_reference, blocks
from unit_fast_kernels.attention.blocks import attention_keep, key_list
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

# name: batch, queries, keys, heads, width, share of masked keys
SIZES = {
    "row": (1, 1, 7, 1, 8, 0.0),
    "odd": (3, 13, 29, 1, 20, 0.3),
    "tail": (1, 37, 150, 1, 32, 0.2),
    "many": (1, 17, 291, 1, 16, 0.1),
    "head64": (2, 19, 70, 1, 64, 0.3),
    "head96": (1, 21, 45, 1, 96, 0.0),
    "head128": (1, 35, 33, 1, 128, 0.2),
    "single_key": (2, 5, 1, 1, 16, 0.0),
    "one_batch_without_keys": (2, 9, 11, 1, 16, 0.5),
    "all_padded": (1, 5, 6, 1, 16, 1.0),
    "empty": (0, 4, 6, 2, 16, 0.0),
    "no_queries": (2, 0, 6, 1, 16, 0.5),
    "no_keys": (1, 3, 0, 2, 16, 0.0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(name):
    """[q, k, v], upstream, mask; exact in bf16."""
    batch, queries, keys, heads, width, masked = SIZES[name]
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
    return lambda q, k, v: attention_fused(q, k, v, mask, dropout_p, seed if dropout_p else None)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "single_key"])
def test_is_as_good_as_eager(name, dropout_p, dtype):
    inputs, upstream, mask = _inputs(name)
    ours = _check(inputs, [x.to(dtype) for x in inputs], upstream, mask, dropout_p)
    if mask is not None:
        for gradient in ours[2:]:
            assert not gradient[mask].any()
        assert not ours[0][mask.all(1)].any()


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
    exact = values_and_gradients(lambda *x: attention_reference(*x, mask), inputs, upstream)
    ours = values_and_gradients(_fused(mask, 0.0), [x.float() for x in inputs], upstream)
    for a, b in zip(ours, exact):
        # Scores in the thousands leave probabilities an error of some 1e-4.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-3 * b.abs().max().item())


def test_one_key():
    """The gradients of q and k are zero but for the rounding of out."""
    inputs, upstream, _ = _inputs("single_key")
    keep = attention_keep(2, 1, 5, 1, 0.1, SEED)
    exact = values_and_gradients(lambda *x: attention_reference(*x, None, 0.1, keep=keep), inputs, upstream)
    for dtype in DTYPES:
        ours = values_and_gradients(_fused(None, 0.1), [x.to(dtype) for x in inputs], upstream)
        for a, b in zip(ours, exact):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_shows(poisoned):
    inputs, _, _ = _inputs("odd")
    low = {name: x.float() for name, x in zip("qkv", inputs)}
    low[poisoned][0, 3, 0, 5] = math.nan
    assert attention_fused(**low).isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_encoder_of_unit_on_a_gpu(dtype, monkeypatch):
    shape = (1, 4201, 4201, 2, 32, True, 0.1)
    arguments = module.make(shape, torch.bfloat16, "cuda")
    inputs, mask, seed = [arguments[n].double() for n in "qkv"], arguments["key_padding_mask"], arguments["seed"]
    upstream, low = torch.randn_like(inputs[0]).bfloat16().double(), [x.to(dtype) for x in inputs]
    first = _check(inputs, low, upstream, mask, 0.1, seed)
    again = values_and_gradients(_fused(mask, 0.1, seed), low, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    # The packed decisions, which the interpreter does not know, give the bits of the plain ones.
    monkeypatch.setattr(module, "packed", lambda dtype, p: False)
    plain = values_and_gradients(_fused(mask, 0.1, seed), low, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, plain))


# --- What is dropped --------------------------------------------------------------------------------------------------


def _what_is_kept(queries, keys, mask, dropout_p, seed):
    """bool [Sq,Sk] of one head, from the values that attention returns: equal scores, one-hot values."""
    batch, width = 2, 64
    q, k = torch.zeros(batch, queries, 1, width), torch.zeros(batch, keys, 1, width)
    parts = []
    for start in range(0, keys, width):
        v = torch.zeros(batch, keys, 1, width)
        v[:, torch.arange(start, min(keys, start + width)), 0, torch.arange(min(width, keys - start))] = 1.0
        parts.append(attention_fused(q, k, v, mask, dropout_p, seed)[:, :, 0] > 0)
    return torch.cat(parts, -1)[..., :keys]


@pytest.mark.parametrize(
    "parameters", [None, {"BM": 16, "BN": 64}, {"BM": 64, "BN": 128}, {"BM": 32, "BN": 32}], ids=str
)
def test_decisions_do_not_depend_on_blocks(parameters):
    queries, keys = 37, 203
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    with _tuned.trying(lambda op, bucket, default: parameters and default | parameters):
        kept = _what_is_kept(queries, keys, mask, 0.3, SEED)
    expected = attention_keep(2, 1, queries, keys, 0.3, SEED, mask)[:, 0] & ~mask[:, None]
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("parameters", [{"BM": 16, "BN": 64}, {"BM": 32, "BN": 128}, {"BM": 64, "BN": 32}], ids=str)
def test_gradients_do_not_depend_on_blocks(parameters):
    inputs, upstream, mask = _inputs("tail")
    with _tuned.trying(lambda op, bucket, default: default | parameters):
        _check(inputs, [x.float() for x in inputs], upstream, mask, 0.4)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_of_dropped_probabilities(p):
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


def test_the_same_seed_replays_and_another_differs():
    inputs, upstream, mask = _inputs("odd")
    low = [x.float() for x in inputs]
    first, again, other = (
        values_and_gradients(_fused(mask, 0.3, seed), low, upstream) for seed in (SEED, SEED.clone(), SEED + 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    halves = [attention_keep(1, 1, 64, 256, 0.5, torch.tensor(s)) for s in ([1, 2], [1, 3], [2, 2], [1 + 2**32, 2])]
    for i, a in enumerate(halves):
        assert all(0.45 < (a == b).double().mean() < 0.55 for b in halves[:i])


# --- The list of keys -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["odd", "tail", "head96", "one_batch_without_keys", "no_queries"])
def test_reads_inside_and_writes_everything(name, monkeypatch):
    inputs, upstream, mask = _inputs(name)
    low = [x.float() for x in inputs]
    plain = values_and_gradients(_fused(mask, 0.1), low, upstream)
    poison_new_memory(monkeypatch)
    leaves = [guarded(x).requires_grad_() for x in low]
    before = [x.detach().clone() for x in leaves]
    out = _fused(mask, 0.1, guarded(SEED))(*leaves)
    poisoned = [out, *torch.autograd.grad(out, leaves, guarded(upstream.float()))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def _strided(inputs, upstream):
    """q and k slices of one product, v with heads outermost, an upstream whose head is not contiguous."""
    q, k, v = inputs
    longest = max(q.shape[1], k.shape[1])
    both = q.new_zeros(q.shape[0], longest, 2, *q.shape[2:])
    both[:, : q.shape[1], 0], both[:, : k.shape[1], 1] = q, k
    v = v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return [both[:, : q.shape[1], 0], both[:, : k.shape[1], 1], v], upstream.transpose(1, 3).contiguous().transpose(
        1, 3
    )


def test_strided_inputs():
    inputs, upstream, mask = _inputs("tail")
    low, up = [x.float() for x in inputs], upstream.float()
    dense = [low, up, mask]
    strided = [*_strided(low, up), torch.stack((mask, ~mask), -1)[..., 0]]
    results = []
    for (q, k, v), grad, m in (dense, strided):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention_fused(*leaves, m, 0.1, torch.stack((SEED, SEED), 1)[:, 0] if m is not mask else SEED)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "dropout_p", "masked"), [(torch.float32, 0.1, True), (torch.bfloat16, 0.0, False)])
def test_registration(dtype, dropout_p, masked, strided):
    inputs, upstream, mask = _inputs("odd")
    inputs, upstream = [x.to(dtype) for x in inputs], upstream.to(dtype)
    if strided:
        inputs, upstream = _strided(inputs, upstream)
        mask = mask.t().contiguous().t()
    lists = key_list(mask) if masked else (None, None)
    rest = (*lists, SEED if dropout_p else None, dropout_p)
    out, lse = module._fwd(*inputs, *rest)
    calls = [(module._fwd, (*inputs, *rest)), (module._bwd, (upstream, *inputs, out, lse, *rest))]
    for op, arguments in [(key_list, (mask,)), *calls]:
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(masked):
    def function(q, k, v, mask, seed):
        return attention_fused(q, k, v, mask if masked else None, 0.1, seed)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for length in (6, 11) if dynamic else (6,):
            q, k, v, upstream = (torch.randn(2, length, 2, 16) for _ in range(4))
            mask = torch.arange(length).expand(2, -1) >= length - 2
            results = []
            for f in (function, compiled):
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                out = f(*leaves, mask, SEED)
                results.append([out, *torch.autograd.grad(out, leaves, upstream)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Through the door -------------------------------------------------------------------------------------------------


def test_fake_tensors_take_the_kernels():
    with ops.kernels("fused"), FakeTensorMode():
        q, k, v = (torch.empty(2, 5, 3, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out = ops.attention(q, k, v, torch.zeros(2, 5, dtype=torch.bool), 0.1, torch.zeros(2, dtype=torch.int64))
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [x.shape for x in (out, *grads)] == [q.shape] * 4
    assert type(out.grad_fn).__name__ == "_AttentionBackward"


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
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^attention: the mode is fused, but {text}"):
        ops.attention(x, x[:, :1], x[:, :1])


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is where CPU tensors can")
def test_cpu_tensors_are_refused():
    x = torch.zeros(1, 2, 1, 8)
    with ops.kernels("fused"), pytest.raises(ValueError, match="^attention: the mode is fused, but tensors are on cpu"):
        ops.attention(x, x, x)


# --- What is counted --------------------------------------------------------------------------------------------------


def test_shapes_and_candidates():
    for name, shape in module.SHAPES.items():
        assert module.flops_bwd(shape) == 2.5 * module.flops(shape), name
        for dtype in (torch.bfloat16, torch.float32):
            assert module.bytes_moved(shape, dtype) < module.bytes_moved_bwd(shape, dtype)
            for candidate in module.candidates(shape, dtype):
                assert candidate["parameters"].keys() == set(module._NAMES)
                assert candidate["parameters"]["BN"] in (32, 64, 128)
    assert blocks.key_blocks(129, 64) == 4
