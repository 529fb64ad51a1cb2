"""The average of a run's weights (``RunConfig.ema_decay``)."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unit_fast.errors import UserError


class Ema:
    """Exponential moving average of all weights over the run's updates, float32 (``ema_decay``): after every update
    that was not refused, average <- decay average + (1 - decay) weights, whether or not the update moved a weight.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise UserError(f"ema_decay: {decay} is not between 0 and 1; 0 keeps no average")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        # On a card pieces of this size keep what is between them small, and are still few launches.
        self.pieces = pieces_of(pairs, PIECE if pairs[0][0].device.type == "cuda" else math.inf)

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """After an update; ``refused`` is its ``Update.nonfinite``, 0-d: not zero leaves every average as it is.

        Nothing is read back from the device. Buffers are constants in this model.
        """
        for averages, weights in self.pieces:
            # A weight of 0 gives back the average to the bit; as a tensor it has the bits of the number.
            weight = torch.where(refused == 0, 1 - self.decay, 0.0).to(averages[0].dtype)
            if weight.is_cuda and self.decay > 0.5:
                lerp_in_few_launches(averages, weights, weight)
            else:
                torch._foreach_lerp_(averages, weights, [weight] * len(averages))


PIECE = 1 << 24
"""Numbers that are averaged at a time on a card."""


def lerp_in_few_launches(averages: Sequence[Tensor], weights: Sequence[Tensor], weight: Tensor) -> None:
    """average <- average + weight (weight's - average), ``weight`` a 0-d tensor below 0.5, with which
    ``torch._foreach_lerp_`` would take a launch for each tensor."""
    moves = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(moves, weight)
    torch._foreach_add_(averages, moves)


def pieces_of(pairs: list[tuple[Tensor, Tensor]], most: float) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs in groups of at most ``most`` numbers (or a single pair), each as two lists."""
    found, size = [([], [])], 0
    for average, weight in pairs:
        if found[-1][0] and size + average.numel() > most:
            found.append(([], []))
            size = 0
        found[-1][0].append(average)
        found[-1][1].append(weight)
        size += average.numel()
    return found
