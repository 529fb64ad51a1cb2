"""Feed-forward epilogue: dropout(act(x + bias)), act = ReLU or erf-GELU.

Replaces ``F.dropout(F.relu(x + bias), p)`` and ``F.dropout(F.gelu(x + bias), p)``.
"""

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels.dropout import dropout_reference

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def bias_act_dropout_reference(
    x: Tensor,
    bias: Tensor | None,
    act: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The specification. x [...,C], bias [C] or None, act "relu" or "gelu"."""
    if bias is not None:
        x = x + bias
    return dropout_reference(ACTIVATIONS[act](x), dropout_p, seed, keep)
