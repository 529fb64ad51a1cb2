"""Modules by the names they had before they were sorted into folders: other people's scripts import them so.

An old name gives a module that looks everything up in the new ones, and a ``PendingDeprecationWarning``, which Python
keeps to itself unless it is asked (``-W default``), that says where it is.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings

MOVED = {
    "unit_fast.checkpoint": ("unit_fast.weights.checkpoint", "unit_fast.config_check"),
    "unit_fast.cli": ("unit_fast.commands.main",),
    "unit_fast.convert": ("unit_fast.weights.convert", "unit_fast.weights.loading", "unit_fast.weights.pretrained"),
    "unit_fast.env": ("unit_fast.run.environment",),
    "unit_fast.evaluate": (
        "unit_fast.evaluation.evaluate", "unit_fast.evaluation.task_run", "unit_fast.evaluation.precision"
    ),
    "unit_fast.labels": ("unit_fast.evaluation.labels",),
    "unit_fast.metrics": ("unit_fast.evaluation.metrics",),
    "unit_fast.predict": ("unit_fast.prediction.predictor",),
    "unit_fast.setup_model": (
        "unit_fast.run.setup", "unit_fast.config_check", "unit_fast.run.ema", "unit_fast.run.initial_weights"
    ),
    "unit_fast.train": ("unit_fast.run.train",),
    "unit_fast.data.synthetic": ("unit_fast.data.generated.world",),
}  # fmt: skip
"""Old name -> the modules that now have what it had, the first with most of it."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        new, *more = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now", PendingDeprecationWarning, stacklevel=2)
        home = importlib.import_module(new)

        def find(name: str):
            others = (found for found in map(importlib.import_module, more) if hasattr(found, name))
            return getattr(home, name) if hasattr(home, name) else getattr(next(others, home), name)

        module.__getattr__ = find
        module.__doc__ = home.__doc__


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
