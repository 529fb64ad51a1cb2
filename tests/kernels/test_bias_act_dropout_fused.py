"""The fused feed-forward epilogue: bounds, memory, fakes, compilation, dtypes, replay of the dropped elements.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import pytest
import torch
from unit_fast_kernels import bias_act_dropout as module
from unit_fast_kernels.bias_act_dropout import bias_act_dropout_fused, bias_act_dropout_reference
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
    "tail": (2, 13, 130),
    "many": (2, 40, 96),
    "two_tiles": (3, 300),
    "one_dim": (40,),
    "empty": (0, 3, 8),
    "no_columns": (3, 0),
}
ACTS = ["relu", "gelu"]


def _inputs(shape, seed=2):
    """x, bias and the upstream gradient, exact in bf16; the first column is zero, where ReLU passes no gradient."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (shape, shape[-1:], shape)
    x, bias, upstream = (torch.randn(s, generator=rng, dtype=torch.float64).bfloat16().double() for s in shapes)
    x[..., :1], bias[:1] = 0.0, 0.0
    return x, bias, upstream


def _fused(act, dropout_p, seed=SEED):
    return lambda x, bias=None: bias_act_dropout_fused(x, bias, act, dropout_p, seed)


def _check(inputs, low, upstream, act, dropout_p, *dtypes):
    keep = keep_elements(upstream.shape, dropout_p, SEED)

    def reference(x, bias=None):
        return bias_act_dropout_reference(x, bias, act, dropout_p, keep=keep)

    exact, eager = (values_and_gradients(reference, x, upstream) for x in (inputs, low))
    assert_as_good_as_eager(values_and_gradients(_fused(act, dropout_p), low, upstream), eager, exact, *dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", SIZES)
def test_is_as_good_as_eager(name, act, with_bias, dtype):
    x, bias, upstream = _inputs(SIZES[name])
    inputs = [x, bias] if with_bias else [x]
    _check(inputs, [t.to(dtype) for t in inputs], upstream, act, 0.1, dtype)


@pytest.mark.parametrize("act", ACTS)
def test_without_dropout_and_far_out(act):
    x = torch.linspace(-12, 12, 512, dtype=torch.float64).bfloat16().double()[None]
    for dtype in (torch.float32, torch.bfloat16):
        _check([x], [x.to(dtype)], torch.ones_like(x), act, 0.0, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_error_function(dtype):
    """What bf16 and fp16 take in place of erf is within 2e-7 of it, value and slope, before rounding."""
    if not INTERPRETING:
        pytest.skip("the registered reference takes torch.erf")
    x = torch.linspace(-6, 6, 1024, dtype=torch.float64).to(dtype)[None]
    y = torch.empty(x.shape, dtype=torch.float32)
    module._bias_act_dropout_fwd_kernel[(1, 1)](
        x, None, None, y, 1, 1.0, 0, C=1024, R=1, BLOCK=1024, GELU=True, ERF=False, num_warps=4
    )
    exact = torch.nn.functional.gelu(x.double())
    assert float((y - exact).abs().max()) < 6 * 2e-7
    dx = torch.empty_like(y)
    module._bias_act_dropout_bwd_kernel[(1, 1)](
        torch.ones_like(y), x, None, None, dx, None, 1, 1.0, 0, C=1024, R=1, BLOCK=1024, GELU=True, ERF=False
    )
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(wide).sum(), wide)
    assert float((dx - slope).abs().max()) < 1e-6


@pytest.mark.parametrize("act", ACTS)
def test_bfloat16_with_a_float32_bias_is_float32(act):
    x, bias, upstream = _inputs(SIZES["tail"])
    mixed = [x.bfloat16(), bias.float()]
    _check([x, bias], mixed, upstream, act, 0.1, torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_dtypes_under_autocast_are_those_of_the_reference(act, bias):
    x, bias = torch.ones(2, 8, dtype=torch.bfloat16), None if bias is None else torch.ones(8, dtype=bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = bias_act_dropout_fused(x, bias, act, 0.1, SEED)
        expected = bias_act_dropout_reference(x, bias, act, 0.1, SEED)
    assert found.dtype == expected.dtype


def test_not_a_number_stays_one():
    x = torch.tensor([[float("nan"), 1.0, -1.0, float("inf")] * 2]).requires_grad_()
    y = bias_act_dropout_fused(x, None, "relu")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y[0].isnan().tolist() == [True, False, False, False] * 2
    assert y[0, 3].item() == float("inf")
    assert grad[0].tolist() == [1.0, 1.0, 0.0, 1.0] * 2  # as eager's


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
def test_encoder_of_unit_on_a_gpu(act):
    shape = (2, 4201, 2048)
    x, upstream = (torch.randn(shape, device="cuda").bfloat16().double() for _ in range(2))
    bias, seed = torch.randn(2048, device="cuda").bfloat16().double(), SEED.cuda()
    keep = keep_elements(shape, 0.1, seed)

    def reference(x, bias):
        return bias_act_dropout_reference(x, bias, act, 0.1, keep=keep)

    low = [x.bfloat16(), bias.bfloat16()]
    exact, eager = (values_and_gradients(reference, inputs, upstream) for inputs in ([x, bias], low))
    runs = [values_and_gradients(_fused(act, 0.1, seed), low, upstream) for _ in range(2)]
    assert_as_good_as_eager(runs[0], eager, exact, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["odd", "tail", "two_tiles", "empty"])
def test_reads_inside_and_writes_everything(name, act, monkeypatch):
    *inputs, upstream = (t.float() for t in _inputs(SIZES[name]))
    plain = values_and_gradients(_fused(act, 0.1), inputs, upstream)
    poison_new_memory(monkeypatch)
    leaves = [guarded(t).requires_grad_() for t in inputs]
    before = [t.detach().clone() for t in leaves]
    out = _fused(act, 0.1, guarded(SEED))(*leaves)
    poisoned = [out, *torch.autograd.grad(out, leaves, guarded(upstream))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("act", ACTS)
def test_strided_inputs(act):
    x, bias, upstream = (t.float() for t in _inputs((4, 6, 16)))
    dense = values_and_gradients(_fused(act, 0.1), [x, bias], upstream)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((bias, bias), 1)[:, 0]]
    seed = torch.stack((SEED, SEED), 1)[:, 0]
    found = values_and_gradients(_fused(act, 0.1, seed), strided, upstream.mT.contiguous().mT)
    for a, b in zip(dense, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("act", "with_bias", "dropout_p"), [("relu", False, 0.1), ("gelu", True, 0.1), ("gelu", 0, 0)])
def test_registration(act, with_bias, dropout_p, dtype, strided):
    x, bias, upstream = (t.float() for t in _inputs((3, 6, 16)))
    x = x.to(dtype)
    if strided:
        x, upstream = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, upstream))
    bias, seed = bias if with_bias else None, SEED if dropout_p else None
    y = module._forward(x, bias, seed, act, dropout_p)
    backward = (upstream.to(y.dtype), y if act == "relu" else x, bias, seed, act, dropout_p, x.dtype)
    for op, arguments in ((module._forward, (x, bias, seed, act, dropout_p)), (module._backward, backward)):
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("act", ACTS)
def test_compiles_whole(act):
    def function(x, bias, seed):
        return bias_act_dropout_fused(x, bias, act, 0.1, seed)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for length in (6, 11) if dynamic else (6,):
            *inputs, upstream = (t.float() for t in _inputs((2, length, 16)))
            results = [
                values_and_gradients(lambda *t, f=f: f(*t, SEED), inputs, upstream) for f in (function, compiled)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_share_of_dropped_elements_and_seeds(act, monkeypatch):
    many_rows = {"bias_act_dropout_fwd": {"width1024": {"rows": 128, "columns": 1024}}}  # few programs to interpret
    monkeypatch.setattr(_tuned, "table", lambda card: many_rows)
    ones = torch.ones(1024, 1024)

    def dropped(seed):
        return bias_act_dropout_fused(ones, None, act, 0.1, seed) == 0

    first = dropped(SEED)
    assert within_sigmas(int(first.sum()), first.numel(), 0.1)
    assert torch.equal(first, ~keep_elements(first.shape, 0.1, SEED))
    both = first & dropped(SEED + torch.tensor([0, 1]))
    assert within_sigmas(int(both.sum()), both.numel(), 0.01)


@pytest.mark.parametrize("width", [24, 300])
def test_decisions_do_not_depend_on_launch_parameters(width, monkeypatch):
    *inputs, upstream = (t.float() for t in _inputs((2, 9, width)))
    first = values_and_gradients(_fused("gelu", 0.1), inputs, upstream)
    bucket = f"width{module.power_of_two(width)}"
    other = {
        "bias_act_dropout_fwd": {bucket: {"columns": 16, "rows": 4, "warps": 1}},
        "bias_act_dropout_bwd": {bucket: {"columns": 64, "rows": 2, "warps": 1, "programs": 1}},
    }
    monkeypatch.setattr(_tuned, "table", lambda card: other)
    second = values_and_gradients(_fused("gelu", 0.1), inputs, upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
def test_two_runs_are_equal(act):
    *inputs, upstream = (t.bfloat16() for t in _inputs(SIZES["many"]))
    runs = [values_and_gradients(_fused(act, 0.1), inputs, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- What does not fit ------------------------------------------------------------------------------------------------

X, C = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("x", "bias", "text"),
    [
        (X.double(), None, "x is torch.float64: convert it to float32, bfloat16 or float16"),
        (X, C.double(), "bias is torch.float64: convert it"),
        (torch.tensor(1.0), None, "x has no dimension: give it one"),
        (torch.ones(1).expand(1, 2**20 + 1), None, "the width is 1048577: kernels exist for up to 1048576"),
        (torch.ones(1).expand(2**31, 1), None, r"x has 2\^31 rows or more: split it"),
    ],
)
def test_unfit_arguments_are_told(x, bias, text):
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^bias_act_dropout: the mode is fused, but {text}"):
        ops.bias_act_dropout(x, bias, "relu")


def test_fused_mode_calls_the_kernels_or_says_why_not():
    x, bias, _ = (t.float() for t in _inputs((2, 3, 8)))
    with ops.kernels("fused"):
        if INTERPRETING:
            found = ops.bias_act_dropout(x, bias, "gelu", 0.1, SEED)
            assert torch.equal(found, bias_act_dropout_fused(x, bias, "gelu", 0.1, SEED))
        else:
            with pytest.raises(ValueError, match="^bias_act_dropout: the mode is fused, but tensors are on cpu"):
                ops.bias_act_dropout(x, bias, "gelu", 0.1, SEED)
