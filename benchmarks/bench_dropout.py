"""Elementwise dropout: ours, eager (torch's own), compiled.

``python -m benchmarks.bench_dropout``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import sys

import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner.operators import OperatorBenchmark


def eager(x, dropout_p, seed) -> Tensor:
    return F.dropout(x, dropout_p) if dropout_p else x


main = OperatorBenchmark(
    op="dropout",
    about=__doc__,
    title="Dropout, forward and backward",
    method=["eager: F.dropout. Gradient of x."],
    eager=eager,
    wanted=("x",),
    shape_of=lambda shape: " x ".join(map(str, shape)),
    cpu={"bert_base_embeddings": (8, 129, 768), "unit_glue_single_key": (8, 25, 8, 1)},
    quick={"bert_base_embeddings": (2, 21, 96)},
)

if __name__ == "__main__":
    sys.exit(main())
