"""relu(x * scale + shift + residual), what follows a convolution of a frozen ResNet: ours, eager, compiled.

``python -m benchmarks.bench_frozen_bn_act``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import sys

import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner.operators import OperatorBenchmark


def eager(x, scale, shift, residual, relu) -> Tensor:
    """What the model runs without kernels: the convolution's bias pass, the sum and the ReLU in place."""
    if scale is not None:
        x = x * scale.to(x.dtype)[:, None, None]
    y = x + shift.to(x.dtype)[:, None, None]
    if residual is not None:
        y.add_(residual)
    return F.relu(y, inplace=True)


def shape_of(shape: tuple) -> str:
    batch, channels, height, width, with_residual, with_scale = shape
    extras = f"{', residual' if with_residual else ''}{', scale' if with_scale else ''}"
    return f"{batch} x {channels} x {height}x{width}{extras}"


main = OperatorBenchmark(
    op="frozen_bn_act",
    about=__doc__,
    title="Frozen batch norm, residual and ReLU on channels last, forward and backward",
    method=[
        "eager: x + shift, add_ of the residual, ReLU in place, as after a convolution with a bias on CUDA.",
        "Gradients of x and of the residual where there is one. On a CPU ours is the reference: the model lets the "
        "convolution add the shift there.",
    ],
    eager=eager,
    wanted=("x", "residual"),
    shape_of=shape_of,
    cpu={
        "inner": (1, 64, 100, 168, False, False),
        "block": (1, 256, 50, 84, True, False),
        "block_scaled": (1, 256, 50, 84, True, True),
    },
    quick={"inner": (2, 64, 24, 40, False, False), "block_scaled": (2, 256, 12, 20, True, True)},
)

if __name__ == "__main__":
    sys.exit(main())
