"""What the tests of the operators share: seeds, the derived error bound, gradients, watched memory, fakes."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from unit_fast_kernels.assembly import record
from unit_fast_kernels.shared.registration import REGISTERED

from tests.kernels.program_order import permute_programs

SEED = torch.tensor([1234567890123, -42])
BAND = 512
"""Elements of a guard band."""


def values_and_gradients(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """function(*inputs) and its gradient with respect to each input, for the upstream gradient."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_as_good_as_eager(ours, eager, exact, *dtypes: torch.dtype) -> None:
    """Each of ours has its one of ``dtypes`` (or the only one) and is at most twice as far from the
    float64 result as eager arithmetic of the same precision is, plus a rounding band of four units in the last place of
    the largest value. Integers are eager's."""
    dtypes = dtypes * len(ours) if len(dtypes) == 1 else dtypes
    for number, (a, b, c, dtype) in enumerate(zip(ours, eager, exact, dtypes, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == dtype
        if not dtype.is_floating_point:
            assert torch.equal(a, b)
        elif c.numel():
            error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
            band = 4 * torch.finfo(dtype).eps * c.abs().max()
            assert error <= 2 * allowed + band, f"output {number}: error {error}, eager {allowed}, band {band}"


def assert_equal(found, expected) -> None:
    """The same bits, tensor by tensor; NaN equals NaN."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def within_sigmas(successes: int, trials: int, p: float, sigmas: float = 4.0) -> bool:
    """Whether a binomial count is as near to its mean as it must be."""
    return abs(successes - trials * p) <= sigmas * (trials * p * (1 - p)) ** 0.5


def permuted(x: Tensor) -> Tensor:
    """x with its dimensions in memory the other way round; a vector as every second element."""
    if x.dim() < 2:
        return torch.stack((x, x), -1)[..., 0]
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


# --- Memory -----------------------------------------------------------------------------------------------------------


def _number(dtype: torch.dtype) -> float | int | bool:
    """What unwritten memory and guard bands hold."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _between_bands(like: Tensor, band: int) -> tuple[Tensor, Tensor]:
    """(a tensor of ``like``'s shape and strides that holds the number, the buffer it is the middle of)."""
    buffer = torch.full((like.numel() + 2 * band,), _number(like.dtype), dtype=like.dtype, device=like.device)
    return buffer[band : band + like.numel()].as_strided(like.shape, like.stride()), buffer


def guarded(x: Tensor | None, band: int = 4096) -> Tensor | None:
    """A copy of x, dense, between two bands of NaN (or of the largest integer): what is read out of bounds shows."""
    return None if x is None else _between_bands(torch.empty_like(x), band)[0].copy_(x.detach())


class Canaries:
    """``torch.empty`` and ``torch.empty_like`` give tensors on the CPU between two bands of a known number and full of
    it: NaN, or the largest integer. What is not written shows, and what is written beside them."""

    def __init__(self, monkeypatch):
        self._buffers: list[Tensor] = []
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, self._watched(getattr(torch, name)))

    def _watched(self, function):
        def new(*args, **keywords):
            like = function(*args, **keywords)
            if like.device.type != "cpu":
                return like
            found, buffer = _between_bands(like, BAND)
            self._buffers.append(buffer)
            return found.requires_grad_(like.requires_grad)

        return new

    def unharmed(self) -> bool:
        """Whether all bands are what they were, and there are some."""

        def whole(band):
            return bool((band.isnan() if band.is_floating_point() else band == _number(band.dtype)).all())

        return bool(self._buffers) and all(whole(b[:BAND]) and whole(b[-BAND:]) for b in self._buffers)


# --- Registration -----------------------------------------------------------------------------------------------------


class Registered(TorchDispatchMode):
    """Notes which of our registered operators are called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "unit_fast":
            self.calls.append((function, tree_map_only(Tensor, Tensor.detach, args)))
        return function(*args, **(kwargs or {}))


def assert_fake_is_real(op, *arguments) -> None:
    """The fake of a registered operator gives tensors as the operator does: opcheck does not compare strides."""
    real = op(*arguments)
    mode = FakeTensorMode()

    def faked(a):
        if isinstance(a, Tensor):
            return mode.from_tensor(a)
        return [faked(x) for x in a] if isinstance(a, list) else a

    with mode:
        fake = op(*map(faked, arguments))
    real, fake = ((out,) if isinstance(out, Tensor) else out for out in (real, fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def kernels_launched(module, shape) -> list[list[str]]:
    """The names of the kernels that each registered operator of ``module.launches`` launches in bfloat16."""
    found, recorded = [], []

    def launch_all():
        for operator, arguments in module.launches(shape, torch.bfloat16, "cuda:0"):
            before = len(recorded)
            REGISTERED[operator].launch(*arguments)
            found.append([launch.name for launch in recorded[before:]])

    record.record(launch_all, "a100", into=recorded)
    return found


def assert_same_in_any_order(forward_of, names, order, monkeypatch) -> None:
    """``forward_of`` each of ``names`` in turn has the same bits with its programs run in ``order``."""
    plain = [forward_of(name) for name in names]
    Canaries(monkeypatch)
    permute_programs(monkeypatch, order)
    for name, expected in zip(names, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(forward_of(name), expected, strict=True)), name
