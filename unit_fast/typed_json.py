"""Plain values, as JSON has them, to a tree of dataclasses; what does not fit is named."""

import dataclasses
import types
import typing
from typing import Literal

from unit_fast.errors import UserError, nearest


def from_dict(cls, values: dict, where: str = ""):
    """Dataclass ``cls`` from ``values``; ``UserError`` on unknown keys (nearest names) and wrong types."""
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with keys, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, hints)}")
    try:
        return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()})
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _value(hint, value, where):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with keys, found {value!r}")
        return {str(k): _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        return tuple(_value(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value)))
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
