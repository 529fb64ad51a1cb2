"""Self-attention with a key-padding mask and dropout: ours, eager, SDPA's backends, FlexAttention, xformers, compiled.

``python -m benchmarks.bench_attention``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card.
"""

import argparse
import sys

from unit_fast_kernels.attention import SELF_SHAPES

from benchmarks import _attention, _run
from unit_fast import ops

CPU_SHAPES = {
    "encoder": (1, 2101, 2101, 8, 32, True, 0.1),
    "encoder_eval": (1, 2101, 2101, 8, 32, False, 0.0),
    "decoder": (2, 100, 100, 8, 96, False, 0.1),
    "bert": (8, 61, 61, 12, 64, True, 0.1),
}
QUICK_SHAPES = {"encoder": (2, 131, 131, 2, 32, True, 0.1), "bert": (2, 21, 21, 2, 64, True, 0.0)}


def build(args: argparse.Namespace) -> _run.Benchmark:
    return _attention.build(
        args,
        ours=ops.attention,
        name="bench_attention",
        title="Self-attention, forward and backward",
        shapes_are="The mask pads the last image at the end of each row; FLOPs count padded keys too, 14 B H Sq Sk D, "
        "whatever a provider computes.",
        shapes=_attention.shapes_of(args, card=SELF_SHAPES, quick=QUICK_SHAPES, cpu=CPU_SHAPES),
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
