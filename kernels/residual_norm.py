"""Post-norm residual: y = LayerNorm(x + dropout(branch)); optionally y + pos as well, for the next layer's query/key.

Replaces ``F.layer_norm(x + F.dropout(branch, p), (C,), weight, bias, eps)`` and ``y + pos``.
"""

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels.dropout import dropout_reference


def residual_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    pos: Tensor | None = None,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The specification: (y, y + pos or None). x, branch [...,C]; weight, bias [C]; pos broadcasts to x."""
    y = F.layer_norm(x + dropout_reference(branch, dropout_p, seed, keep), weight.shape, weight, bias, eps)
    return y, None if pos is None else y + pos
