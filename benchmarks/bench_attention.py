"""Self-attention with a key-padding mask and dropout: ours, eager, SDPA's backends, FlexAttention, xformers, compiled.

``python -m benchmarks.bench_attention``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import argparse
import functools
import sys

from unit_fast_kernels import attention as kernel

from benchmarks import _attention
from benchmarks.runner.cases import Benchmark
from benchmarks.runner.main import main as run
from unit_fast import ops

CPU_SHAPES = {
    "encoder": (1, 2101, 2101, 8, 32, True, 0.1),
    "encoder_eval": (1, 2101, 2101, 8, 32, False, 0.0),
    "decoder": (2, 100, 100, 8, 96, False, 0.1),
    "bert": (8, 61, 61, 12, 64, True, 0.1),
}
QUICK_SHAPES = {"encoder": (2, 131, 131, 2, 32, True, 0.1), "bert": (2, 21, 21, 2, 64, True, 0.0)}


def build(args: argparse.Namespace) -> Benchmark:
    return _attention.build(
        args,
        kernel=kernel,
        ours=ops.attention,
        name="bench_attention",
        title="Self-attention, forward and backward",
        shapes_are="The mask pads the last image at the end of each row; FLOPs count padded keys too, 14 B H Sq Sk D, "
        "whatever a provider computes.",
        shapes=_attention.shapes_of(args, kernel, quick=QUICK_SHAPES, cpu=CPU_SHAPES),
    )


main = functools.partial(run, build, __doc__, ops=["attention"])

if __name__ == "__main__":
    sys.exit(main())
