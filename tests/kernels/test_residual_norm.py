"""Post-norm residual: its cases, one output asked for, positions of every broadcast, dtypes under autocast."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from unit_fast_kernels import residual_norm as module
from unit_fast_kernels.residual_norm import residual_norm_cpu, residual_norm_fused, residual_norm_reference
from unit_fast_kernels.shared.philox import keep_elements

from tests.kernels.cases import Cases, Problem, as_it_is, check, exact, launched, patched
from tests.kernels.common import SEED
from unit_fast import ops

PATHS = {"reference": patched(module, FEW=1 << 30), "function": patched(module, FEW=0)}


def make(shape, dropout_p=0.1, pos_shape=None, **dtypes):
    """pos is one for all of the first dimension, or of ``pos_shape`` (): none."""
    rng = torch.Generator().manual_seed(4)
    inputs = {"x": exact(*shape, rng=rng), "branch": exact(*shape, rng=rng)}
    inputs |= {"weight": exact(shape[-1], rng=rng), "bias": exact(shape[-1], rng=rng)}
    if pos_shape != ():
        pos_shape = pos_shape or (shape[1:] if len(shape) > 1 else shape)
        inputs["pos"] = exact(*pos_shape, rng=rng)
    return Problem(inputs, {"eps": 1e-5, "dropout_p": dropout_p, "seed": SEED}, dtypes)


def out(results):
    """y and y + pos weighted into one tensor, so that both outputs' gradients count."""
    y, y_pos = results
    return y if y_pos is None else y + 0.5 * y_pos


def dropped(op, seed):
    """Without a stream and with equal elements, a dropped one is below the row's mean."""
    zeros, ones = torch.zeros(1024, 1024), torch.ones(1024, 1024)
    with launched(rows=128)(None):  # fewer programs: the interpreter takes each alone
        return op(zeros, ones, torch.ones(1024), torch.zeros(1024), 1e-5, 0.1, None, seed)[0] < 0


X, C = torch.ones(2, 3, 4), torch.ones(4)
WIDE = torch.ones(1, 4097)
LONG = torch.ones(1).expand(2**31, 1)
CASES = Cases(
    op="residual_norm",
    sizes={
        "row": (1, 8), "odd": (3, 5, 7), "tail": (2, 33, 130), "many": (2, 700, 96), "rows": (2, 40, 96),
        "wide": (3, 1000), "widest": (1, 4095), "four_dims": (2, 1, 3, 24), "one_dim": (40,), "empty": (0, 3, 8),
    },
    make=make,
    settings={
        "p10": {},
        "p0": {"dropout_p": 0.0},
        "alone": {"pos_shape": ()},
        "bf16_branch": {"branch": torch.bfloat16},
    },
    out=out,
    keep=lambda **a: keep_elements(a["x"].shape, a["dropout_p"], a["seed"]),
    dropped=dropped,
    ways={"cpu": PATHS, "fused": {"as_it_is": as_it_is, "two_rows": launched(rows=2, warps=2, programs=1)}},
    close={"rtol": 1e-12, "atol": 1e-12},
    cpu_low=("many",),
    skip=lambda way, size, setting, dtype: (
        (size == "many" and way not in PATHS)
        or (setting in ("alone", "bf16_branch") and (size not in ("tail", "many") or dtype == torch.float16))
        or (way == "two_rows" and (size not in ("tail", "four_dims") or dtype != torch.float32))
    ),
    memory=("odd", "tail", "wide", "empty"),
    card={"unit_encoder": (2, 4201, 256)},
    valid=lambda: {"x": X, "branch": X, "weight": C, "bias": C, "eps": 1e-5, "dropout_p": 0.1, "pos": X, "seed": SEED},
    refusals=[
        ({"branch": X[:1]}, r"branch is of shape \[1, 3, 4\]; it must be the shape of x = \[2, 3, 4\]"),
        ({"weight": C[:3]}, r"weight is of shape \[3\]; it must be \[C\] = \[4\]"),
        ({"bias": C[:3]}, r"bias is of shape \[3\]; it must be \[C\] = \[4\]"),
        ({"branch": X.int()}, r"branch is torch.int32; it must be floating point"),
        ({"pos": X[:, :2]}, r"pos is of shape \[2, 2, 4\]; it must broadcast to x, \[2, 3, 4\]"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0"),
        ({"seed": None}, r"seed is None"),
    ],
    unfit=[
        ({"x": X.double()}, "x is torch.float64: convert it to float32, bfloat16 or float16"),
        ({"weight": C.double()}, "weight is torch.float64: convert it"),
        ({"pos": X.double()}, "pos is torch.float64: convert it"),
        ({"weight": C.half()}, "weight is torch.float16 and bias torch.float32: give them one dtype"),
        (
            {"x": WIDE, "branch": WIDE, "weight": WIDE[0], "bias": WIDE[0], "pos": None},
            "the width is 4097: kernels exist for 1 to 4096",
        ),
        (
            {"x": LONG, "branch": LONG, "weight": C[:1], "bias": C[:1], "pos": None},
            r"x has 2\^31 rows or more: split it",
        ),
    ],
)  # fmt: skip


@pytest.fixture(params=PATHS)
def path(request):
    with PATHS[request.param](None):
        yield


def test_is_layer_norm_of_the_sum():
    x, branch, weight, bias, pos = make((3, 5, 7)).inputs.values()
    y, y_pos = ops.residual_norm(x, branch, weight, bias, 1e-5, 0.0, pos)
    expected = F.layer_norm(x + branch, (7,), weight, bias, 1e-5)
    assert torch.equal(y, expected)
    assert torch.equal(y_pos, expected + pos)
    assert ops.residual_norm(x, branch, weight, bias, 1e-5)[1] is None


def test_gradcheck_on_strided_inputs(path):
    inputs = [x[..., :2, :5].transpose(0, 1).requires_grad_() for x in list(make((3, 5, 7)).inputs.values())[:2]]
    inputs += [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in "wbp"]

    def function(x, branch, weight, bias, pos):
        return out(residual_norm_cpu(x, branch, weight, bias, 1e-5, 0.3, pos, SEED))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("used", ["y", "y_pos", "none"])
def test_gradients_of_one_output(used):
    """A gradient that does not come is not read; what needs none gets none."""
    leaves = [t.float().requires_grad_() for t in make((2, 5, 24)).inputs.values()]
    upstream = torch.randn(2, 5, 24)
    x, branch, weight, bias, pos = leaves
    keep = keep_elements(x.shape, 0.1, SEED)
    gradients = []
    for op, keywords in ((residual_norm_fused, {"seed": SEED}), (residual_norm_reference, {"keep": keep})):
        y, y_pos = op(x, branch, weight, bias, 1e-5, 0.1, pos, **keywords)
        total = {"y": y, "y_pos": y_pos, "none": (y + y_pos) * 0.0}[used]
        gradients.append(torch.autograd.grad(total, leaves, upstream, allow_unused=True))
    for ours, theirs in zip(*gradients):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pos_shape", [(2, 6, 16), (1, 6, 16), (6, 16), (1, 1, 16), (16,), (2, 6, 1), (2, 1, 1)])
def test_positions_of_every_broadcast(pos_shape):
    problem = make((2, 6, 16), pos_shape=pos_shape)
    check(CASES, problem, "fused", torch.float32)
    x, *rest, pos = (t.float() for t in problem.inputs.values())
    expanded = pos.expand(x.shape)  # a view with strides of zero
    assert torch.equal(*(residual_norm_fused(x, *rest, 1e-5, 0.1, p, SEED)[1] for p in (pos, expanded)))


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
