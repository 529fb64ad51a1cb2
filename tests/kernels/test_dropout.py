"""Dropout's cases, zeros that are kept, its gradient."""

import pytest
import torch
from unit_fast_kernels import dropout as module
from unit_fast_kernels.dropout import dropout_cpu, dropout_reference
from unit_fast_kernels.shared.philox import keep_elements
from unit_fast_kernels.shared.random import keep_mask

from tests.kernels.cases import Cases, Problem, as_it_is, exact, launched, patched
from tests.kernels.common import SEED, values_and_gradients

PATHS = {
    "reference": patched(module, FEW=1 << 30, CHUNK=1 << 18, SAVED=1 << 20),
    "saved": patched(module, FEW=0, CHUNK=1 << 12, SAVED=1 << 30),
    "drawn_again": patched(module, FEW=0, CHUNK=1 << 12, SAVED=0),
}


def make(shape, dropout_p):
    x = exact(*shape, rng=torch.Generator().manual_seed(1))
    return Problem({"x": x}, {"dropout_p": dropout_p, "seed": SEED})


def also(arguments, found):
    """Exactly the stated elements are dropped, and the gradients of the same."""
    x, dropout_p = arguments["x"], arguments["dropout_p"]
    if dropout_p:
        keep = keep_elements(x.shape, dropout_p, arguments["seed"])
        assert torch.equal(found[0] != 0, keep & (x != 0))
        assert torch.equal(found[1] != 0, keep)


CASES = Cases(
    op="dropout",
    sizes={
        "one": (1,), "row": (1, 8), "odd": (3, 7, 5), "block": (1024,), "tail": (2, 4099), "many": (5, 300, 211),
        "empty": (0, 4), "scalar": (),
    },
    make=make,
    settings={"p10": {"dropout_p": 0.1}, "p60": {"dropout_p": 0.6}, "p0": {"dropout_p": 0.0}},
    main=("p10",),
    keep=lambda x, dropout_p, seed: keep_elements(x.shape, dropout_p, seed),
    dropped=lambda op, seed: op(torch.ones(1000, 1024), 0.1, seed) == 0,
    ways={"cpu": PATHS, "fused": {"as_it_is": as_it_is, "blocks_of_8": launched(block=8, warps=1)}},
    close={"rtol": 1e-15, "atol": 0},
    skip=lambda way, size, setting, dtype: (
        (size == "many" and way not in PATHS) or (way == "blocks_of_8" and size != "odd")
    ),
    also=also,
    dynamic=("odd", "tail"),
    card={"bert_base_embeddings": (32, 129, 768)},
    valid=lambda: {"x": torch.ones(3), "dropout_p": 0.1, "seed": SEED},
    refusals=[
        ({"x": torch.ones(3, dtype=torch.int64)}, r"x is torch.int64; it must be floating point"),
        ({"dropout_p": 1.0}, r"dropout_p is 1.0; it must be at least 0 and below 1"),
        ({"dropout_p": float("nan")}, r"dropout_p is nan"),
        ({"seed": None}, r"seed is None; with dropout_p > 0 it must be"),
        ({"seed": SEED[:1]}, r"seed is torch.int64 of shape \[1\]; it must be int64 of shape \[2\]"),
    ],
    unfit=[({"x": torch.ones(3, dtype=torch.float64)}, "x is torch.float64")],
)  # fmt: skip


@pytest.fixture(params=PATHS)
def path(request):
    with PATHS[request.param](None):
        yield


def test_a_zero_that_is_kept_passes_its_gradient(path):
    x = torch.randn(3, 8, 50, dtype=torch.float64).transpose(0, 2)
    x[1] = 0.0
    upstream = torch.randn(x.shape, dtype=torch.float64)
    ours = values_and_gradients(lambda x: dropout_cpu(x, 0.1, SEED), [x], upstream)
    keep = keep_mask(x.shape, 0.1, SEED)
    expected = values_and_gradients(lambda x: dropout_reference(x, 0.1, None, keep), [x.contiguous()], upstream)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


def test_gradcheck(path):
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout_cpu(x, 0.3, SEED), x)
