"""Feed-forward epilogue: y = dropout(act(x + bias)), act = ReLU or erf-GELU.

Shapes: x [...,C], bias [C] or None, y as x. Replaces ``F.dropout(F.relu(x + bias), p)`` and
``F.dropout(F.gelu(x + bias), p)``. After ReLU the result itself says where the gradient flows (y > 0), so
``bias_act_dropout_cpu`` saves y alone, which the next product saves anyway; eager saves y twice and a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels._random import keep_scale
from unit_fast_kernels.dropout import drop, dropout_cpu, dropout_reference

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


class _ReluDropoutCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        y = drop(x, dropout_p, seed, relu=True)
        ctx.save_for_backward(y)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        # ReLU then dropout: both stop the gradient exactly where the result is zero.
        return torch.ops.aten.threshold_backward(grad, y, 0.0).mul_(keep_scale(ctx.dropout_p)), None, None


def bias_act_dropout_cpu(
    x: Tensor, bias: Tensor | None, act: str, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """The same result as ``bias_act_dropout_reference``, decisions included."""
    if bias is not None:
        x = x + bias
    if act == "relu" and dropout_p > 0.0:
        return _ReluDropoutCpu.apply(x, dropout_p, seed)
    return dropout_cpu(ACTIVATIONS[act](x), dropout_p, seed)
