"""Elementwise dropout: y = x * keep / (1 - p_eff), 16 random bits a decision."""

from torch import Tensor
from unit_fast_kernels._random import keep_mask, keep_scale


def dropout_reference(x: Tensor, dropout_p: float, seed: Tensor | None, keep: Tensor | None = None) -> Tensor:
    """The specification. ``keep`` (bool, shape of x) overrides the random mask."""
    if dropout_p == 0.0:
        return x
    if keep is None:
        keep = keep_mask(x.shape, dropout_p, seed)
    return x * keep * keep_scale(dropout_p)
