"""unit_fast: train UniT (Hu & Singh 2021) and DETR-family models fast.

The few public names; each is imported when it is first used, so that importing the package is cheap.
"""

import importlib

from unit_fast import _moved

__version__ = "0.1.0"

# No name here may be a module's too.
_HOME = {
    "UniT": "unit_fast.model",
    "StepLosses": "unit_fast.model.step_losses",
    "Batch": "unit_fast.batch",
    "Output": "unit_fast.batch",
    "collate": "unit_fast.data.collate",
    "MaskedAdamW": "unit_fast.optim",
    "ModelConfig": "unit_fast.config",
    "RunConfig": "unit_fast.config",
    "recipe": "unit_fast.recipes",
    "load": "unit_fast.prediction.predictor",
    "kernels": "unit_fast.ops",
    "UserError": "unit_fast.errors",
}

__all__ = ["__version__", *_HOME]

_moved.install()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'unit_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted(__all__)
