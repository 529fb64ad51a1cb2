"""What ``MaskedAdamW`` may be told; ``ValueError`` on anything else."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unit_fast.errors import nearest
from unit_fast.ops import adamw_step


def check_settings(rule: str, unused: str, max_norm: float | None) -> None:
    for name, value, known in (("rule", rule, adamw_step.RULES), ("unused", unused, adamw_step.POLICIES)):
        if value not in known:
            raise ValueError(f"MaskedAdamW: {name} is {value!r}; {nearest(value, known)}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"MaskedAdamW: max_norm is {max_norm}; give a positive number, or None not to clip")


def check_group(group: dict) -> None:
    if isinstance(group["lr"], Tensor):
        raise ValueError("MaskedAdamW: lr is a tensor; give a number, and write rates of the device to device_lr")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"MaskedAdamW: {name} is {group[name]}; it must not be negative")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"MaskedAdamW: betas are {group['betas']}; both must be in [0, 1)")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(f"MaskedAdamW: a parameter of shape {tuple(p.shape)} is {p.dtype}, not floating point")


def check_shadow(shadow: Mapping[Tensor, Tensor], params: list[Tensor]) -> None:
    members = set(params)
    for p, copy in shadow.items():
        if p not in members:
            raise ValueError("MaskedAdamW: shadow has a tensor that is not one of the parameters")
        fits = copy.shape == p.shape and copy.dtype == torch.bfloat16 and copy.device == p.device
        if not fits or not adamw_step.same_layout(copy, p):
            raise ValueError(
                f"MaskedAdamW: shadow of a parameter {list(p.shape)} on {p.device} is {copy.dtype} "
                f"{list(copy.shape)} on {copy.device}; it must be torch.bfloat16, of its shape, device and strides"
            )
