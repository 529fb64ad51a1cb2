"""LayerNorm(x + dropout(branch)), and the same plus positions: ours, eager, compiled, Liger's and apex's layer norm.

``python -m benchmarks.bench_residual_norm``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import argparse
import sys
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels import residual_norm as kernel

from benchmarks import _pointwise, _run
from unit_fast import ops

CPU_SHAPES = {
    "encoder": (1, 1051, 256, False, False),
    "encoder_pos": (1, 1051, 256, True, False),
    "decoder": (2, 100, 768, True, False),
    "bert_base": (8, 61, 768, False, False),
}
QUICK_SHAPES = {"encoder_pos": (2, 131, 256, True, False), "bert_base": (2, 21, 768, False, False)}
PEERS = {"liger": "liger_kernel", "apex": "apex"}


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


def ours(x, branch, weight, bias, eps, dropout_p, pos, seed):
    return ops.residual_norm(x, branch, weight, bias, eps, dropout_p, pos, seed)


def functions(shape: tuple, device: str, peers: list[str]) -> dict[str, Callable]:
    """The providers; the peers' norms are kernels of CUDA only."""
    found = {"eager": around(layer_norm)}
    if device == "cuda":
        found |= {name: around({"liger": liger, "apex": apex}[name]) for name in peers}
    return found | {"ours": ours}


def shape_of(shape: tuple) -> str:
    batch, length, width, with_pos, wide = shape
    return f"{batch} x {length} x {width}{', with positions' if with_pos else ''}{', float32 stream' if wide else ''}"


def build(args: argparse.Namespace) -> _run.Benchmark:
    peers = _pointwise.installed(PEERS)
    return _pointwise.build(
        args,
        kernel=kernel,
        name="bench_residual_norm",
        title="Post-norm residual with dropout 0.1, forward and backward",
        method=[
            "eager: F.layer_norm(x + F.dropout(branch)), + positions. liger, apex: their layer norm in its place.",
            "Gradients of x, branch, weight and bias.",
        ],
        shape_of=shape_of,
        wanted=("x", "branch", "weight", "bias"),
        functions=lambda shape, device: functions(shape, device, peers),
        exact=around(layer_norm),
        quick=QUICK_SHAPES,
        cpu=CPU_SHAPES,
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
