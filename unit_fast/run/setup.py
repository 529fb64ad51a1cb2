"""From a configuration to what a run needs: device, samples, model and optimiser, what each task trains."""

import dataclasses

import torch
from torch import Tensor, nn

from unit_fast.config import RunConfig
from unit_fast.config_check import FREEZABLE
from unit_fast.data import open_dataset
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.optim import MaskedAdamW, make_optimizer
from unit_fast.optim.state_dict import member_names
from unit_fast.run.initial_weights import load_initial
from unit_fast.tasks import get_task


def device_of(config: RunConfig) -> torch.device:
    """The device a run uses. ``UserError`` where it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: not a device; give auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: this machine or this torch has no CUDA; give --device cpu")
    return device


def open_split(config: RunConfig, name: str, split: str, *, augment: bool):
    """A split of the data set ``name`` as the run's model takes it, see ``data.open_dataset``."""
    model = config.model
    return open_dataset(
        name, split, config.data, model.tasks[name], augment=augment, vocab_size=model.text.vocab_size,
        attribute_outputs=model.loss.attribute_outputs,
    )  # fmt: skip


def build(config: RunConfig, device: torch.device, *, pretrained: bool = True) -> tuple[UniT, MaskedAdamW, RunConfig]:
    """Model, optimiser and the configuration with ``started_from`` filled in.

    pretrained: load pretrained parts and ``init_from``; a resumed run has its weights in the checkpoint.
    """
    torch.manual_seed(config.seed)
    model = UniT(config.model)
    if pretrained:
        config = dataclasses.replace(config, started_from=load_initial(model, config))
    model.to(device, memory_format=model.backbone.memory_format)
    freeze(model, config)
    return model, make_optimizer(model, config.optim), config


def freeze(model: UniT, config: RunConfig) -> None:
    """Stop the gradients of the encoders named in ``config.freeze``, and of the backbone at learning rate 0.

    Dropout stays active in frozen parts.
    """
    prefixes: tuple[str, ...] = ("backbone.",) if config.optim.lr_backbone == 0 else ()
    for part in config.freeze:
        prefixes += FREEZABLE[part]
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) and ".task_embedding." not in name:
            parameter.requires_grad_(False)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def used_masks(model: UniT, optimizer: MaskedAdamW, tasks) -> dict[str, Tensor]:
    """Data set key -> uint8 [n], which of the optimiser's parameters an update on it uses (SPEC 3.5).

    Known from the module tree before the forward pass. On GLUE ``bert_pos_projection`` is in the graph with a gradient
    of exactly zero: the policy ``graph`` leaves it out, the others see to it themselves.
    """
    members, device = member_names(model, optimizer), next(model.parameters()).device
    masks = {}
    for task in tasks:
        used = model.used_parameters(task)
        if optimizer.unused == "graph" and not get_task(task).has_image:
            used = {n: u and not n.startswith("bert_pos_projection.") for n, u in used.items()}
        masks[task] = torch.tensor([used[name] for name in members], dtype=torch.uint8, device=device)
    return masks
