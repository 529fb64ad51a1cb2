"""The steps that are compared: the authors' formulation, the same with the library's fast paths (and compiled), ours.

Each runs on any device, phase by phase, in float32 or with its forward pass under bfloat16 autocast (losses are
float32), and gives its losses and gradients for the gate. Ours as training runs it on a card is in ``updates.py``.
"""

import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from benchmarks.baselines.unit_eager import EagerConfig, UniTEager
from benchmarks.baselines.unit_eager_training import HFAdamW
from benchmarks.runner.cases import Provider
from benchmarks.runner.marks import Marks, NoMarks
from benchmarks.step.problems import (
    DROPS_NOTHING,
    LR,
    LR_BACKBONE,
    MAX_NORM,
    TASKS,
    eager_inputs,
    gate_outputs,
    make_batch,
    restore_dropout,
    set_dropout,
)
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.weights import convert

CPU = torch.device("cpu")


def _autocast(device: torch.device, bf16: bool):
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def _floats(found):
    """Floating tensors in dicts and outputs as float32."""
    if isinstance(found, Tensor):
        return found.float() if found.is_floating_point() else found
    if isinstance(found, dict):
        return {name: _floats(value) for name, value in found.items()}
    if dataclasses.is_dataclass(found):
        return dataclasses.replace(found, **{k: _floats(v) for k, v in vars(found).items()})
    return found


def _to(found, device: torch.device):
    """The same on a device: tensors, also in dicts and lists."""
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, dict):
        return {name: _to(value, device) for name, value in found.items()}
    return [_to(value, device) for value in found]


class Eager(Provider):
    """The authors' formulation; ``library``: with the library's own fast paths switched on; ``compiled``: the model's
    forward and backward by torch.compile too (its losses match on the host, they stay as they are)."""

    def __init__(
        self, case: tuple, config: dict, state: dict | None, library: bool = False, *, compiled: bool = False,
        device: torch.device = CPU, bf16: bool = False,
    ):  # fmt: skip
        self.task, self.kind, self.device, self.bf16 = case[0], TASKS[case[0]][0], device, bf16
        torch.manual_seed(0)
        with device:
            self.model = UniTEager(EagerConfig.from_mmf(config, fused_attention=library)).to(device)
        if state is not None:
            self.model.load_state_dict(state)
        self.inputs, self.targets = (_to(x, device) for x in eager_inputs(make_batch(*case[:4])))
        self.model.train()
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        if library:
            self.model.to(memory_format=torch.channels_last)
            if "image" in self.inputs:
                self.inputs["image"] = self.inputs["image"].contiguous(memory_format=torch.channels_last)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
        else:
            self.optimizer = HFAdamW(groups)
        self.parameters = [p for group in groups for p in group["params"]]
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def _outputs(self) -> tuple[Tensor, dict]:
        with _autocast(self.device, self.bf16):
            hidden = self.forward(self.task, self.inputs)
            outputs = self.model.heads(self.task, hidden)
        return (_floats(hidden), _floats(outputs)) if self.bf16 else (hidden, outputs)

    def step(self, marks: Marks) -> None:
        hidden, outputs = self._outputs()
        marks("forward")
        losses, _ = self.model.losses(self.task, hidden, outputs, self.targets)
        loss = sum(losses.values())
        marks("losses")
        loss.backward()
        marks("backward")
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks("optimiser")

    def update(self) -> None:
        """One update; on CUDA only begun when this returns."""
        self.step(NoMarks())

    def outputs(self, matched: list | None = None) -> dict[str, Tensor]:
        """matched: pairs by layer to take; those taken are ``self.matching`` afterwards."""
        before = set_dropout(self.model, 0.0)
        losses, self.matching = self.model.losses(self.task, *self._outputs(), self.targets, matched=matched)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        out = gate_outputs(losses, gradients, self.kind)
        self.optimizer.zero_grad(set_to_none=True)
        restore_dropout(before)
        return out


class Ours(Provider):
    """unit_fast as ``unit-fast train`` runs it."""

    def __init__(
        self, case: tuple, config: dict, state: dict | None, *, device: torch.device = CPU, bf16: bool = False
    ):
        self.to_mmf, self.kind, self.device, self.bf16 = convert.to_mmf, TASKS[case[0]][0], device, bf16
        if state is None:
            self.model = UniT(convert.model_config_from_mmf(config))
        else:  # the baseline's loss is a mean over the process
            self.model = convert.from_mmf(state, config, ce_normalisation="per_process")
        self.model.train()
        if device.type != "cpu":  # on a CPU each part has the layout that suits it already
            self.model.to(device, memory_format=self.model.backbone.memory_format)
        self.batch = make_batch(*case[:4]).to(device)
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        self.optimizer = MaskedAdamW(groups, lr=LR, weight_decay=1e-4, unused="skip", max_norm=MAX_NORM)

    def _forward(self):
        with _autocast(self.device, self.bf16):
            out = self.model(self.batch)
        return _floats(out) if self.bf16 else out

    def step(self, marks: Marks) -> None:
        out = self._forward()
        marks("forward")
        losses = self.model.losses(out, self.batch)
        loss = sum(losses.values())
        marks("losses")
        loss.backward()
        marks("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks("optimiser")

    def outputs(self, matched: list | None = None) -> dict[str, Tensor]:
        """matched: pairs by layer to take, as ``Eager`` makes them."""
        before = set_dropout(self.model, DROPS_NOTHING)
        matching = None if matched is None else queries_of(matched, self.batch.labels)
        losses = self.model.losses(self._forward(), self.batch, matching)
        sum(losses.values()).backward()
        out = gate_outputs(losses, self.to_mmf(self.model, "gradients"), self.kind)
        self.optimizer.zero_grad(set_to_none=True)
        restore_dropout(before)
        return out


def queries_of(matched: list, labels: Tensor) -> Tensor:
    """Pairs (query, object) by layer and image -> the query of every object, int64 [L,B,N] where ``labels`` [B,N] is,
    -1 for none."""
    found = torch.full((len(matched), *labels.shape), -1, dtype=torch.int64)
    for layer, images in enumerate(matched):
        for image, (query, thing) in enumerate(images):
            found[layer, image, thing] = query
    return found.to(labels.device)
