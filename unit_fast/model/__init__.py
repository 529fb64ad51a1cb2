"""The model: ``unit.py`` joins the parts in the paper's order; each part has a file of its own."""

from unit_fast.model.unit import UniT

__all__ = ["UniT"]
