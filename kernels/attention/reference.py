"""``attention`` in plain PyTorch: the specification."""

import math

import torch
from torch import Tensor
from unit_fast_kernels.shared.random import keep_mask, keep_scale


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The specification. ``keep`` [B,H,Sq,Sk] bool overrides the random mask."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
        # A row without any key has no softmax: make it uniform here and zero below.
        empty = key_padding_mask.all(1)[:, None, None, None]
        probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    else:
        probabilities = scores.softmax(-1)
    if dropout_p > 0.0:
        if keep is None:
            keep = keep_mask(probabilities.shape, dropout_p, seed)
        probabilities = probabilities * keep * keep_scale(dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
