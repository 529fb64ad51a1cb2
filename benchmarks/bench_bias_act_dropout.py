"""dropout(act(x + bias)), the feed-forward epilogue: ours, eager, compiled.

``python -m benchmarks.bench_bias_act_dropout``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import argparse
import sys
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels import bias_act_dropout as kernel

from benchmarks import _pointwise, _run
from unit_fast import ops

CPU_SHAPES = {
    "encoder": (1, 1051, 2048, "relu", False, 0.1),
    "encoder_bias": (1, 1051, 2048, "relu", True, 0.1),
    "bert_base": (8, 61, 3072, "gelu", False, 0.0),
}
QUICK_SHAPES = {"encoder_bias": (2, 131, 256, "relu", True, 0.1), "bert_base": (2, 21, 768, "gelu", False, 0.0)}


def eager(x, bias, act, dropout_p, seed) -> Tensor:
    y = kernel.ACTIVATIONS[act](x if bias is None else x + bias)
    return F.dropout(y, dropout_p) if dropout_p else y


def ours(x, bias, act, dropout_p, seed) -> Tensor:
    return ops.bias_act_dropout(x, bias, act, dropout_p, seed)


def functions(shape: tuple, device: str) -> dict[str, Callable]:
    return {"eager": eager, "ours": ours}


def shape_of(shape: tuple) -> str:
    batch, length, width, act, with_bias, dropout_p = shape
    return f"{batch} x {length} x {width}, {act}{', bias' if with_bias else ''}, dropout {dropout_p}"


def build(args: argparse.Namespace) -> _run.Benchmark:
    return _pointwise.build(
        args,
        kernel=kernel,
        name="bench_bias_act_dropout",
        title="Feed-forward epilogue, forward and backward",
        method=["eager: F.dropout(F.relu(x + bias)) or F.gelu. Gradients of x and of the bias where there is one."],
        shape_of=shape_of,
        wanted=("x", "bias"),
        functions=functions,
        exact=eager,
        quick=QUICK_SHAPES,
        cpu=CPU_SHAPES,
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
