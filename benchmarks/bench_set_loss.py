"""The set loss of detection, forward and backward to logits and boxes: ours, DETR's layer by layer, batched, compiled.

``python -m benchmarks.bench_set_loss``; without a card in float32 on the CPU, at fewer shapes. Cases named ``..._step``
match as well: from the model's outputs to its gradients, everything that a training step does with objects. ``--tune``
writes launch parameters for the card.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor
from unit_fast_kernels import set_loss as kernel

from benchmarks.baselines.unit_eager_training import DetectionLoss, match
from benchmarks.runner import show
from benchmarks.runner.cases import Benchmark, Case, Provider
from benchmarks.runner.main import main as run
from benchmarks.runner.marks import Marks
from benchmarks.runner.operators import exact_case, inputs_of, place, shapes_of, work_of
from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.config import LossConfig
from unit_fast.detection import criterion, matcher

CPU_SHAPES = {
    "unit_coco": kernel.SHAPES["unit_coco"],
    "crowded": (6, 2, 100, 92, 100),
    "unit_vg": (6, 1, 100, 1602, 20),
}
QUICK_SHAPES = {"unit_coco": (2, 2, 12, 9, 5), "crowded": (1, 2, 5, 4, 9)}
STEP_SHAPES = {"unit_coco_step": kernel.SHAPES["unit_coco"]}
QUICK_STEP_SHAPES = {"unit_coco_step": (2, 2, 12, 9, 5)}
AIM = 1 / 0.35
"""Times as fast as DETR's criterion, on a CPU, matching included."""
LOSS = LossConfig(ce_normalisation="per_process")
"""DETR's normalisation, and its weights."""
SETTINGS = {"normalisation": "per_process", "weights": (1.0, LOSS.weight_bbox, LOSS.weight_giou)}


def reference(**inputs) -> tuple[Tensor, ...]:
    return kernel.SET_LOSS.run("reference", **inputs)


