"""Tensors in a short ``repr``."""

from torch import Tensor


def shapes_of(fields: dict) -> str:
    """Shapes, dtypes and the device of those that are tensors."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    parts = [f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in tensors.items()]
    places = sorted({str(x.device) for x in tensors.values()})
    return ", ".join(parts) + (f" on {', '.join(places)}" if places else "")
