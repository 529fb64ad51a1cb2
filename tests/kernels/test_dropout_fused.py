"""The fused dropout: bounds, decisions, memory, fakes, compilation, replay.

Under ``TRITON_INTERPRET=1`` the kernel runs; else the reference that is registered for the CPU."""

import pytest
import torch
from unit_fast_kernels import dropout as module
from unit_fast_kernels.dropout import dropout_fused, dropout_reference
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

SIZES = {"one": (1,), "odd": (3, 7, 5), "block": (1024,), "tail": (2, 4099), "empty": (0, 4), "scalar": ()}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(shape, device="cpu"):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).bfloat16().double().to(device) for _ in "xg"]


def _check(shape, dropout_p, dtype, device="cpu"):
    x, upstream = _inputs(shape, device)
    seed = SEED.to(device)
    keep = keep_elements(x.shape, dropout_p, seed)

    def reference(x):
        return dropout_reference(x, dropout_p, None, keep)

    exact, eager = (values_and_gradients(reference, [x.to(d)], upstream) for d in (torch.float64, dtype))
    ours = values_and_gradients(lambda x: dropout_fused(x, dropout_p, seed), [x.to(dtype)], upstream)
    assert_as_good_as_eager(ours, eager, exact, dtype)
    if dropout_p:
        assert torch.equal(ours[0] != 0, keep & (x != 0))
        assert torch.equal(ours[1] != 0, keep & (upstream != 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("name", SIZES)
def test_drops_the_stated_elements(name, dropout_p, dtype):
    _check(SIZES[name], dropout_p, dtype)


@pytest.mark.gpu
def test_text_embeddings_on_a_gpu():
    _check((32, 129, 768), 0.1, torch.bfloat16, "cuda")


@pytest.mark.parametrize("block", [8, 64, 512])
def test_decisions_do_not_depend_on_the_block(block, monkeypatch):
    x = torch.ones(3, 333)
    first = dropout_fused(x, 0.3, SEED)
    monkeypatch.setattr(module, "_default", lambda: {"block": block, "warps": 1})
    assert torch.equal(dropout_fused(x, 0.3, SEED), first)


@pytest.mark.parametrize("name", ["odd", "tail", "empty"])
def test_reads_inside_and_writes_everything(name, monkeypatch):
    x, upstream = (t.float() for t in _inputs(SIZES[name]))
    plain = values_and_gradients(lambda x: dropout_fused(x, 0.1, SEED), [x], upstream)
    poison_new_memory(monkeypatch)
    leaf = guarded(x).requires_grad_()
    out = dropout_fused(leaf, 0.1, guarded(SEED))
    poisoned = [out, *torch.autograd.grad(out, leaf, guarded(upstream))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert torch.equal(leaf, x)


def test_strided_input():
    x = torch.randn(4, 6, 5)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(dropout_fused(strided, 0.4, SEED), dropout_fused(x, 0.4, SEED))


@pytest.mark.parametrize("strided", [False, True])
def test_operator_is_registered_as_torch_asks(strided):
    x = torch.randn(3, 5, 7)
    x = x.transpose(0, 2) if strided else x
    torch.library.opcheck(module._apply, (x, 0.2, SEED))
    assert_fake_is_real(module._apply, x, 0.2, SEED)


@pytest.mark.skipif(INTERPRETING, reason="torch.compile cannot trace the interpreter")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    compiled = torch.compile(
        lambda x, seed: dropout_fused(x, 0.2, seed), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for rows in (3, 6):
        x, upstream = torch.randn(rows, 9), torch.randn(rows, 9)
        ours, plain = (
            values_and_gradients(lambda x, f=f: f(x, SEED), [x], upstream)
            for f in (compiled, lambda x, seed: dropout_fused(x, 0.2, seed))
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))


def test_share_replay_and_seeds():
    x = torch.ones(1000, 1024)
    first = dropout_fused(x, 0.1, SEED)
    assert within_sigmas(int((first == 0).sum()), x.numel(), 0.1)
    assert torch.equal(first, dropout_fused(x, 0.1, SEED))
    assert not torch.equal(first, dropout_fused(x, 0.1, SEED + 1))


def test_refuses_float64_by_name():
    with ops.kernels("fused"), pytest.raises(ValueError, match=r"^dropout: the mode is fused, but x is torch.float64"):
        ops.dropout(torch.ones(3, dtype=torch.float64), 0.1, SEED)
    if not INTERPRETING:
        with (
            ops.kernels("fused"),
            pytest.raises(ValueError, match="move them to CUDA, or start Python with TRITON_INT"),
        ):
            ops.dropout(torch.ones(3), 0.1, SEED)
