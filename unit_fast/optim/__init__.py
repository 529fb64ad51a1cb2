"""The optimiser: ``masked_adamw.py`` has its rule and UniT's update of the used parameters only."""

from torch import nn

from unit_fast.config import OptimConfig
from unit_fast.optim.masked_adamw import MaskedAdamW

__all__ = ["MaskedAdamW", "make_optimizer"]


def make_optimizer(model: nn.Module, config: OptimConfig) -> MaskedAdamW:
    """The optimiser of a run: ``model.parameter_groups(lr, lr_backbone)`` with the settings of ``config``.

    Groups without parameters (a frozen backbone) are left out.
    """
    groups = [group for group in model.parameter_groups(config.lr, config.lr_backbone) if len(group["params"])]
    return MaskedAdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        rule=config.rule,
        unused=config.unused,
        max_norm=config.max_norm,
        clip_gradients_in_place=False,  # nothing looks at the gradients afterwards
    )
