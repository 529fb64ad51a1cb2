"""The feed-forward epilogue: its cases, both activations far out, dtypes under autocast, NaN."""

import pytest
import torch
from unit_fast_kernels import bias_act_dropout as module
from unit_fast_kernels.bias_act_dropout import bias_act_dropout_cpu, bias_act_dropout_fused, bias_act_dropout_reference
from unit_fast_kernels.shared.philox import keep_elements
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Cases, Problem, as_it_is, check, exact, launched
from tests.kernels.common import SEED

ACTS = ["relu", "gelu"]


def make(shape, act, bias=True, dropout_p=0.1, float32_bias=False):
    """The first column is zero, where ReLU passes no gradient."""
    rng = torch.Generator().manual_seed(2)
    inputs = {"x": exact(*shape, rng=rng), "bias": exact(shape[-1], rng=rng)}
    inputs["x"][..., :1], inputs["bias"][:1] = 0.0, 0.0
    others = {"act": act, "dropout_p": dropout_p, "seed": SEED}
    if not bias:
        others["bias"] = None
        del inputs["bias"]
    return Problem(inputs, others, {"bias": torch.float32} if float32_bias else {})


def dropped(op, seed):
    with launched(rows=128, columns=1024)(None):  # fewer programs: the interpreter takes each alone
        return op(torch.ones(1024, 1024), None, "relu", 0.1, seed) == 0


X, C = torch.ones(2, 4), torch.ones(4)
CASES = Cases(
    op="bias_act_dropout",
    sizes={
        "row": (1, 8), "odd": (3, 5, 7), "tail": (2, 13, 130), "many": (2, 700, 96), "rows": (2, 40, 96),
        "two_tiles": (3, 300), "one_dim": (40,), "empty": (0, 3, 8), "no_columns": (3, 0),
    },
    make=make,
    settings={
        "relu": {"act": "relu", "bias": False},
        "gelu_bias": {"act": "gelu"},
        "relu_bias": {"act": "relu"},
        "gelu": {"act": "gelu", "bias": False},
        "relu_p0": {"act": "relu", "dropout_p": 0.0},
        "gelu_p0": {"act": "gelu", "dropout_p": 0.0},
        "relu_float32_bias": {"act": "relu", "float32_bias": True},
        "gelu_float32_bias": {"act": "gelu", "float32_bias": True},
    },
    main=("gelu_bias", "relu", "relu_bias", "gelu_p0"),
    keep=lambda **a: keep_elements(a["x"].shape, a["dropout_p"], a["seed"]),
    dropped=dropped,
    ways={"fused": {"as_it_is": as_it_is, "small_tiles": launched(columns=16, rows=4, warps=1, programs=1)}},
    close={"rtol": 1e-13, "atol": 1e-14},
    cpu_low=("many",),
    skip=lambda way, size, setting, dtype: (
        (size == "many" and (INTERPRETING or dtype == torch.float16))
        or (setting.endswith(("_p0", "float32_bias")) and (size not in ("tail", "many") or dtype == torch.float16))
        or (way == "small_tiles" and (size, setting, dtype) != ("two_tiles", "gelu_bias", torch.float32))
    ),
    memory=("odd", "tail", "two_tiles", "empty"),
    card={"unit_encoder": (2, 4201, 2048)},
    valid=lambda: {"x": X, "bias": C, "act": "relu", "dropout_p": 0.1, "seed": SEED},
    refusals=[
        ({"act": "rely"}, r"act is 'rely'; nearest: relu"),
        ({"x": X.int()}, r"x is torch.int32; it must be floating point"),
        ({"bias": C[:2]}, r"bias is of shape \[2\]; it must be \[C\] = \[4\]"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5"),
        ({"seed": None}, r"seed is None"),
    ],
    unfit=[
        ({"x": X.double()}, "x is torch.float64: convert it to float32, bfloat16 or float16"),
        ({"bias": C.double()}, "bias is torch.float64: convert it"),
        ({"x": torch.tensor(1.0), "bias": None}, "x has no dimension: give it one"),
        (
            {"x": torch.ones(1).expand(1, 2**20 + 1), "bias": None},
            "the width is 1048577: kernels exist for up to 1048576",
        ),
        ({"x": torch.ones(1).expand(2**31, 1), "bias": None}, r"x has 2\^31 rows or more: split it"),
    ],
)  # fmt: skip


def test_gelu_is_the_erf_form():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(bias_act_dropout_cpu(x, None, "gelu"), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_gradcheck_on_strided_input(act):
    x = torch.randn(9, 5, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(lambda x, b: bias_act_dropout_cpu(x, b, act, 0.3, SEED), (x, bias))
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_far_out(act, dtype):
    x = torch.linspace(-12, 12, 512, dtype=torch.float64).bfloat16().double()[None]
    check(CASES, Problem({"x": x}, {"bias": None, "act": act}), "fused", dtype)


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
