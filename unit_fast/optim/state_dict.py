"""The state of an AdamW as it is saved: whether it fits, and by the names of a model's parameters."""

import torch
from torch import Tensor, nn

from unit_fast.errors import UserError


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
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if name not in state:
                raise UserError(f"optimiser state: parameter {i} has no {name!r}; it is not the state of an AdamW")
            if name != "step" and tuple(state[name].shape) != shapes[i]:
                raise UserError(
                    f"optimiser state: {name} of parameter {i} is {list(state[name].shape)}, the parameter "
                    f"{list(shapes[i])}; build the optimiser for the model it was saved with"
                )


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
