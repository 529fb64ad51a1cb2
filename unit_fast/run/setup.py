"""From a configuration to a model and an optimiser ready for the first update."""

import copy
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unit_fast.config import RunConfig, TextConfig
from unit_fast.config_check import FREEZABLE
from unit_fast.errors import UserError, nearest
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW, make_optimizer
from unit_fast.tasks import get_task
from unit_fast.weights import checkpoint
from unit_fast.weights.loading import load_matching
from unit_fast.weights.pretrained import load_pretrained

_log = logging.getLogger("unit_fast.train")


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


def build(config: RunConfig, device: torch.device, *, pretrained: bool = True) -> tuple[UniT, MaskedAdamW, RunConfig]:
    """Model, optimiser and the configuration with ``started_from`` filled in.

    pretrained: load pretrained parts and ``init_from``; a resumed run has its weights in the checkpoint.
    """
    torch.manual_seed(config.seed)
    model = UniT(config.model)
    if pretrained:
        config = dataclasses.replace(config, started_from=_load_initial(model, config))
    model.to(device, memory_format=model.backbone.memory_format)
    freeze(model, config)
    return model, make_optimizer(model, config.optim), config


PARTS = {"backbone": "backbone.", "text encoder": "text_encoder."}
"""Parts that pretrained files exist for, and how their tensors' names begin."""


def _load_initial(model: UniT, config: RunConfig) -> dict[str, str]:
    """``init_from`` first, then pretrained files for the parts it left. Returns part -> source."""
    found: dict[str, str] = {}
    loaded: list[str] = []
    if config.init_from:
        path, loaded = _load_from_run(model, config)
        found["model"] = path
    elif config.skip_load:
        raise UserError("skip_load: leaves parts of --init-from out; give --init-from too")
    left = [part for part, prefix in PARTS.items() if not any(name.startswith(prefix) for name in loaded)]
    published = {
        "backbone": (config.model.backbone.depth, config.model.backbone.width, config.model.backbone.norm)
        == (50, 64, "frozen"),
        "text encoder": all(
            getattr(config.model.text, f) == getattr(TextConfig(), f)
            for f in ("width", "layers", "heads", "ffn_width", "vocab_size", "max_positions")
        ),
    }
    parts = [part for part in left if published[part]]
    for part in left:
        if part not in parts:  # of another size than the published files: there is nothing to look for
            if config.require_weights:
                raise UserError(f"require_weights: the {part} has not the published size; no pretrained weights fit")
            found[part] = "random"
    if parts:
        folder = config.weights or (config.data.root and str(Path(config.data.root) / "pretrained"))
        if folder is None or (config.weights and not Path(folder).is_dir()):
            raise UserError(f"--weights {folder}: no such folder" if folder else "give --data-root or --weights")
        found |= load_pretrained(model, folder, require=config.require_weights, parts=parts)
    return found


def _load_from_run(model: UniT, config: RunConfig) -> tuple[str, list[str]]:
    """Load what fits of ``init_from``; its path and the names loaded."""
    path = Path(config.init_from)
    for prefix in config.skip_load:
        if not any(name.startswith(prefix) for name in model.state_dict()):
            raise UserError(
                f"skip_load {prefix!r}: no tensor of the model begins so; "
                f"{nearest(prefix, {n.split('.')[0] for n in model.state_dict()})}"
            )
    if path.is_dir():
        path = checkpoint.find(path) / checkpoint.WEIGHTS
    elif not path.is_file():
        raise UserError(f"--init-from {path}: no such run, checkpoint or weights file")
    checkpoint.verify_weights(path)
    report = load_matching(model, checkpoint.load_weights(path), skip=config.skip_load, source=str(path))
    _log.info("initial weights: %s", report)
    return str(path), report.loaded


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
    names = {id(p): name for name, p in model.named_parameters()}
    members = [p for group in optimizer.param_groups for p in group["params"]]
    masks = {}
    for task in tasks:
        used = model.used_parameters(task)
        if optimizer.unused == "graph" and not get_task(task).has_image:
            used = {n: u and not n.startswith("bert_pos_projection.") for n, u in used.items()}
        masks[task] = torch.tensor([used[names[id(p)]] for p in members], dtype=torch.uint8, device=members[0].device)
    return masks


def optimizer_state(model: nn.Module, optimizer: MaskedAdamW) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> its moments and step count."""
    names = {id(p): name for name, p in model.named_parameters()}
    members = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {members[i]: dict(state) for i, state in optimizer.state_dict()["state"].items()}


def load_optimizer_state(model: nn.Module, optimizer: MaskedAdamW, saved: dict[str, dict[str, Tensor]]) -> None:
    """The reverse; ``UserError`` on a parameter that the optimiser does not have."""
    names = {id(p): name for name, p in model.named_parameters()}
    members = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if extra := sorted(set(saved) - set(members)):
        raise UserError(f"checkpoint: optimiser state for {extra[0]}, which this run does not train")
    fresh = optimizer.state_dict()
    index = {name: i for i, name in enumerate(members)}
    optimizer.load_state_dict({**fresh, "state": {index[name]: state for name, state in saved.items()}})


class Ema:
    """Exponential moving average of all weights over the run's updates, float32 (``ema_decay``): after every update
    that was not refused, average <- decay average + (1 - decay) weights, whether or not the update moved a weight.

    ``MaskedAdamW(averages=...)`` keeps other averages, of each parameter over its own updates; no run uses them.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise UserError(f"ema_decay: {decay} is not between 0 and 1; 0 keeps no average")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        # On a card pieces of this size keep what is between them small, and are still few launches.
        self.pieces = _pieces(pairs, PIECE if pairs[0][0].device.type == "cuda" else math.inf)

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """After an update; ``refused`` is its ``Update.nonfinite``, 0-d: not zero leaves every average as it is.

        Nothing is read back from the device. Buffers are constants in this model.
        """
        for averages, weights in self.pieces:
            # A weight of 0 gives back the average to the bit; as a tensor it has the bits of the number.
            weight = torch.where(refused == 0, 1 - self.decay, 0.0).to(averages[0].dtype)
            if weight.is_cuda and self.decay > 0.5:
                lerp_in_few_launches(averages, weights, weight)
            else:
                torch._foreach_lerp_(averages, weights, [weight] * len(averages))


PIECE = 1 << 24
"""Numbers that are averaged at a time on a card."""


def lerp_in_few_launches(averages: Sequence[Tensor], weights: Sequence[Tensor], weight: Tensor) -> None:
    """average <- average + weight (weight's - average), ``weight`` a 0-d tensor below 0.5, with which
    ``torch._foreach_lerp_`` would take a launch for each tensor."""
    moves = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(moves, weight)
    torch._foreach_add_(averages, moves)


def _pieces(pairs: list[tuple[Tensor, Tensor]], most: float) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs in groups of at most ``most`` numbers (or a single pair), each as two lists."""
    found, size = [([], [])], 0
    for average, weight in pairs:
        if found[-1][0] and size + average.numel() > most:
            found.append(([], []))
            size = 0
        found[-1][0].append(average)
        found[-1][1].append(weight)
        size += average.numel()
    return found
