"""Post-norm residual: value, every gradient, the sum with positions, mixed precision, each refusal."""

import pytest
import torch
import torch.nn.functional as F
from unit_fast_kernels import residual_norm as module
from unit_fast_kernels.residual_norm import residual_norm_cpu, residual_norm_reference
from unit_fast_kernels.shared.random import keep_mask

from tests.kernels.common import SEED, assert_as_good_as_eager, values_and_gradients, within_sigmas
from unit_fast import ops

SIZES = {"row": (1, 8), "odd": (3, 5, 7), "tail": (2, 33, 130), "many": (2, 700, 96), "empty": (0, 3, 8)}


@pytest.fixture(params=["reference", "function"])
def path(request, monkeypatch):
    monkeypatch.setattr(module, "FEW", {"reference": 1 << 30, "function": 0}[request.param])
    return request.param


def _inputs(name):
    """x, branch, weight, bias, pos and the upstream gradient."""
    rng = torch.Generator().manual_seed(4)
    shape = SIZES[name]
    shapes = (shape, shape, shape[-1:], shape[-1:], shape[1:], shape)
    return [torch.randn(s, generator=rng, dtype=torch.float64).bfloat16().double() for s in shapes]


def _both(op, dropout_p, **keywords):
    """y and y + pos weighted into one tensor, so that both outputs' gradients count."""

    def function(x, branch, weight, bias, pos):
        y, y_pos = op(x, branch, weight, bias, 1e-5, dropout_p, pos, **keywords)
        return y + 0.5 * y_pos

    return function


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_equals_the_reference(path, name, dropout_p):
    *inputs, upstream = _inputs(name)
    ours = values_and_gradients(_both(residual_norm_cpu, dropout_p, seed=SEED), inputs, upstream)
    expected = values_and_gradients(_both(residual_norm_reference, dropout_p, seed=SEED), inputs, upstream)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_is_layer_norm_of_the_sum():
    x, branch, weight, bias, pos, _ = _inputs("odd")
    y, y_pos = ops.residual_norm(x, branch, weight, bias, 1e-5, 0.0, pos)
    expected = F.layer_norm(x + branch, (7,), weight, bias, 1e-5)
    assert torch.equal(y, expected)
    assert torch.equal(y_pos, expected + pos)
    assert ops.residual_norm(x, branch, weight, bias, 1e-5)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(path, dtype):
    *inputs, upstream = _inputs("many")
    keep = keep_mask(inputs[0].shape, 0.1, SEED)
    low = [x.to(dtype) for x in inputs]
    exact = values_and_gradients(_both(residual_norm_reference, 0.1, keep=keep), inputs, upstream)
    eager = values_and_gradients(_both(residual_norm_reference, 0.1, keep=keep), low, upstream)
    ours = values_and_gradients(_both(residual_norm_cpu, 0.1, seed=SEED), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def test_float32_stream_with_a_bfloat16_branch(path):
    *inputs, upstream = _inputs("many")
    mixed = [x.bfloat16() if i == 1 else x.float() for i, x in enumerate(inputs)]
    exact, eager = (
        values_and_gradients(_both(residual_norm_reference, 0.1, seed=SEED), x, upstream) for x in (inputs, mixed)
    )
    ours = values_and_gradients(_both(residual_norm_cpu, 0.1, seed=SEED), mixed, upstream)
    wide = torch.float32
    assert_as_good_as_eager(ours, eager, exact, wide, wide, torch.bfloat16, wide, wide, wide)


def test_share_replay_and_seeds(path):
    """Without a stream and with the statistics of LayerNorm undone, a dropped element shows as the row's smallest."""
    ones, zeros = torch.ones(1000, 1024), torch.zeros(1000, 1024)
    weight, bias = torch.ones(1024), torch.zeros(1024)
    first = residual_norm_cpu(zeros, ones, weight, bias, 1e-5, 0.1, None, SEED)[0]
    assert within_sigmas(int((first < 0).sum()), first.numel(), 0.1)
    assert torch.equal(first, residual_norm_cpu(zeros, ones, weight, bias, 1e-5, 0.1, None, SEED)[0])
    assert not torch.equal(first, residual_norm_cpu(zeros, ones, weight, bias, 1e-5, 0.1, None, SEED + 1)[0])


def test_gradcheck_on_strided_inputs(path):
    inputs = [x[..., :2, :5].transpose(0, 1).requires_grad_() for x in _inputs("odd")[:2]]
    inputs += [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in "wbp"]
    before = [x.detach().clone() for x in inputs]
    assert torch.autograd.gradcheck(_both(residual_norm_cpu, 0.3, seed=SEED), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


X, C = torch.ones(2, 3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X, X[:1], C, C, 1e-5), r"branch is of shape \[1, 3, 4\]; it must be the shape of x = \[2, 3, 4\]"),
        ((X, X, C[:3], C, 1e-5), r"weight is of shape \[3\]; it must be \[C\] = \[4\]"),
        ((X, X, C, C[:3], 1e-5), r"bias is of shape \[3\]; it must be \[C\] = \[4\]"),
        ((X, X.int(), C, C, 1e-5), r"branch is torch.int32; it must be floating point"),
        ((X, X, C, C, 1e-5, 0.0, X[:, :2]), r"pos is of shape \[2, 2, 4\]; it must broadcast to x, \[2, 3, 4\]"),
        ((X, X, C, C, 1e-5, 1.0, None, SEED), r"dropout_p is 1.0"),
        ((X, X, C, C, 1e-5, 0.1), r"seed is None"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=f"^residual_norm: {text}"):
        ops.residual_norm(*arguments)
