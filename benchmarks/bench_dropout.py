"""Elementwise dropout: ours, eager (torch's own), compiled.

``python -m benchmarks.bench_dropout``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import argparse
import sys
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels import dropout as kernel

from benchmarks import _pointwise, _run
from unit_fast import ops

CPU_SHAPES = {"bert_base_embeddings": (8, 129, 768), "unit_glue_single_key": (8, 25, 8, 1)}
QUICK_SHAPES = {"bert_base_embeddings": (2, 21, 96)}


def eager(x, dropout_p, seed) -> Tensor:
    return F.dropout(x, dropout_p) if dropout_p else x


def ours(x, dropout_p, seed) -> Tensor:
    return ops.dropout(x, dropout_p, seed)


def functions(shape: tuple, device: str) -> dict[str, Callable]:
    return {"eager": eager, "ours": ours}


def shape_of(shape: tuple) -> str:
    return " x ".join(map(str, shape))


def build(args: argparse.Namespace) -> _run.Benchmark:
    return _pointwise.build(
        args,
        kernel=kernel,
        name="bench_dropout",
        title="Dropout, forward and backward",
        method=["eager: F.dropout. Gradient of x."],
        shape_of=shape_of,
        wanted=("x",),
        functions=functions,
        exact=eager,
        quick=QUICK_SHAPES,
        cpu=CPU_SHAPES,
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
