"""What the tests of the operators share: seeds, the derived error bound, gradients."""

import torch
from torch import Tensor

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
