"""The fused post-norm residual: bounds, memory, fakes, compilation, autocast, replay of the dropped elements.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import residual_norm as module
from unit_fast_kernels.residual_norm import residual_norm_fused, residual_norm_reference
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.philox import keep_elements
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

SIZES = {
    "row": (1, 8),
    "odd": (3, 5, 7),
    "tail": (2, 33, 130),
    "many": (2, 40, 96),
    "wide": (3, 1000),
    "widest": (1, 4095),
    "four_dims": (2, 1, 3, 24),
    "one_dim": (40,),
    "empty": (0, 3, 8),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(shape, seed=4):
    """x, branch, weight, bias, pos (one for all of the first dimension) and the upstream gradient, exact in bf16."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (shape, shape, shape[-1:], shape[-1:], shape[1:] if len(shape) > 1 else shape, shape)
    return [torch.randn(s, generator=rng, dtype=torch.float64).bfloat16().double() for s in shapes]


def _both(op, dropout_p, **keywords):
    """y and y + pos weighted into one tensor, so that both outputs' gradients count."""

    def function(x, branch, weight, bias, pos):
        y, y_pos = op(x, branch, weight, bias, 1e-5, dropout_p, pos, **keywords)
        return y + 0.5 * y_pos

    return function


def _check(inputs, low, upstream, dropout_p, *dtypes):
    keep = keep_elements(inputs[0].shape, dropout_p, SEED)
    reference = _both(residual_norm_reference, dropout_p, keep=keep)
    exact, eager = (values_and_gradients(reference, x, upstream) for x in (inputs, low))
    ours = values_and_gradients(_both(residual_norm_fused, dropout_p, seed=SEED), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, *dtypes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", SIZES)
def test_is_as_good_as_eager(name, dropout_p, dtype):
    *inputs, upstream = _inputs(SIZES[name])
    _check(inputs, [x.to(dtype) for x in inputs], upstream, dropout_p, dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_float32_stream_with_a_bfloat16_branch(dropout_p):
    *inputs, upstream = _inputs(SIZES["tail"])
    mixed = [x.bfloat16() if i == 1 else x.float() for i, x in enumerate(inputs)]
    wide = torch.float32
    _check(inputs, mixed, upstream, dropout_p, wide, wide, torch.bfloat16, wide, wide, wide)


@pytest.mark.gpu
def test_encoder_of_unit_on_a_gpu():
    shape, dtype = (2, 4201, 256), torch.bfloat16
    with torch.device("cuda"):
        inputs = [torch.randn(s, dtype=torch.float32) for s in (shape, shape, (256,), (256,), shape[1:], shape)]
        seed = SEED.cuda()
    *inputs, upstream = (x.to(dtype).double() for x in inputs)
    keep = keep_elements(shape, 0.1, seed)
    low = [x.to(dtype) for x in inputs]
    reference = _both(residual_norm_reference, 0.1, keep=keep)
    exact, eager = (values_and_gradients(reference, x, upstream) for x in (inputs, low))
    runs = [values_and_gradients(_both(residual_norm_fused, 0.1, seed=seed), low, upstream) for _ in range(2)]
    assert_as_good_as_eager(runs[0], eager, exact, dtype)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# --- Which outputs are asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["y", "y_pos", "none"])
def test_gradients_of_one_output(used):
    """A gradient that does not come is not read; what needs none gets none."""
    x, branch, weight, bias, pos, upstream = (t.requires_grad_() for t in map(torch.Tensor.float, _inputs((2, 5, 24))))
    keep = keep_elements(x.shape, 0.1, SEED)
    gradients = []
    for op, keywords in ((residual_norm_fused, {"seed": SEED}), (residual_norm_reference, {"keep": keep})):
        y, y_pos = op(x, branch, weight, bias, 1e-5, 0.1, pos, **keywords)
        out = {"y": y, "y_pos": y_pos, "none": (y + y_pos) * 0.0}[used]
        leaves = (x, branch, weight, bias, pos)
        gradients.append(torch.autograd.grad(out, leaves, upstream.detach(), allow_unused=True))
    for ours, theirs in zip(*gradients):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pos_shape", [(2, 6, 16), (1, 6, 16), (6, 16), (1, 1, 16), (16,), (2, 6, 1), (2, 1, 1)])
def test_positions_of_every_broadcast(pos_shape):
    x, branch, weight, bias, _, upstream = _inputs((2, 6, 16))
    pos = torch.randn(pos_shape, dtype=torch.float64)
    low = [t.float() for t in (x, branch, weight, bias, pos)]
    _check([x, branch, weight, bias, pos], low, upstream, 0.1, torch.float32)
    expanded = [*low[:4], low[4].expand(x.shape)]  # a view with strides of zero
    y_pos = [residual_norm_fused(*t[:4], 1e-5, 0.1, t[4], SEED)[1] for t in (low, expanded)]
    assert torch.equal(*y_pos)


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tail", "wide", "empty"])
def test_reads_inside_and_writes_everything(name, monkeypatch):
    *inputs, upstream = _inputs(SIZES[name])
    low = [x.float() for x in inputs]
    plain = values_and_gradients(_both(residual_norm_fused, 0.1, seed=SEED), low, upstream)
    poison_new_memory(monkeypatch)
    leaves = [guarded(x).requires_grad_() for x in low]
    before = [x.detach().clone() for x in leaves]
    out = _both(residual_norm_fused, 0.1, seed=guarded(SEED))(*leaves)
    poisoned = [out, *torch.autograd.grad(out, leaves, guarded(upstream.float()))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_strided_inputs():
    x, branch, *rest, upstream = (t.float() for t in _inputs((4, 6, 16)))
    dense = values_and_gradients(_both(residual_norm_fused, 0.1, seed=SEED), [x, branch, *rest], upstream)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch)]
    strided[1] = torch.stack((strided[1], strided[1]), -1)[..., 1]
    wide_seed = torch.stack((SEED, SEED), 1)[:, 0]
    found = values_and_gradients(
        _both(residual_norm_fused, 0.1, seed=wide_seed), [*strided, *rest], upstream.mT.contiguous().mT
    )
    for a, b in zip(dense, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _arguments(dtype, dropout_p, with_pos, strided):
    x, branch, weight, bias, pos, upstream = (t.float() for t in _inputs((3, 6, 16)))
    branch = branch.to(dtype)
    if strided:
        x, branch, upstream = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch, upstream))
        pos = pos.t().contiguous().t()
    pos, seed = pos if with_pos else None, SEED if dropout_p else None
    forward = (x, branch, weight, bias, pos, seed, 1e-5, dropout_p, torch.float32)
    _, _, mean, rstd = module._forward(*forward)
    backward = (upstream, upstream if with_pos else None, x, branch, weight, mean, rstd, seed, dropout_p)
    return forward, backward


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dropout_p", "with_pos"),
    [(torch.float32, 0.1, True), (torch.bfloat16, 0.0, False), (torch.float32, 0.0, False)],
)
def test_registration(dtype, dropout_p, with_pos, strided):
    for op, arguments in zip((module._forward, module._backward), _arguments(dtype, dropout_p, with_pos, strided)):
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("with_pos", [False, True])
def test_compiles_whole(with_pos):
    def function(x, branch, weight, bias, pos, seed):
        y, y_pos = residual_norm_fused(x, branch, weight, bias, 1e-5, 0.1, pos if with_pos else None, seed)
        return y if y_pos is None else y + 0.5 * y_pos

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for length in (6, 11) if dynamic else (6,):
            *inputs, upstream = (t.float() for t in _inputs((2, length, 16)))
            results = []
            for f in (function, compiled):
                leaves = [t.clone().requires_grad_() for t in inputs]
                out = f(*leaves, SEED)
                results.append([out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True)])
            for a, b in zip(*results, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


# --- Dtypes under autocast --------------------------------------------------------------------------------------------


def _dtypes(op, x, branch, pos, seed, keep):
    weight, bias = (torch.ones(x.shape[-1:], device=x.device) for _ in range(2))
    keywords = {"seed": seed} if op is residual_norm_fused else {"keep": keep}
    return [None if t is None else t.dtype for t in op(x, branch, weight, bias, 1e-5, 0.1, pos, **keywords)]


@pytest.mark.parametrize("pos", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dtypes_under_autocast_are_those_of_the_reference(device, x, branch, pos):
    """A CPU's autocast leaves layer_norm in its input's dtype, CUDA's runs it in float32."""
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        tensors = [None if d is None else torch.ones(2, 3, 8, dtype=d, device=device) for d in (x, branch, pos)]
        seed = torch.zeros(2, dtype=torch.int64, device=device)
        keep = torch.ones(2, 3, 8, dtype=torch.bool, device=device)
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            found, expected = (
                _dtypes(op, *tensors, seed, keep) for op in (residual_norm_fused, residual_norm_reference)
            )
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])
    assert found == expected


