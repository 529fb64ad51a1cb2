"""LayerNorm(x + dropout(branch)), and the same plus positions: ours, eager, compiled, Liger's and apex's layer norm.

``python -m benchmarks.bench_residual_norm``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import sys
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner.operators import OperatorBenchmark


def around(norm: Callable) -> Callable:
    """The operator from a layer norm (x, weight, bias, eps) and torch's dropout and additions."""

    def function(x, branch, weight, bias, eps, dropout_p, pos, seed) -> tuple[Tensor, Tensor | None]:
        total = x + F.dropout(branch, dropout_p)
        # torch's layer norm on CUDA takes one dtype only.
        y = norm(total, weight.to(total.dtype), bias.to(total.dtype), eps)
        return y, None if pos is None else y + pos

    return function


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def liger(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def apex(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, tuple(weight.shape), eps)


def shape_of(shape: tuple) -> str:
    batch, length, width, with_pos, wide = shape
    return f"{batch} x {length} x {width}{', with positions' if with_pos else ''}{', float32 stream' if wide else ''}"


main = OperatorBenchmark(
    op="residual_norm",
    about=__doc__,
    title="Post-norm residual with dropout 0.1, forward and backward",
    method=[
        "eager: F.layer_norm(x + F.dropout(branch)), + positions. liger, apex: their layer norm in its place.",
        "Gradients of x, branch, weight and bias.",
    ],
    eager=around(layer_norm),
    peers={"liger": ("liger_kernel", around(liger)), "apex": ("apex", around(apex))},
    wanted=("x", "branch", "weight", "bias"),
    shape_of=shape_of,
    cpu={
        "encoder": (1, 1051, 256, False, False),
        "encoder_pos": (1, 1051, 256, True, False),
        "decoder": (2, 100, 768, True, False),
        "bert_base": (8, 61, 768, False, False),
    },
    quick={"encoder_pos": (2, 131, 256, True, False), "bert_base": (2, 21, 768, False, False)},
)

if __name__ == "__main__":
    sys.exit(main())
