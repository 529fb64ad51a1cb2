"""dropout(act(x + bias)), the feed-forward epilogue: ours, eager, compiled.

``python -m benchmarks.bench_bias_act_dropout``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import sys

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels.bias_act_dropout import ACTIVATIONS

from benchmarks.runner.operators import OperatorBenchmark


def eager(x, bias, act, dropout_p, seed) -> Tensor:
    y = ACTIVATIONS[act](x if bias is None else x + bias)
    return F.dropout(y, dropout_p) if dropout_p else y


def shape_of(shape: tuple) -> str:
    batch, length, width, act, with_bias, dropout_p = shape
    return f"{batch} x {length} x {width}, {act}{', bias' if with_bias else ''}, dropout {dropout_p}"


main = OperatorBenchmark(
    op="bias_act_dropout",
    about=__doc__,
    title="Feed-forward epilogue, forward and backward",
    method=["eager: F.dropout(F.relu(x + bias)) or F.gelu. Gradients of x and of the bias where there is one."],
    eager=eager,
    wanted=("x", "bias"),
    shape_of=shape_of,
    cpu={
        "encoder": (1, 1051, 2048, "relu", False, 0.1),
        "encoder_bias": (1, 1051, 2048, "relu", True, 0.1),
        "bert_base": (8, 61, 3072, "gelu", False, 0.0),
    },
    quick={"encoder_bias": (2, 131, 256, "relu", True, 0.1), "bert_base": (2, 21, 768, "gelu", False, 0.0)},
)

if __name__ == "__main__":
    sys.exit(main())
