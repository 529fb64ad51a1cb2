"""Matching of DETR: cost, exact assignment and indices on the device, of all decoder layers and images.

``python -m benchmarks.bench_match``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes launch
parameters of both kernels for the card. Peers: SciPy image by image and layer by layer as DETR does it, the batched
cost in eager PyTorch with one copy to SciPy and one back, and torch-linear-assignment (0.1 and torch-hungarian are its
Triton line, 0.0 its CUDA line) where it is installed. Cases named ``solve_...`` have the costs given.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from unit_fast_kernels.assignment import assignment_reference
from unit_fast_kernels.match_cost import match_cost_reference

from benchmarks.baselines.unit_eager_training import corners, pairwise_giou
from benchmarks.runner.cases import Benchmark, Case, Provider
from benchmarks.runner.main import main as run
from benchmarks.runner.marks import Marks
from benchmarks.runner.operators import installed, place, shapes_of
from unit_fast import ops

SHAPES = {
    "unit_coco": (6, 16, 100, 92, 32, 7),
    "unit_crowded": (6, 8, 100, 92, 100, 80),
    "unit_visual_genome": (6, 8, 100, 1601, 64, 20),
    "rf_detr": (4, 52, 300, 91, 32, 7),
}
"""(L, B, Q, K, N, mean count): layers, images, queries, classes, padded targets. RF-DETR has 4 images x 13 groups."""
SOLVE_SHAPES = {"solve_96x100x32": (96, 100, 32), "solve_208x300x100": (208, 300, 100)}
"""(P, Q, T), all T real: the target of this project, and the sizes that torch-hungarian publishes."""
CPU_SHAPES = {
    "coco": (6, 8, 100, 92, 20, 7),
    "coco_full": (6, 8, 100, 92, 20, 20),
    "crowded": (6, 2, 100, 92, 100, 80),
    "rf_detr": (4, 13, 300, 91, 32, 7),
}
CPU_SOLVE_SHAPES = {"solve_48x100x20": (48, 100, 20), "solve_26x300x100": (26, 300, 100)}
QUICK_SHAPES = {"coco": (2, 2, 20, 12, 6, 3)}
QUICK_SOLVE_SHAPES = {"solve_4x20x6": (4, 20, 6)}
PEERS = {"torch_linear_assignment": "torch_linear_assignment"}


# ------------------------------------------------------------------------------------------------------------ problems


def counts_of(images: int, targets: int, mean: int) -> Tensor:
    """Counts spread evenly around the mean as far as 0 and ``targets`` allow, in any order, int32."""
    far = min(mean, targets - mean)
    return torch.linspace(mean - far, mean + far, images)[torch.randperm(images)].round().int()


def predictions(shape: tuple, device: str) -> dict[str, Tensor]:
    """Arguments of ``match_cost`` as of a trained model: some queries are near a target, two of them near the same."""
    layers, images, queries, classes, targets, mean = shape
    torch.manual_seed(0)
    counts = counts_of(images, targets, mean)
    padding = torch.arange(targets) >= counts[:, None]
    labels = torch.randint(0, classes - 1, (images, targets))
    wanted = torch.cat((torch.rand(images, targets, 2) * 0.6 + 0.2, torch.rand(images, targets, 2) * 0.3 + 0.05), -1)
    logits = torch.randn(layers, images, queries, classes)
    boxes = torch.rand(layers, images, queries, 4) * 0.4 + 0.2
    near = torch.rand(layers, images, queries).argsort(-1)[..., : 2 * targets]  # queries that stand for an object
    objects = torch.arange(near.shape[-1]) % targets
    found = wanted[:, objects] * (1 + 0.05 * torch.randn(layers, images, near.shape[-1], 4))
    boxes = boxes.scatter(2, near[..., None].expand(*near.shape, 4), found)
    high = torch.nn.functional.one_hot(labels[:, objects], classes).float() * 6.0
    logits = logits.scatter_add(
        2, near[..., None].expand(*near.shape, classes), high.expand(layers, *high.shape).contiguous()
    )
    made = {
        "logits": logits,
        "boxes": boxes,
        "labels": labels.masked_fill(padding, -1),
        "target_boxes": wanted.masked_fill(padding[..., None], 0.0),
        "counts": counts,
    }
    return {name: value.to(device) for name, value in made.items()}


def costs(shape: tuple, device: str) -> dict[str, Tensor]:
    """Arguments of ``assignment``: uniform random costs, laid out as ``match_cost`` does it."""
    problems, queries, targets = shape
    torch.manual_seed(0)
    cost = torch.rand(problems, targets, queries).to(device).mT
    return {"cost": cost, "counts": torch.full((problems,), targets, dtype=torch.int32, device=device)}


# ----------------------------------------------------------------------------------------------------------- providers


class Matcher(Provider):
    """A provider that pairs. Its result is judged by the cost of the pairs in float64: other pairs may cost the same
    in float32."""

    def __init__(self, inputs: dict[str, Tensor]):
        self.inputs = inputs

    def query(self, marks: Callable[[str], None]) -> Tensor:
        """[P,T] or [L,B,N] on the device, -1 for none."""
        raise NotImplementedError

    def step(self, marks: Marks) -> None:
        self.query(marks)

    def outputs(self) -> dict[str, Tensor]:
        query = self.query(lambda phase: None)
        if "cost" in self.inputs:
            cost = self.inputs["cost"].double()
        else:
            cost = match_cost_reference(
                *(x.double() if x.is_floating_point() else x for x in self.inputs.values())
            ).flatten(0, 1)
        query = query.flatten(0, -2)
        paid = cost.gather(1, query.clamp(min=0)[:, None]).squeeze(1).masked_fill(query < 0, 0.0)
        distinct = [len(set(q) - {-1}) for q in query.tolist()]
        return {"total": paid.sum(-1), "pairs": (query >= 0).sum(-1), "distinct": torch.tensor(distinct)}


class Ours(Matcher):
    def query(self, marks):
        if "cost" in self.inputs:
            return ops.assignment(**self.inputs)[0]
        cost = ops.match_cost(**self.inputs)
        marks("cost")
        query, _ = ops.assignment(cost, self.inputs["counts"])
        marks("solve")
        return query


class Detr(Matcher):
    """Layer by layer, the cost between all queries and all targets of the batch, a copy, SciPy image by image, the
    indices copied back. Given costs are copied and solved one by one."""

    def query(self, marks):
        if "cost" in self.inputs:
            cost = self.inputs["cost"]
            return torch.stack([self._indices(linear_sum_assignment(c.cpu()), c.shape[1], c.device) for c in cost])
        logits, boxes, labels, target_boxes, counts = self.inputs.values()
        sizes = self.sizes
        found = []
        for scores, predicted in zip(logits, boxes):
            probability, predicted = scores.flatten(0, 1).softmax(-1), predicted.flatten(0, 1)
            wanted, classes = target_boxes[self.real], labels[self.real]
            cost = 5 * torch.cdist(predicted, wanted, p=1) - probability[:, classes]
            cost = cost - 2 * pairwise_giou(corners(predicted), corners(wanted))
            cost = cost.view(len(counts), -1, len(classes))
            marks("cost")
            cost = cost.cpu()
            pairs = [linear_sum_assignment(c[i]) for i, c in enumerate(cost.split(sizes, -1))]
            found.append(torch.stack([self._indices(pair, labels.shape[1], labels.device) for pair in pairs]))
            marks("solve")
        return torch.stack(found)

    def __init__(self, inputs):
        super().__init__(inputs)
        if "cost" not in inputs:  # DETR has its targets image by image
            counts, labels = inputs["counts"], inputs["labels"]
            self.sizes = counts.tolist()
            self.real = torch.arange(labels.shape[1], device=labels.device) < counts[:, None]

    @staticmethod
    def _indices(pair, targets: int, device) -> Tensor:
        query = np.full(targets, -1)
        query[pair[1]] = pair[0]
        return torch.from_numpy(query).to(device)


class ScipyBatched(Matcher):
    """The batched cost in eager PyTorch, one copy, SciPy for each problem, one copy back."""

    def query(self, marks):
        if "cost" in self.inputs:
            return assignment_reference(**self.inputs)[0]
        cost = match_cost_reference(**self.inputs)
        marks("cost")
        query, _ = assignment_reference(cost.flatten(0, 1), self.inputs["counts"])
        marks("solve")
        return query.unflatten(0, cost.shape[:2])


class TorchLinearAssignment(Matcher):
    """torch-linear-assignment on padded problems: targets that are none cost nothing and take queries left over, which
    is exact where there are no more targets than queries."""

    def query(self, marks):
        from torch_linear_assignment import batch_linear_assignment

        if "cost" in self.inputs:
            return batch_linear_assignment(self.inputs["cost"].mT.contiguous())
        cost = match_cost_reference(**self.inputs)
        marks("cost")
        query = batch_linear_assignment(cost.flatten(0, 1).mT.contiguous()).unflatten(0, cost.shape[:2])
        padding = torch.arange(query.shape[-1], device=query.device) >= self.inputs["counts"][:, None]
        query = query.masked_fill(padding, -1)
        marks("solve")
        return query


# ----------------------------------------------------------------------------------------------------------- benchmark


def case_of(name: str, shape: tuple, device: str, peers: list[str]) -> Case:
    """The case of a shape, (P, Q, T) or with layers."""
    solve = len(shape) == 3
    inputs = (costs if solve else predictions)(shape, device)
    providers = {"detr": Detr, "scipy_batched": ScipyBatched}
    if "torch_linear_assignment" in peers:
        providers["torch_linear_assignment"] = TorchLinearAssignment
    providers["ours"] = Ours
    if solve:
        shown = " x ".join(str(n) for n in shape)
    else:
        layers, images, queries, classes, targets, _ = shape
        mean = float(inputs["counts"].double().mean())
        shown = f"{layers} x {images} x {queries}, {classes} classes, {targets} targets, {mean:.1f} real"
    return Case(
        name=name,
        shape=shown,
        device=device,
        providers={key: lambda cls=cls: cls(inputs) for key, cls in providers.items()},
        reference="scipy_batched",
        tolerances={"": 0.0, "total": 1e-5},
    )


def build(args: argparse.Namespace) -> Benchmark:
    device, _ = place()
    shapes = shapes_of(
        args, card=SHAPES | SOLVE_SHAPES, cpu=CPU_SHAPES | CPU_SOLVE_SHAPES, quick=QUICK_SHAPES | QUICK_SOLVE_SHAPES
    )
    peers = installed(PEERS)
    return Benchmark(
        name="bench_match",
        title="Matching: cost, exact assignment, indices on the device",
        method=[
            "detr: a cost between all images a layer, a copy, SciPy image by image. scipy_batched: our reference.",
            "torch_linear_assignment: the reference's cost, its solver on padded problems.",
            "Gate: the cost of the pairs, in float64, and their number against scipy_batched.",
        ],
        excluded="the model before, the loss after",
        cases=[case_of(name, shape, device, peers) for name, shape in shapes.items()],
    )


main = functools.partial(run, build, __doc__, ops=["match_cost", "assignment"])

if __name__ == "__main__":
    sys.exit(main())
