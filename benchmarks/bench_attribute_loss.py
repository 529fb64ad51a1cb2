"""The attribute loss of Visual Genome, forward and backward to the attribute logits: ours, eager, compiled.

``python -m benchmarks.bench_attribute_loss``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import sys

from unit_fast_kernels.attribute_loss import attribute_loss_reference

from benchmarks.runner.operators import OperatorBenchmark


def shape_of(shape: tuple) -> str:
    layers, images, objects, attributes, slots = shape
    return f"{layers} layers x {images} x {objects} x {attributes}, {slots} slots"


main = OperatorBenchmark(
    op="attribute_loss",
    about=__doc__,
    title="Attribute loss, forward and backward",
    method=["eager: all layers at once in plain PyTorch, as without our kernels."],
    eager=attribute_loss_reference,
    wanted=("logits",),
    shape_of=shape_of,
    cpu={"unit_vg": (6, 2, 20, 401, 16)},
    quick={"unit_vg": (2, 2, 5, 33, 6)},
)

if __name__ == "__main__":
    sys.exit(main())