def detr_pairs(query: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Layer, image -> (queries, objects) of a matching [L,B,N], on the host as DETR's matcher leaves them."""
    found = []
    for of_layer in query.cpu():
        of_images = [(of_image, (of_image >= 0).nonzero().flatten()) for of_image in of_layer]
        found.append([(of_image[objects], objects) for of_image, objects in of_images])
    return found


class Detr(Provider):
    """DETR's criterion, a call a decoder layer, in float32 as DETR runs it under autocast."""

    def __init__(self, inputs: dict, matching: bool):
        self.logits, self.boxes = (inputs[name].requires_grad_() for name in ("logits", "boxes"))
        device = self.logits.device
        self.criterion = DetectionLoss(self.logits.shape[-1], LOSS.no_object_weight).to(device)
        self.targets = [
            {"labels": labels, "boxes": boxes} for labels, boxes in zip(inputs["labels"], inputs["target_boxes"])
        ]
        self.hidden = torch.zeros(len(self.logits), device=device)
        self.pairs = None if matching else detr_pairs(inputs["query"])

    def terms(self, marks: Callable[[str], None]) -> dict[str, Tensor]:
        """The terms by the names of ``detection_losses``."""
        logits, boxes, pairs = self.logits.float(), self.boxes.float(), self.pairs
        if pairs is None:
            pairs = [match(logits[i], boxes[i], self.targets) for i in range(len(logits))]
            marks("matching")
        return self.criterion(logits, boxes, self.hidden, self.targets, pairs)[0]

    def gradients(self, terms: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(terms.values()), (self.logits, self.boxes))

    def step(self, marks: Marks) -> None:
        terms = self.terms(marks)
        marks("losses")
        self.gradients(terms)
        marks("backward")

    def outputs(self) -> dict[str, Tensor]:
        terms = self.terms(lambda phase: None)
        dlogits, dboxes = self.gradients(terms)
        found = {name: terms[name].detach() for name in sorted(terms)}
        return found | {"grad/logits": dlogits, "grad/boxes": dboxes}


class Batched(Detr):
    """All layers at once by ``function``, given the matching."""

    def __init__(self, inputs: dict, function: Callable):
        self.logits, self.boxes = (inputs[name].requires_grad_() for name in ("logits", "boxes"))
        self.inputs, self.function = inputs, function

    def terms(self, marks: Callable[[str], None]) -> dict[str, Tensor]:
        found = {}
        for name, of_layer in zip(("ce", "bbox", "giou"), self.function(**self.inputs, **SETTINGS)):
            *auxiliary, found[f"loss_{name}"] = of_layer.unbind(0)
            found |= {f"loss_{name}_{i}": value for i, value in enumerate(auxiliary)}
        return found


class Step(Batched):
    """As the model does it: matching, then the losses of ``detection_losses``; ``mode`` is one of ``ops.kernels``."""

    def __init__(self, inputs: dict, mode: str = "auto"):
        self.logits, self.boxes = (inputs[name].requires_grad_() for name in ("logits", "boxes"))
        self.mode, self.no_object = mode, inputs["no_object"]
        self.batch = Batch(
            task="detection_coco",
            labels=inputs["labels"],
            boxes=inputs["target_boxes"],
            counts=(inputs["labels"] >= 0).sum(1, dtype=torch.int32),
        )

    def terms(self, marks: Callable[[str], None]) -> dict[str, Tensor]:
        with ops.kernels(self.mode):
            query = matcher.match(self.logits, self.boxes, self.batch, LOSS)
            marks("matching")
            return criterion.detection_losses(
                self.logits, self.boxes, self.logits, query, self.batch, LOSS, no_object=self.no_object
            )


def loss_case(name: str, shape: tuple, device: str, dtype: torch.dtype, quick: bool) -> Case:
    """The losses alone, the matching given."""
    functions = {"ours": ops.set_loss}
    if device == "cuda":
        functions |= {"batched": reference}
    if device == "cuda" or not quick:  # compiling for a CPU takes longer than all the rest of a quick run
        functions |= {"compiled": torch.compile(reference, dynamic=False)}
    inputs = functools.partial(inputs_of, kernel, shape, dtype, device)
    providers: dict[str, Callable[[], Provider]] = {"eager": lambda: Detr(inputs(), matching=False)}
    providers |= {key: lambda f=function: Batched(inputs(), f) for key, function in functions.items()}
    return exact_case(
        dtype, lambda: Batched(inputs(wide=True), reference), name=name, shape=shape_of(shape),
        device=device, providers=providers, **work_of(kernel, shape, dtype),
    )  # fmt: skip


def step_case(name: str, shape: tuple, device: str) -> Case:
    """Matching and losses, in float32: in bfloat16 a rounding may decide for another pairing."""
    inputs = functools.partial(inputs_of, kernel, shape, torch.float32, device)
    providers = {"eager": lambda: Detr(inputs(), matching=True), "ours": lambda: Step(inputs())}
    return exact_case(
        torch.float32, lambda: Step(inputs(wide=True), "reference"), name=name, shape=shape_of(shape), device=device,
        providers=providers,
    )  # fmt: skip


def shape_of(shape: tuple) -> str:
    layers, images, queries, classes, objects = shape
    return f"{layers} layers x {images} x {queries} x {classes}, {objects} objects"


def ratios(rows: Sequence[Mapping], console: Console) -> None:
    """Ours against DETR's criterion, with the matching, and the aim where it is a CPU's."""
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["provider"]: row for row in rows if row["case"] == case}
        if {"ours", "eager"} <= of.keys():
            ours, eager = of["ours"], of["eager"]
            aimed = ours["device"] == "cpu" and ours["shape"] == shape_of(STEP_SHAPES.get(case, (0,) * 5))
            met = "met" if show.times_as_fast(ours["time_ms"], eager["time_ms"]) >= AIM else "missed"
            line = show.compare(case, ours, eager) + (f" (aim {AIM:.2f}: {met})" if aimed else "")
            console.print(line, highlight=False)


def build(args: argparse.Namespace) -> Benchmark:
    device, dtype = place()
    shapes = shapes_of(args, card=kernel.SHAPES, cpu=CPU_SHAPES, quick=QUICK_SHAPES)
    cases = [loss_case(name, shape, device, dtype, args.quick) for name, shape in shapes.items()]
    steps = QUICK_STEP_SHAPES if args.quick else STEP_SHAPES
    cases += [step_case(name, shape, device) for name, shape in steps.items()]
    return Benchmark(
        name="bench_set_loss",
        title="Set loss of detection, forward and backward",
        method=[
            "eager: DETR's criterion, a call a decoder layer (baselines/unit_eager_training.py).",
            "batched: our reference, all layers at once in plain PyTorch; compiled: the same by torch.compile.",
            "Cases named ..._step match as well.",
            "Gate: every term and both gradients against the reference in float64, in the 2-norm.",
            "% of peak: the bytes that must move, forward and backward, over the time and the card's bandwidth.",
        ],
        excluded="the model; in the cases without _step the matching",
        cases=cases,
        summary=ratios,
    )


main = functools.partial(run, build, __doc__, ops=["set_loss"])

if __name__ == "__main__":
    sys.exit(main())
