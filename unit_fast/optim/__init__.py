"""The optimiser: ``masked_adamw.py`` has its rule and UniT's update of the used parameters only."""

from unit_fast.optim.masked_adamw import MaskedAdamW, make_optimizer

__all__ = ["MaskedAdamW", "make_optimizer"]
