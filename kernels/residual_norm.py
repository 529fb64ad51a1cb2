"""Post-norm residual: y = LayerNorm(x + dropout(branch)); optionally y + pos as well, for the next layer's query/key.

Shapes: x, branch, y [...,C]; weight, bias [C]; pos broadcasts to x. Replaces
``F.layer_norm(x + F.dropout(branch, p), (C,), weight, bias, eps)`` and ``y + pos``. ``residual_norm_cpu`` saves the
sum, its row statistics and what ``dropout_cpu`` saves. Under bf16 autocast x may be float32 and the branch bfloat16:
the sum is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.dropout import FEW, drop, dropout_reference, numbers_to_save


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


class _AddDroppedCpu(torch.autograd.Function):
    """x + dropout(branch)."""

    @staticmethod
    def forward(ctx, x, branch, dropout_p, seed):
        numbers = numbers_to_save(ctx, branch.numel(), seed)
        ctx.save_for_backward(seed, numbers)
        ctx.dropout_p, ctx.dtypes = dropout_p, (x.dtype, branch.dtype)
        return drop(branch, dropout_p, seed, numbers, base=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_dtype, branch_dtype = ctx.dtypes
        return grad.to(x_dtype), drop(grad, ctx.dropout_p, *ctx.saved_tensors).to(branch_dtype), None, None


def residual_norm_cpu(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    pos: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same result as ``residual_norm_reference``, decisions included."""
    if dropout_p == 0.0 or branch.numel() < FEW:
        total = x + dropout_reference(branch, dropout_p, seed)
    else:
        total = _AddDroppedCpu.apply(x, branch, dropout_p, seed)
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y, None if pos is None else y + pos
