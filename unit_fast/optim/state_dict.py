"""The state of an AdamW: moments, how they are saved and loaded, and by the names of a model's parameters."""

import torch
from torch import Tensor, nn

from unit_fast.errors import UserError
from unit_fast.ops import adamw_step

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments_of(state: dict, p: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The moments in the ``state`` of ``p``, zeros at first; ``count`` is its element of the step counts."""
    if not state:
        adamw_step.refuse(p.device, "the moments of a parameter would be made")
        state |= {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    elif state["exp_avg"].stride() != p.stride():  # the parameter was laid out anew: so must they be
        adamw_step.refuse(p.device, "the moments of a parameter would be laid out anew")
        for name in MOMENTS:
            state[name] = torch.empty_like(p).copy_(state[name])
    return state["exp_avg"], state["exp_avg_sq"]


def check_state_dict(state_dict: dict, shapes: list[tuple[int, ...]], groups: int) -> None:
    """``UserError`` unless this is what an AdamW without options saved for ``groups`` groups of parameters of these
    shapes."""
    saved = sum(len(group["params"]) for group in state_dict["param_groups"])
    if saved != len(shapes) or len(state_dict["param_groups"]) != groups:
        raise UserError(
            f"optimiser state: saved for {saved} parameters in {len(state_dict['param_groups'])} groups, but there "
            f"are {len(shapes)} in {groups}; build the optimiser for the model it was saved with"
        )
    for group in state_dict["param_groups"]:
        for name in ("amsgrad", "maximize"):
            if group.get(name):
                raise UserError(f"optimiser state: saved with {name}=True, which MaskedAdamW does not have")
    for i, state in state_dict["state"].items():
        for name in ("step", *MOMENTS):
            if name not in state:
                raise UserError(f"optimiser state: parameter {i} has no {name!r}; it is not the state of an AdamW")
            if name != "step" and tuple(state[name].shape) != shapes[i]:
                raise UserError(
                    f"optimiser state: {name} of parameter {i} is {list(state[name].shape)}, the parameter "
                    f"{list(shapes[i])}; build the optimiser for the model it was saved with"
                )


def as_torch_saves(state_dict: dict, step_counts: Tensor) -> dict:
    """``state_dict`` with ``step`` as ``torch.optim.AdamW`` writes it. Reads the device."""
    counts = step_counts.tolist()
    # The reference makes moments before it knows whether the parameter moves; torch lists those that have moved.
    moved = {i: state for i, state in state_dict["state"].items() if counts[i] > 0}
    return state_dict | {"state": {i: state | {"step": torch.tensor(float(counts[i]))} for i, state in moved.items()}}


def complete_groups(groups: list[dict], before: list[dict]) -> None:
    """Give loaded groups what torch's have not, and their rates as numbers, which in torch's may be tensors."""
    for group, old in zip(groups, before, strict=True):
        for name, value in old.items():
            group.setdefault(name, value)
        group["lr"] = float(group["lr"])


def copy_moments(states: dict[Tensor, dict], params: list[Tensor]) -> list[int]:
    """Replace loaded moments by copies: the saved tensors may be shared, read-only, or laid out in memory unlike the
    parameter. Returns the step count of each parameter."""
    counts = [0] * len(params)
    for i, p in enumerate(params):
        if p in states:
            state = states[p]
            counts[i] = int(state["step"])
            states[p] = {name: torch.empty_like(p).copy_(state[name]) for name in MOMENTS}
    return counts


def member_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in their order over all groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> its moments and step count."""
    members = member_names(model, optimizer)
    return {members[i]: dict(state) for i, state in optimizer.state_dict()["state"].items()}


def load_state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Tensor]]) -> None:
    """The reverse; ``UserError`` on a parameter that the optimiser does not have."""
    members = member_names(model, optimizer)
    if extra := sorted(set(saved) - set(members)):
        raise UserError(f"checkpoint: optimiser state for {extra[0]}, which this run does not train")
    fresh = optimizer.state_dict()
    index = {name: i for i, name in enumerate(members)}
    optimizer.load_state_dict({**fresh, "state": {index[name]: state for name, state in saved.items()}})
