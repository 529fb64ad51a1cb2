"""What the tests of the operators share: seeds, the derived error bound, gradients."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

SEED = torch.tensor([1234567890123, -42])


def values_and_gradients(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """function(*inputs) and its gradient with respect to each input, for the upstream gradient."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_as_good_as_eager(ours, eager, exact, *dtypes: torch.dtype) -> None:
    """Each of ours has its one of ``dtypes`` (or the only one) and is at most twice as far from the
    float64 result as eager arithmetic of the same precision is, plus a rounding band of four units in the last place of
    the largest value."""
    dtypes = dtypes * len(ours) if len(dtypes) == 1 else dtypes
    for number, (a, b, c, dtype) in enumerate(zip(ours, eager, exact, dtypes, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == dtype
        if c.numel() == 0:
            continue
        error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
        band = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert error <= 2 * allowed + band, f"output {number}: error {error}, eager {allowed}, band {band}"


def within_sigmas(successes: int, trials: int, p: float, sigmas: float = 4.0) -> bool:
    """Whether a binomial count is as near to its mean as it must be."""
    return abs(successes - trials * p) <= sigmas * (trials * p * (1 - p)) ** 0.5


# --- For the fused implementations -----------------------------------------------------------------------------------


def guarded(x: Tensor | None, band: int = 4096) -> Tensor | None:
    """x, contiguous, between two bands of NaN (or of the largest integer): what is read out of bounds shows."""
    if x is None:
        return None
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((x.numel() + 2 * band,), poison, dtype=x.dtype, device=x.device)
    inside = buffer[band : band + x.numel()].view(x.shape)
    return inside.copy_(x.detach())


def poison_new_memory(monkeypatch) -> None:
    """``torch.empty`` and ``torch.empty_like`` give floating tensors full of NaN: what is not written shows."""

    def filled(function):
        def new(*args, **keywords):
            out = function(*args, **keywords)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return new

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


def assert_fake_is_real(op, *arguments) -> None:
    """The fake of a registered operator gives tensors as the operator does: opcheck does not compare strides."""
    real = op(*arguments)
    mode = FakeTensorMode()
    fake_arguments = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
    with mode:
        fake = op(*fake_arguments)
    real, fake = ((out,) if isinstance(out, Tensor) else out for out in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
