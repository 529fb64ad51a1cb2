"""Dropout: the decisions of the reference, its backward, the share, each refusal."""

import pytest
import torch
from unit_fast_kernels import dropout as module
from unit_fast_kernels.dropout import dropout_cpu, dropout_reference
from unit_fast_kernels.shared.random import keep_mask

from tests.kernels.common import SEED, assert_as_good_as_eager, values_and_gradients, within_sigmas
from unit_fast import ops

SIZES = {"row": (1,), "odd": (3, 7, 5), "tail": (2, 4099), "many": (5, 300, 211), "empty": (0, 4), "scalar": ()}
# FEW, CHUNK, SAVED
PATHS = {
    "reference": (1 << 30, 1 << 18, 1 << 20),
    "saved": (0, 1 << 12, 1 << 30),
    "drawn_again": (0, 1 << 12, 0),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    for name, value in zip(("FEW", "CHUNK", "SAVED"), PATHS[request.param]):
        monkeypatch.setattr(module, name, value)
    return request.param


def _inputs(name):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(SIZES[name], generator=rng, dtype=torch.float64).bfloat16().double() for _ in "xg"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.6])
def test_equals_the_reference(path, name, dropout_p):
    x, upstream = _inputs(name)
    ours = values_and_gradients(lambda x: dropout_cpu(x, dropout_p, SEED), [x], upstream)
    expected = values_and_gradients(lambda x: dropout_reference(x, dropout_p, SEED), [x], upstream)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(path, dtype):
    x, upstream = _inputs("many")
    keep = keep_mask(x.shape, 0.1, SEED)
    exact = values_and_gradients(lambda x: dropout_reference(x, 0.1, None, keep), [x], upstream)
    eager = values_and_gradients(lambda x: dropout_reference(x, 0.1, None, keep), [x.to(dtype)], upstream)
    ours = values_and_gradients(lambda x: dropout_cpu(x, 0.1, SEED), [x.to(dtype)], upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)


def test_share_replay_and_seeds(path):
    x = torch.ones(1000, 1024)
    first = dropout_cpu(x, 0.1, SEED)
    assert within_sigmas(int((first == 0).sum()), x.numel(), 0.1)
    assert torch.equal(first, dropout_cpu(x, 0.1, SEED))
    assert not torch.equal(first, dropout_cpu(x, 0.1, SEED + 1))


def test_strided_input_zeros_in_it_and_no_writing(path):
    x, upstream = _inputs("many")
    x = x.transpose(0, 2).clone(memory_format=torch.contiguous_format).transpose(0, 2)
    x[1] = 0.0  # a zero that is kept must still pass its gradient
    before, before_upstream = x.clone(), upstream.clone()
    ours = values_and_gradients(lambda x: dropout_cpu(x, 0.1, SEED), [x], upstream)
    keep = keep_mask(x.shape, 0.1, SEED)
    expected = values_and_gradients(lambda x: dropout_reference(x, 0.1, None, keep), [x.contiguous()], upstream)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)
    assert torch.equal(x, before)
    assert torch.equal(upstream, before_upstream)


def test_gradcheck(path):
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout_cpu(x, 0.3, SEED), x)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.ones(3, dtype=torch.int64), 0.1, SEED), r"x is torch.int64; it must be floating point"),
        ((torch.ones(3), 1.0, SEED), r"dropout_p is 1.0; it must be at least 0 and below 1"),
        ((torch.ones(3), float("nan"), SEED), r"dropout_p is nan"),
        ((torch.ones(3), 0.1, None), r"seed is None; with dropout_p > 0 it must be"),
        ((torch.ones(3), 0.1, SEED[:1]), r"seed is torch.int64 of shape \[1\]; it must be int64 of shape \[2\]"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=f"^dropout: {text}"):
        ops.dropout(*arguments)
