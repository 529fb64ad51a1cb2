"""Clip by the norm and one AdamW update of UniT's real parameter list: ours, the authors' rule, torch, apex.

``python -m benchmarks.bench_optimizer``: with every parameter used, and with only those of a detection step. Without a
card on the CPU. ``--tune`` writes launch parameters for the card.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn
from unit_fast_kernels import adamw as kernel

from benchmarks.baselines.unit_eager_training import HFAdamW
from benchmarks.runner import show
from benchmarks.runner.cases import Benchmark, Case, Provider
from benchmarks.runner.main import main as run
from benchmarks.runner.marks import Marks
from benchmarks.runner.operators import installed, place
from unit_fast import ops, recipes
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW

SETTINGS = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-16, "weight_decay": 1e-4}
"""eps so small that both forms of the rule, which place it differently, give the same."""
MAX_NORM = 0.1
START = 1e-3
"""Value of every parameter at the start; small, so that rounding it does not hide the updates."""
GATE_STEPS = (1.0, -0.5, 0.7)
"""Factors on the gradients of the updates that the gate compares."""
DETECTION = "detection_coco"


class World:
    """Parameters and gradients, shared by all providers of a case: only their states differ."""

    def __init__(self, recipe: str, detection: bool, device: str):
        with torch.device("meta"):
            model = UniT(recipes.recipe(recipe).model)
        names = {id(p): name for name, p in model.named_parameters()}
        members = [p for group in model.parameter_groups(1.0, 1.0) for p in group["params"]]
        used = model.used_parameters(DETECTION)
        self.flags = [not detection or bool(used[names[id(p)]]) for p in members]
        self.params = [nn.Parameter(torch.full(p.shape, START, device=device)) for p in members]
        generator = torch.Generator(device).manual_seed(0)
        self.raw = [
            torch.randn(p.shape, generator=generator, device=device) if flag else None
            for p, flag in zip(members, self.flags)
        ]
        for p, raw in zip(self.params, self.raw):
            p.grad = None if raw is None else raw.clone()
        self.used = torch.tensor(self.flags, dtype=torch.uint8, device=device)
        self.elements = sum(p.numel() for p, flag in zip(self.params, self.flags) if flag)

    @torch.no_grad()
    def restore(self, factor: float = 1.0) -> None:
        """The gradients as the backward pass left them."""
        pairs = [(p.grad, raw) for p, raw in zip(self.params, self.raw) if raw is not None]
        grads, raws = map(list, zip(*pairs))
        torch._foreach_copy_(grads, raws)
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)


class Update(Provider):
    """Clip and update with one optimiser; ``step(optimizer, world)`` does both."""

    def __init__(self, world: World, optimizer: torch.optim.Optimizer, step: Callable):
        self.world, self.optimizer, self._step = world, optimizer, step

    def step(self, marks: Marks) -> None:
        self.world.restore()
        marks.skip()
        self._step(self.optimizer, self.world)
        marks("clip and update")

    def outputs(self) -> dict[str, Tensor]:
        with torch.no_grad():
            for p in self.world.params:
                p.fill_(START)
        for factor in GATE_STEPS:
            self.world.restore(factor)
            self._step(self.optimizer, self.world)
        return {f"moved/{i}": p.detach() - START for i, p in enumerate(self.world.params)}


def clip_and_step(optimizer: torch.optim.Optimizer, world: World) -> None:
    nn.utils.clip_grad_norm_(world.params, MAX_NORM)
    optimizer.step()


def ours(mode: str) -> Callable:
    def step(optimizer: MaskedAdamW, world: World) -> None:
        with ops.kernels(mode):
            optimizer.step(world.used)

    return step


def apex(params: list) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(params, adam_w_mode=True, **SETTINGS)


def providers(world: Callable[[], World], device: str, peers: list[str]) -> dict[str, Callable[[], Update]]:
    def masked(mode: str, **settings) -> Callable[[], Update]:
        made = lambda p: MaskedAdamW(p, **SETTINGS, rule="hf", unused="skip", max_norm=MAX_NORM, **settings)  # noqa: E731
        return lambda: Update(world(), made(world().params), ours(mode))

    def plain(make: Callable) -> Callable[[], Update]:
        return lambda: Update(world(), make(world().params), clip_and_step)

    found = {
        "authors": plain(lambda p: HFAdamW(p, **SETTINGS)),
        "foreach": plain(lambda p: torch.optim.AdamW(p, **SETTINGS, foreach=True)),
        "torch fused": plain(lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)),
    }
    if device == "cuda" and "apex" in peers:
        found["apex"] = plain(apex)
    found["reference"] = masked("reference")
    if device == "cuda":
        found["ours, raw"] = masked("auto", clip_gradients_in_place=False)
    return found | {"ours": masked("auto")}


def ratios(rows: list[dict], console: Console) -> None:
    """Ours against the authors' rule."""
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {row["provider"]: row for row in rows if row["case"] == case}
        if {"ours", "authors"} <= set(by):
            console.print(show.compare(case, by["ours"], by["authors"]), highlight=False)


def build(args: argparse.Namespace) -> Benchmark:
    device, _ = place()
    peers = installed({"apex": "apex"}) if device == "cuda" else []
    recipe = "demo_quick" if args.quick else "all8_shared"
    cases, kept = [], {}
    for name, detection in (("vision_half", True), ("all_used", False)):

        def world(name=name, detection=detection) -> World:
            if name not in kept:  # the case's first provider makes it, and drops that of the case before
                kept.clear()
                kept[name] = World(recipe, detection, device)
            return kept[name]

        shape = kernel.SHAPES["unit_vision" if detection else "unit_201m"]
        cases.append(
            Case(
                name=name,
                shape=f"{recipe}, {'parameters of a detection step' if detection else 'all parameters'}",
                device=device,
                providers=providers(world, device, peers),
                reference="authors",
                tolerances={"": 1e-3},
                error="l2",
                bytes=None if args.quick else kernel.bytes_moved(shape, torch.float32),
            )
        )
    return Benchmark(
        name="bench_optimizer",
        title="Clip by the joint norm and AdamW",
        quick="a small model",
        method=[
            "authors: clip_grad_norm_, then per tensor one .item() for the skip test and the Hugging Face form. "
            "foreach, torch fused, apex: clip_grad_norm_, then AdamW.",
            "ours: MaskedAdamW with the mask of the step; reference: the same in plain PyTorch; raw: without writing "
            "the clipped gradients back.",
            "Before each update the gradients are restored (not timed), so that the clipping always has work to do.",
            "Gate: what three updates move every tensor by, against the authors' rule, in the 2-norm.",
            "% of peak: gradients read twice, p, m and v read and written, over the time and the card's bandwidth.",
        ],
        excluded="zero_grad, learning-rate schedule",
        cases=cases,
        summary=ratios,
    )


main = functools.partial(run, build, __doc__, ops=["adamw"])

if __name__ == "__main__":
    sys.exit(main())
