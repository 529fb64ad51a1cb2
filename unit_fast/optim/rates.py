"""Learning rates as a tensor on the device, which a captured step follows; see ``MaskedAdamW.device_lr``."""

import math

import torch
from torch import Tensor

from unit_fast.ops import adamw_step


class Rates:
    """The rates of parameter groups, on their device from the first time they are asked for."""

    def __init__(self):
        self.tensor: Tensor | None = None
        """float64 [groups]."""
        self.written: list[float] = []
        """What each group's ``lr`` was when it was copied."""

    def on_device(self, groups: list[dict]) -> Tensor:
        if self.tensor is None:
            self.written = [group["lr"] for group in groups]
            device = next(p for group in groups for p in group["params"]).device
            self.tensor = adamw_step.upload(self.written, torch.float64, device)
        return self.tensor

    def scale(self, groups: list[dict], multiplier: float | Tensor) -> None:
        """See ``MaskedAdamW.scale_lr``."""
        for group in groups:
            group.setdefault("initial_lr", group["lr"])
        if isinstance(multiplier, Tensor):
            rates = self.on_device(groups)
            for i, group in enumerate(groups):
                rates[i].copy_(multiplier * group["initial_lr"])
            return
        for group in groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.written = [math.nan] * len(groups)  # a tensor may have changed them since
        self.follow(groups)

    def follow(self, groups: list[dict]) -> None:
        """Copy rates that were changed in the groups, if there is a tensor; by launches, not by copies."""
        if self.tensor is None:
            return
        for i, group in enumerate(groups):
            if group["lr"] != self.written[i]:
                adamw_step.refuse(self.tensor.device, f"the learning rate of group {i}, a number, would be written")
                self.written[i] = group["lr"]
                self.tensor[i].fill_(group["lr"])
