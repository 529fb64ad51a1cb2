"""AdamW over many tensors on a CPU: the result of ``adamw_reference`` with torch's fused AdamW.

One pass for the norms and one for the update; clipping is folded into the update. The host reads the norm.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from unit_fast_kernels.adamw.step import CLIP_EPS, Stats, Step, flags_of, is_dense, joint, norm_of, same_layout


def adamw_cpu_unfit(step: Step, *_) -> str | None:
    """Why torch's fused AdamW cannot take this step, or None."""
    dtype = step.params[0].dtype
    if not hasattr(torch, "_fused_adamw_"):
        return "this torch has no fused AdamW"
    if any(p.device.type != "cpu" for p in step.params):
        return "parameters are not all on the CPU"
    if dtype not in (torch.float32, torch.float64) or any(p.dtype != dtype for p in step.params):
        return "parameters are not all float32, or all float64"
    if not all(is_dense(p) for p in step.params):
        return "a parameter is not contiguous in memory"
    if step.rule == "hf" and any(lr * h[3] >= 1 for lr, h in zip(_rates(step), step.hyper)):
        return "lr times weight_decay is 1 or more"
    return None


def _rates(step: Step) -> list[float]:
    return step.lr.tolist() if isinstance(step.lr, Tensor) else [float(lr) for lr in step.lr]


@torch.no_grad()
def adamw_cpu(step: Step, *_) -> Stats:
    """``adamw_reference`` for what is not ``adamw_cpu_unfit``."""
    flags, before, n = flags_of(step).tolist(), step.counts.tolist(), len(step.params)
    wide = torch.promote_types(step.params[0].dtype, torch.float32)
    grads = [g if flag else None for g, flag in zip(step.grads, flags, strict=True)]
    norms = [None if g is None else norm_of(g) for g in grads]
    norm = joint([x for x in norms if x is not None], like=step.params[0])
    scale = 1.0 if step.grad_scale is None else step.grad_scale.item()
    norm = (norm / scale).to(wide)
    stop = step.found_inf is not None and step.found_inf.item() != 0
    value = norm.item()
    if stop or not math.isfinite(value):
        return norm, torch.ones((), dtype=torch.int32)
    factor = (1.0 if step.max_norm is None else min(1.0, step.max_norm / (value + CLIP_EPS))) / scale

    moves = [False] * n
    calls: dict[tuple, tuple[list, ...]] = {}
    zeros = None
    for i, p in enumerate(step.params):
        grad = grads[i]
        if step.unused == "skip":
            moves[i] = grad is not None and any_nonzero(grad, norms[i].item(), factor)
            if grad is not None and not moves[i] and step.in_place and factor != 1.0:
                grad.mul_(factor)
        else:
            moves[i] = bool(flags[i]) or (step.unused == "update_all" and before[i] > 0)
        if not moves[i]:
            continue
        scaled = grad is None or factor == 1.0
        if grad is None:
            zeros = _zeros(step.params) if zeros is None else zeros
            grad = zeros.as_strided(p.shape, p.stride())
        elif p.dtype != torch.float32 or grad.dtype != p.dtype or not same_layout(p, grad):
            # The kernel's scale is a float32, and it pairs elements by their place in memory.
            scaled = True
            grad = grad.mul_(factor) if step.in_place else grad * factor
            if grad.dtype != p.dtype or not same_layout(p, grad):
                grad = torch.empty_like(p).copy_(grad)
        lists = calls.setdefault((step.groups[i], before[i] + 1, scaled), ([], [], [], []))
        for into, tensor in zip(lists, (p, grad, *step.moments(i)), strict=True):
            into.append(tensor)

    inverse, rates = torch.tensor(1.0 / factor, dtype=torch.float32), _rates(step)
    for (group, t, scaled), lists in calls.items():
        lr, (beta1, beta2, eps, decay) = rates[group], step.hyper[group]
        if step.rule == "hf":
            # The Hugging Face form in terms of torch's: same m and v, decay after the step, eps before correction.
            lr, decay = lr * (1 - lr * decay), decay / (1 - lr * decay)
            eps = eps / math.sqrt(1 - beta2**t)
        torch._fused_adamw_(
            *lists, [], [torch.tensor(float(t))] * len(lists[0]), amsgrad=False, lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=decay, eps=eps, maximize=False, grad_scale=None if scaled else inverse,
        )  # fmt: skip
    step.counts.add_(torch.tensor(moves, dtype=torch.int32))
    copied = [(t, p) for t, p, moved in zip(step.copies, step.params, moves) if moved and t is not None]
    if copied:
        torch._foreach_copy_(*map(list, zip(*copied)))
    return norm, torch.zeros((), dtype=torch.int32)


def _zeros(params: Sequence[Tensor]) -> Tensor:
    """One buffer of zeros for all parameters without a gradient."""
    return torch.zeros(max(p.numel() for p in params), dtype=params[0].dtype)


def any_nonzero(grad: Tensor, norm: float, factor: float) -> bool:
    """Whether max|grad * factor| > 0. Its norm answers that unless squares or products may have underflowed."""
    # max|g| >= norm / sqrt(n)
    if norm * factor > 2 * math.sqrt(grad.numel()) * torch.finfo(grad.dtype).tiny:
        return True
    if grad.numel() == 0:
        return False
    low, high = torch.aminmax(grad)
    return bool((torch.maximum(high, -low) * factor).item() > 0)
