"""Softmax attention with a key-padding mask and dropout on the probabilities.

    P = softmax(q k^T / sqrt(D) + mask),  out = dropout(P) v

Shapes: q [B,Sq,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), out [B,Sq,H,D]. A row whose keys are
all masked gives zeros.

Replaces ``softmax(q @ k.T)``, ``F.dropout`` and ``@ v``, which keep several matrices of B H Sq Sk numbers.
"""

import math

import torch
from torch import Tensor
from unit_fast_kernels._random import keep_mask, keep_scale


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
