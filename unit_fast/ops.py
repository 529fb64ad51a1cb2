"""The public operators: validate, choose an implementation, call. The only door to the kernels.

An operator has a ``reference`` (its specification, plain PyTorch) and may have ``cpu`` (the same result, fast on a CPU).
``UNIT_FAST_KERNELS=auto|reference``, or ``with kernels("reference"):``, chooses; what was taken, and why, is logged once.
"""

import contextlib
import contextvars
import logging
import os

from torch import Tensor

from unit_fast.errors import UserError, nearest
from unit_fast_kernels.assignment import assignment_reference
from unit_fast_kernels.attention import attention_cpu, attention_reference
from unit_fast_kernels.bias_act_dropout import ACTIVATIONS, bias_act_dropout_reference
from unit_fast_kernels.dropout import dropout_reference
from unit_fast_kernels.match_cost import match_cost_reference, pairwise_giou
from unit_fast_kernels.residual_norm import residual_norm_reference

MODES = ("auto", "reference")
_log = logging.getLogger("unit_fast.ops")
_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("unit_fast_kernels", default=None)


def mode() -> str:
    """The mode in force: the innermost ``kernels(...)`` block, else ``UNIT_FAST_KERNELS``, else ``auto``."""
    return _mode.get() or _checked(os.environ.get("UNIT_FAST_KERNELS", "auto"))


def _checked(name: str) -> str:
    if name not in MODES:
        raise UserError(f"UNIT_FAST_KERNELS: {name!r} is not a mode; {nearest(name, MODES)}")
    return name


@contextlib.contextmanager
def kernels(name: str):
    """Within the block operators run as ``name`` says: ``auto`` or ``reference``."""
    token = _mode.set(_checked(name))
    try:
        yield
    finally:
        _mode.reset(token)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with dropout on the probabilities.

    q [B,Sq,H,D], k v [B,Sk,H,D], key_padding_mask [B,Sk] bool (True = ignore), seed int64[2] where dropout_p > 0.
    Returns [B,Sq,H,D]; rows whose keys are all masked are zero. ``ValueError`` on shapes that do not fit.
    """
    run = attention_cpu if mode() == "auto" and q.device.type == "cpu" else attention_reference
    return run(q, k, v, key_padding_mask, dropout_p, seed)


def cross_attention(q, k, v, key_padding_mask=None, dropout_p=0.0, seed=None) -> Tensor:
    """``attention`` for few queries and many keys (the decoder's)."""
    return attention(q, k, v, key_padding_mask, dropout_p, seed)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x with elements zeroed with probability dropout_p and the rest scaled by 1/(1 - p_eff). seed int64[2]."""
    return dropout_reference(x, dropout_p, seed)


def residual_norm(x, branch, weight, bias, eps, dropout_p=0.0, pos=None, seed=None) -> tuple[Tensor, Tensor | None]:
    """(y, y + pos) with y = LayerNorm(x + dropout(branch)); the second is None without ``pos``."""
    return residual_norm_reference(x, branch, weight, bias, eps, dropout_p, pos, seed)


def bias_act_dropout(x, bias, act, dropout_p=0.0, seed=None) -> Tensor:
    """dropout(act(x + bias)); act is ``relu`` or ``gelu`` (erf). bias may be None."""
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act_dropout: act is {act!r}; {nearest(act, ACTIVATIONS)}")
    return bias_act_dropout_reference(x, bias, act, dropout_p, seed)


def match_cost(logits, boxes, labels, target_boxes, counts, **weights) -> Tensor:
    """Matching cost [L,B,Q,N] of DETR (class + L1 + GIoU) for all layers and images; see ``kernels/match_cost.py``."""
    return match_cost_reference(logits, boxes, labels, target_boxes, counts, **weights)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes (cx, cy, w, h) ``a`` and ``b``, broadcast against each other: [...,4] -> [...]."""
    return pairwise_giou(a, b)


def assignment(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Exact batched assignment: cost [P,Q,T], counts [P] -> query [P,T] int64 (-1 = none), flag [P] int32."""
    return assignment_reference(cost, counts)
