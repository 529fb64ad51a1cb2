"""The attribute loss of Visual Genome, forward and backward to the attribute logits: ours, eager, compiled.

``python -m benchmarks.bench_attribute_loss``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import argparse
import sys
from collections.abc import Callable

from unit_fast_kernels import attribute_loss as kernel

from benchmarks import _pointwise, _run
from unit_fast import ops

CPU_SHAPES = {"unit_vg": (6, 2, 20, 401, 16)}
QUICK_SHAPES = {"unit_vg": (2, 2, 5, 33, 6)}


def functions(shape: tuple, device: str) -> dict[str, Callable]:
    """The providers."""
    return {"eager": kernel.attribute_loss_reference, "ours": ops.attribute_loss}


def shape_of(shape: tuple) -> str:
    layers, images, objects, attributes, slots = shape
    return f"{layers} layers x {images} x {objects} x {attributes}, {slots} slots"


def build(args: argparse.Namespace) -> _run.Benchmark:
    return _pointwise.build(
        args,
        kernel=kernel,
        name="bench_attribute_loss",
        title="Attribute loss, forward and backward",
        method=["eager: all layers at once in plain PyTorch, as without our kernels."],
        shape_of=shape_of,
        wanted=("logits",),
        functions=functions,
        exact=kernel.attribute_loss_reference,
        quick=QUICK_SHAPES,
        cpu=CPU_SHAPES,
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
