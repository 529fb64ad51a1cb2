"""The feed-forward epilogue against its reference: both activations, with and without bias and dropout."""

import pytest
import torch
from unit_fast_kernels.bias_act_dropout import bias_act_dropout_cpu, bias_act_dropout_reference
from unit_fast_kernels.shared.random import keep_mask

from tests.kernels.common import SEED, assert_as_good_as_eager, values_and_gradients, within_sigmas
from unit_fast import ops

SIZES = {"row": (1, 5), "odd": (3, 7, 13), "tail": (33, 130), "many": (2, 700, 96), "empty": (0, 8)}


def _inputs(name):
    rng = torch.Generator().manual_seed(2)
    shape = SIZES[name]
    shapes = (shape, shape[-1:], shape)
    return [torch.randn(s, generator=rng, dtype=torch.float64).bfloat16().double() for s in shapes]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_equals_the_reference(name, act, dropout_p):
    x, bias, upstream = _inputs(name)
    x[..., 0], bias[0] = 0.0, 0.0  # at zero ReLU passes no gradient
    for inputs in ([x, bias], [x]):
        results = [
            values_and_gradients(
                lambda x, b=None, op=op: op(x, b, act, dropout_p, SEED),
                inputs,
                upstream,
            )
            for op in (bias_act_dropout_cpu, bias_act_dropout_reference)
        ]
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_low_precision_is_as_good_as_eager(act, dtype):
    x, bias, upstream = _inputs("many")
    keep = keep_mask(x.shape, 0.1, SEED)

    def reference(x, bias):
        return bias_act_dropout_reference(x, bias, act, 0.1, keep=keep)

    low = [x.to(dtype), bias.to(dtype)]
    exact, eager = (values_and_gradients(reference, inputs, upstream) for inputs in ([x, bias], low))
    ours = values_and_gradients(lambda x, b: bias_act_dropout_cpu(x, b, act, 0.1, SEED), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def test_gelu_is_the_erf_form():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(bias_act_dropout_cpu(x, None, "gelu"), expected, rtol=1e-13, atol=1e-15)


def test_share_replay_and_seeds():
    x = torch.ones(1000, 1024)
    first = bias_act_dropout_cpu(x, None, "relu", 0.1, SEED)
    assert within_sigmas(int((first == 0).sum()), x.numel(), 0.1)
    assert torch.equal(first, bias_act_dropout_cpu(x, None, "relu", 0.1, SEED))
    assert not torch.equal(first, bias_act_dropout_cpu(x, None, "relu", 0.1, SEED + 1))


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_gradcheck_on_strided_input(act):
    x = torch.randn(9, 5, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(lambda x, b: bias_act_dropout_cpu(x, b, act, 0.3, SEED), (x, bias))
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.ones(2, 3), None, "rely"), r"act is 'rely'; nearest: relu"),
        ((torch.ones(2, 3).int(), None, "relu"), r"x is torch.int32; it must be floating point"),
        ((torch.ones(2, 3), torch.ones(2), "relu"), r"bias is of shape \[2\]; it must be \[C\] = \[3\]"),
        ((torch.ones(2, 3), None, "relu", 1.5, SEED), r"dropout_p is 1.5"),
        ((torch.ones(2, 3), None, "relu", 0.1), r"seed is None"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=f"^bias_act_dropout: {text}"):
        ops.bias_act_dropout(*arguments)
