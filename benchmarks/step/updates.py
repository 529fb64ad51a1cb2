"""Ours as training runs it: whole updates on a batch padded to its bucket, eagerly or captured as one graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.runner.cases import Provider
from benchmarks.step.problems import LR, LR_BACKBONE, MAX_NORM, SEED, make_batch
from unit_fast.batch import Batch
from unit_fast.buckets import Buckets, fill
from unit_fast.model import UniT
from unit_fast.numerics import arithmetic
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.setup import used_masks
from unit_fast.run.step_graph import Graphs, StepGraphs
from unit_fast.run.train import Update, train_step
from unit_fast.weights import convert

CHECKED = 4
"""Updates that the gate compares: the eager one of the bucket's warm-up, and three replays."""


class NotCaptured(Graphs):
    """What stands for CUDA's graphs on a CPU: each replay runs the step again, into the captured result."""

    def capture(self, step):
        result = object.__new__(Update)
        return lambda: vars(result).update(vars(step())), result


class Training:
    """Model and optimiser as training has them, for updates of one task; bfloat16 autocast on CUDA."""

    def __init__(self, task: str, config: dict, device: torch.device):
        self.task, self.device = task, device
        torch.manual_seed(SEED)
        with device:
            self.model = UniT(convert.model_config_from_mmf(config)).train()
        self.model.to(device, memory_format=self.model.backbone.memory_format)
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        self.optimizer = MaskedAdamW(groups, unused="skip", max_norm=MAX_NORM, clip_gradients_in_place=False)
        self.used = used_masks(self.model, self.optimizer, [self.task])[self.task]

    def eager_update(self, batches: list[Batch]) -> Update:
        """One update; on CUDA only begun when this returns."""
        bf16 = self.device.type == "cuda"
        update = train_step(self.model, self.optimizer, self.task, batches, used=self.used, bf16=bf16)
        self.optimizer.zero_grad(set_to_none=True)  # a captured step's gradients belong to the graph's memory
        return update


class Step(Training, Provider):
    """Updates on one batch, padded to its bucket."""

    def __init__(self, case: tuple, config: dict, device: torch.device, graph: bool, deterministic: str = "auto"):
        super().__init__(case[0], config, device)
        self.deterministic = deterministic
        batch = make_batch(*case[:4])
        _, height, width = case[1] or (0, 64, 96)
        buckets = Buckets(short_side=min(height, width), max_side=max(height, width))
        self.batch = buckets.of([batch]).empty(batch, device)
        fill(self.batch, batch)
        self.graphs = None
        if graph:
            self.optimizer.prepare()
            backend = None if device.type == "cuda" else NotCaptured()
            self.graphs = StepGraphs(
                lambda task, batches, done: self.eager_update(batches), buckets, device, backend=backend
            )

    def update(self) -> Update:
        """One update; on CUDA only begun when this returns."""
        with arithmetic("auto", self.deterministic, self.device):
            return self.graphs(self.task, [self.batch]) if self.graphs else self.eager_update([self.batch])

    def step(self, marks: Callable[[str], None]) -> None:
        self.update()

    def outputs(self) -> dict[str, Tensor]:
        """Losses and gradient norms of the first updates, the parameters after them; from one seed, dropout on."""
        torch.manual_seed(SEED + 1)
        found = {}
        for i in range(CHECKED):
            update = self.update()
            found |= {f"losses/{i}": update.terms.clone(), f"norm/{i}": update.grad_norm.clone()}
        if self.graphs:
            self.graphs.check()
        return found | {f"weights/{name}": p.detach() for name, p in self.model.named_parameters()}

    def replays(self) -> int:
        """Updates that were replayed so far. ``RuntimeError`` where the bucket was to be captured and was not."""
        if self.graphs is None:
            return 0
        (row,) = self.graphs.rows()
        if row["refused"]:
            raise RuntimeError(f"the step was not captured: {row['refused']}")
        return row["replays"]
