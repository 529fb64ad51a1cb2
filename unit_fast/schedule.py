"""When things are due: the learning-rate schedule (SPEC 3.2), on the host and on the device, and what is repeated."""

import math

import torch
from torch import Tensor


def lr_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the base learning rates of update ``step`` (0-based): linear warm-up from 0, then half a cosine to 0.

    step / warmup for step < warmup, else (1 + cos(pi (step - warmup) / (total - warmup))) / 2, SPEC 3.2. Update 0 of a
    warm-up has factor 0. At and after ``total_steps`` it is 0, except that the first update after the warm-up always
    has 1 (total = warmup). A run shorter than its warm-up never leaves it. ``ValueError`` on negative numbers.
    """
    _check("lr_multiplier", step, warmup_steps, total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def lr_multiplier_tensor(step: Tensor, warmup_steps: int, total_steps: int) -> Tensor:
    """``lr_multiplier`` of a step count on the device: step, integers of any shape, not negative -> float64.

    Reads nothing on the host, so that a captured graph follows the schedule: count the steps on the device and give the
    result to ``MaskedAdamW.scale_lr``. Equal to the host's but for the last place of the cosine.
    """
    _check("lr_multiplier_tensor", 0, warmup_steps, total_steps)
    done = step.double()
    progress = ((done - warmup_steps) / max(1, total_steps - warmup_steps)).clamp(max=1.0)
    cosine = (0.5 * (1.0 + torch.cos(math.pi * progress))).clamp(min=0.0)
    return torch.where(done < warmup_steps, done / max(1, warmup_steps), cosine)


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` updates (0 or less: only at the end) is due after ``step``."""
    return every > 0 and step % every == 0


def _check(function: str, step: int, warmup_steps: int, total_steps: int) -> None:
    if min(step, warmup_steps, total_steps) < 0:
        raise ValueError(f"{function}: step {step}, warmup {warmup_steps}, total {total_steps}; none may be negative")