# --- Decisions --------------------------------------------------------------------------------------------------------


def test_share_of_dropped_elements_and_seeds(monkeypatch):
    """Without a stream and with equal elements, a dropped one is below the row's mean."""
    many_rows = {"residual_norm_fwd": {"width1024": {"rows": 128}}}  # fewer programs: the interpreter takes each alone
    monkeypatch.setattr(_tuned, "table", lambda card: many_rows)
    zeros, ones = torch.zeros(1024, 1024), torch.ones(1024, 1024)
    weight, bias = torch.ones(1024), torch.zeros(1024)

    def dropped(seed, p):
        return residual_norm_fused(zeros, ones, weight, bias, 1e-5, p, None, seed)[0] < 0

    first = dropped(SEED, 0.1)
    assert within_sigmas(int(first.sum()), first.numel(), 0.1)
    assert torch.equal(first, ~keep_elements(first.shape, 0.1, SEED))
    assert torch.equal(first, dropped(SEED, 0.1))
    both = first & dropped(SEED + torch.tensor([0, 1]), 0.1)
    assert within_sigmas(int(both.sum()), both.numel(), 0.01)


@pytest.mark.parametrize("width", [24, 130])
def test_decisions_do_not_depend_on_launch_parameters(width, monkeypatch):
    *inputs, upstream = (t.float() for t in _inputs((2, 9, width)))
    first = values_and_gradients(_both(residual_norm_fused, 0.1, seed=SEED), inputs, upstream)
    bucket = f"width{module.power_of_two(width)}"
    other = {
        "residual_norm_fwd": {bucket: {"rows": 1, "warps": 1}},
        "residual_norm_bwd": {bucket: {"rows": 2, "warps": 2, "programs": 1}},
    }
    monkeypatch.setattr(_tuned, "table", lambda card: other)
    second = values_and_gradients(_both(residual_norm_fused, 0.1, seed=SEED), inputs, upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal():
    *inputs, upstream = (t.bfloat16() for t in _inputs(SIZES["many"]))
    runs = [values_and_gradients(_both(residual_norm_fused, 0.1, seed=SEED), inputs, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- What does not fit ------------------------------------------------------------------------------------------------

X, C = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X.double(), X, C, C), "x is torch.float64: convert it to float32, bfloat16 or float16"),
        ((X, X, C.double(), C), "weight is torch.float64: convert it"),
        ((X, X, C, C, X.double()), "pos is torch.float64: convert it"),
        ((X, X, C.half(), C), "weight is torch.float16 and bias torch.float32: give them one dtype"),
        ((torch.ones(1, 4097),) * 2 + (torch.ones(4097),) * 2, "the width is 4097: kernels exist for 1 to 4096"),
        ((torch.ones(1).expand(2**31, 1),) * 2 + (torch.ones(1),) * 2, r"x has 2\^31 rows or more: split it"),
    ],
)
def test_unfit_arguments_are_told(arguments, text):
    pos = arguments[4] if len(arguments) > 4 else None
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^residual_norm: the mode is fused, but {text}"):
        ops.residual_norm(*arguments[:4], 1e-5, 0.0, pos)


def test_fused_mode_calls_the_kernels_or_says_why_not():
    x, branch, weight, bias, pos, _ = (t.float() for t in _inputs((2, 3, 8)))
    with ops.kernels("fused"):
        if INTERPRETING:
            found = ops.residual_norm(x, branch, weight, bias, 1e-5, 0.1, pos, SEED)
            expected = residual_norm_fused(x, branch, weight, bias, 1e-5, 0.1, pos, SEED)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            with pytest.raises(ValueError, match="^residual_norm: the mode is fused, but tensors are on cpu"):
                ops.residual_norm(x, branch, weight, bias, 1e-5, 0.1, pos, SEED)
