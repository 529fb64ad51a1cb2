"""One update: forward pass, matching, losses, backward pass and optimiser; and how a run makes its updates."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.buckets import buckets_of
from unit_fast.config import RunConfig
from unit_fast.numerics import in_full_precision, takes_bf16
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run import step_graph
from unit_fast.run.memory import memory_told
from unit_fast.run.state import State
from unit_fast.schedule import lr_multiplier, lr_multiplier_tensor


@dataclass
class Update:
    """Figures of one update, on the device."""

    names: tuple[str, ...]
    """Names of the loss terms."""
    terms: Tensor
    """[n] their values over all samples of the update. Their sum is the step loss."""
    grad_norm: Tensor
    """0-d, before clipping."""
    nonfinite: Tensor
    """0-d, not zero if loss or gradient was not finite and nothing was changed."""


def train_step(
    model: torch.nn.Module,
    optimizer: MaskedAdamW,
    task: str,
    batch: Batch | Sequence[Batch],
    *,
    used: Tensor | None = None,
    bf16: bool = False,
) -> Update:
    """One update of ``model`` on ``task`` from a batch, or from several, whose samples count as those of one batch.

    used: uint8 [n] in the optimiser's parameter order, see ``setup.used_masks``. bf16: autocast of the forward
    pass; matching and losses are float32. Nothing is read back from the device, save for matching on a CPU. An update
    whose loss or gradient is not finite changes nothing. ``ValueError`` if a batch is of another task.
    """
    batches = [batch] if isinstance(batch, Batch) else batch
    if any(micro.task != task for micro in batches):
        raise ValueError(f"train_step: task is {task!r}, the batches are of {[micro.task for micro in batches]}")
    device = next(model.parameters()).device.type
    optimizer.zero_grad(set_to_none=True)
    terms, samples = 0.0, sum(map(len, batches))
    # Losses with denominators of their own (boxes, say) need the whole update's; alone, a batch is the whole update.
    shares = [{"share": share} for share in model.shares(batches)] if len(batches) > 1 else [{}]
    for micro, share in zip(batches, shares, strict=True):
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            out = model(micro)
        losses = model.losses(in_full_precision(out) if bf16 else out, micro, **share)
        values = torch.stack(list(losses.values())) / (samples / len(micro))
        loss, values = values.sum(), values.detach()
        # An infinite loss can have a finite gradient: this makes it NaN, which the optimiser refuses.
        (loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()
        terms = terms + values
    stats = optimizer.step(used)
    return Update(tuple(losses), terms, stats.grad_norm, stats.nonfinite)


class Step:
    """The updates of a run: ``step(task, batches)``, captured as CUDA graphs where they are, else eager.

    masks: data set key -> ``setup.used_masks``. ``UserError`` where graphs are demanded and cannot be.
    """

    def __init__(self, state: State, config: RunConfig, masks: dict[str, Tensor], device: torch.device):
        self.state, self.config, self.masks, self.device = state, config, masks, device
        self.bf16 = takes_bf16(config.precision, device)
        self.why_eager = step_graph.wanted(config.graph, device)
        self.graphs = None
        if not self.why_eager:
            state.optimizer.prepare()
            self.graphs = step_graph.StepGraphs(self._captured, buckets_of(config), device, done=state.step)

    def __call__(self, task: str, batches: list[Batch]) -> Update:
        """The next update, the averaged weights' too, on batches of ``task`` wherever they lie.

        The next call may overwrite what it returns. ``OutOfMemory`` where memory does not suffice.
        """
        with memory_told(self.state, self.config, self.device, task):
            update = self.graphs(task, batches) if self.graphs else self._eager(task, batches)
            if self.state.ema:
                self.state.ema.update(update.nonfinite)
        return update

    def _eager(self, task: str, batches: list[Batch]) -> Update:
        self.state.optimizer.scale_lr(self.lr_multiplier(self.state.step))
        return self._train_step(task, [batch.to(self.device) for batch in batches])

    def _captured(self, task: str, batches: list[Batch], done: Tensor) -> Update:
        # The learning rate follows the count on the device: a number of the host would be frozen into the graph.
        self.state.optimizer.scale_lr(lr_multiplier_tensor(done, self.config.optim.warmup_steps, self.config.steps))
        update = self._train_step(task, batches)
        self.state.optimizer.zero_grad(set_to_none=True)  # their memory is the graphs', and the next step's too
        return update

    def _train_step(self, task: str, batches: list[Batch]) -> Update:
        return train_step(self.state.model, self.state.optimizer, task, batches, used=self.masks[task], bf16=self.bf16)

    def lr_multiplier(self, done: int) -> float:
        """Factor on the learning rates of the update after ``done`` ones."""
        return lr_multiplier(done, self.config.optim.warmup_steps, self.config.steps)

    def check(self) -> None:
        """``RuntimeError`` unless every captured step so far has run. Reads the device."""
        if self.graphs:
            self.graphs.check()

    def describe(self) -> str:
        """One line: how updates are made."""
        if self.why_eager:
            return f"every step runs eagerly, without CUDA graphs: {self.why_eager}"
        count = len(self.graphs.buckets.images)
        return f"steps are captured as CUDA graphs, images padded to one of {count} shapes"
