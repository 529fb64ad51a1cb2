"""One step of AdamW over many tensors: what it works on, and its specification in plain PyTorch (see ``adamw``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from unit_fast_kernels.shared.capture import refuse

RULES = ("hf", "torch")
POLICIES = ("skip", "graph", "update_all")
CLIP_EPS = 1e-6
"""Added to the norm in the clip factor, as ``torch.nn.utils.clip_grad_norm_`` does."""
NORM_ROW = 16384
"""Numbers of a gradient whose squares are added up one after the other in PyTorch."""


@dataclass(kw_only=True, eq=False)
class Step:
    """What one step works on: n tensors each, lists in the order of the parameters."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    """None counts as zero where the parameter is used."""
    moments: Callable[[int], tuple[Tensor, Tensor]]
    """m and v of a parameter; asked for when they are needed, so that what never moves need not have any."""
    counts: Tensor
    """int32 [n], updates so far."""
    used: Tensor | None
    """uint8 or bool [n]; None: has a gradient."""
    possible: Sequence[int] | None = None
    """The parameters of which the host does not know already that they stay as they are; None: all."""
    groups: Sequence[int]
    """Index of each parameter's entry in ``lr`` and ``hyper``."""
    lr: Sequence[float | Tensor] | Tensor
    """Learning rates, numbers or float64 scalars on the device."""
    hyper: Sequence[Sequence[float]] | Tensor
    """By group: beta1, beta2, eps, weight decay."""
    rule: str = "hf"
    unused: str = "skip"
    max_norm: float | None = None
    grad_scale: Tensor | None = None
    """One number that the gradients were multiplied with."""
    found_inf: Tensor | None = None
    """One number, not zero: change nothing."""
    in_place: bool = True
    """Whether the gradients of used parameters hold the clipped ones afterwards, or what is cheapest."""
    copies: Sequence[Tensor | None] = ()
    """bfloat16, written with each parameter that moves."""


Stats = tuple[Tensor, Tensor]
"""(norm before clipping and after division by ``grad_scale``; int32, 1 where nothing was changed), scalars."""


# --- The specification ----------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_reference(step: Step, *_) -> Stats:
    """The specification, in place: one tensor after the other, nothing read on the host."""
    possible = range(len(step.params)) if step.possible is None else step.possible
    flags = flags_of(step)
    norms = [norm_of(step.grads[i]).masked_fill(~flags[i], 0.0) for i in possible if step.grads[i] is not None]
    exact = joint(norms, like=step.params[0])
    scale = None if step.grad_scale is None else step.grad_scale.reshape(()).double()
    exact = exact if scale is None else exact / scale
    norm = exact.to(torch.promote_types(step.params[0].dtype, torch.float32))
    finite = norm.isfinite()
    if step.found_inf is not None:
        finite = finite & (step.found_inf.reshape(()) == 0)
    factor = torch.ones_like(exact)
    if step.max_norm is not None:
        factor = (step.max_norm / (exact + CLIP_EPS)).clamp(max=1.0)
    factor = factor if scale is None else factor / scale
    factor = torch.where(finite, factor, 1.0)

    for i in possible:
        p, used, count = step.params[i], flags[i], step.counts[i]
        grad = torch.zeros_like(p)
        if step.grads[i] is not None:
            wide = torch.promote_types(step.grads[i].dtype, norm.dtype)
            clipped = step.grads[i].to(wide) * torch.where(used, factor, 1.0).to(norm.dtype)
            clipped = step.grads[i].copy_(clipped) if step.in_place else clipped.to(step.grads[i].dtype)
            grad = torch.where(used, clipped, grad)
        moves = finite & used
        if step.unused == "skip":
            moves = moves & (grad != 0).any()
        elif step.unused == "update_all":
            moves = finite & (used | (count > 0))
        _update_reference(step, i, grad, moves)
        count += moves
    return norm, (~finite).int()


def _update_reference(step: Step, i: int, grad: Tensor, moves: Tensor) -> None:
    """One parameter; ``moves`` a bool scalar. The count is still that before the update."""
    p, (m, v) = step.params[i], step.moments(i)
    lr, (beta1, beta2, eps, decay) = step.lr[step.groups[i]], step.hyper[step.groups[i]]
    t = (step.counts[i] + 1).double()
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    new_m = beta1 * m + (1 - beta1) * grad
    new_v = beta2 * v + (1 - beta2) * grad**2
    if step.rule == "hf":
        new_p = p - lr * (correction2.sqrt() / correction1) * new_m / (new_v.sqrt() + eps)
        new_p = new_p - lr * decay * new_p
    else:
        new_p = p - lr * decay * p
        new_p = new_p - lr / correction1 * new_m / (new_v.sqrt() / correction2.sqrt() + eps)
    writes = [(m, new_m), (v, new_v), (p, new_p)]
    if step.copies and step.copies[i] is not None:
        writes.append((step.copies[i], new_p))
    for old, new in writes:
        old.copy_(torch.where(moves, new.to(old.dtype), old))


def flags_of(step: Step) -> Tensor:
    """bool [n] on the device of the parameters: used."""
    device = step.params[0].device
    if step.used is None:
        return upload([g is not None for g in step.grads], torch.bool, device)
    return step.used.to(device, non_blocking=True).bool()


def norm_of(grad: Tensor) -> Tensor:
    """L2 norm of a gradient, a scalar of at least float32.

    In rows: torch adds up float32 squares one after the other on a CPU, which leaves an error of 1e-3 in the norm of
    the word embedding (23 M numbers) and uses one thread. Rows make it 1e-7, and independent of the number of threads.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    size, rows = grad.numel(), grad.numel() // NORM_ROW
    if rows < 2:
        return torch.linalg.vector_norm(grad, dtype=wide)
    flat = grad.as_strided((size,), (1,)) if is_dense(grad) else grad.reshape(-1)
    body = rows * NORM_ROW
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(flat[:body].view(rows, NORM_ROW), dim=1, dtype=wide))
    return norm if body == size else torch.hypot(norm, torch.linalg.vector_norm(flat[body:], dtype=wide))


def joint(norms: Sequence[Tensor], like: Tensor) -> Tensor:
    """L2 norm of L2 norms, a float64 scalar on the device of ``like``; 0 without any."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))


def is_dense(p: Tensor) -> bool:
    """Whether p fills its memory: contiguous, or channels last."""
    if p.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return p.dim() in formats and p.is_contiguous(memory_format=formats[p.dim()])


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Same strides, but for dimensions of size one, whose stride means nothing."""
    return a.stride() == b.stride() or all(
        size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def upload(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on ``device``. To a card from pinned memory, so that the host does not wait; the
    memory is torch's own and not used again before it has been copied. ``RuntimeError`` within a capture."""
    device = torch.device(device)
    host = torch.tensor(values, dtype=dtype)
    if not isinstance(host, FakeTensor):
        refuse(device, "numbers of the host would be copied to the device")
    if device.type == "cuda" and not isinstance(host, FakeTensor):
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
