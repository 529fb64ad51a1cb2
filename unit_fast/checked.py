"""Configuration classes that refuse a wrong value when they are made, with the field's dotted name.

The bounds of a field stand in its type: ``heads: PositiveInt = 8``.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from unit_fast.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """What a number may be, as metadata of ``typing.Annotated``. It is finite in any case."""

    wanted: str
    """The remedy of the error: what to give."""
    least: float = -math.inf
    most: float = math.inf
    least_allowed: bool = True
    """Whether ``least`` itself is allowed."""
    most_allowed: bool = True
    """Whether ``most`` itself is allowed."""

    def allow(self, value) -> bool:
        above = value >= self.least if self.least_allowed else value > self.least
        below = value <= self.most if self.most_allowed else value < self.most
        return above and below and (isinstance(value, int) or math.isfinite(value))


PositiveInt = Annotated[int, Bounds("at least 1", least=1)]
NonNegativeInt = Annotated[int, Bounds("at least 0", least=0)]
PositiveFloat = Annotated[float, Bounds("a positive number", least=0, least_allowed=False)]
NonNegativeFloat = Annotated[float, Bounds("at least 0", least=0)]
Probability = Annotated[float, Bounds("at least 0 and below 1", least=0, most=1, most_allowed=False)]
"""Of dropout or of keeping what was before: 1 would leave nothing."""
Share = Annotated[float, Bounds("at least 0 and at most 1", least=0, most=1)]


class Checked:
    """Base of the configuration's dataclasses. ``UserError`` names the field; lists become tuples, paths text."""

    place: ClassVar[str] = ""
    """Where in ``RunConfig`` the class stands: the beginning of its fields' dotted names."""

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            accepted = _accepted(hint, value, self.dotted(name))
            if accepted is not value:
                object.__setattr__(self, name, accepted)  # frozen
        self.check_together()

    def __repr__(self) -> str:
        """What differs from the defaults."""
        changed = []
        for field in dataclasses.fields(self):
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            if (value := getattr(self, field.name)) != default:
                changed.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    def check_together(self) -> None:
        """Refuse fields that do not go together."""

    def dotted(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def refuse(self, name: str, wanted: str):
        """Raise ``UserError`` for the field ``name``: what it is, what it should be."""
        raise UserError(f"{self.dotted(name)}: is {getattr(self, name)!r}; give {wanted}")


@functools.cache
def _hints(cls) -> dict:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _accepted(hint, value, where: str):
    """``value`` as the type ``hint`` has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _accepted(arguments[0], value, where)
        for bounds in arguments[1:]:
            if isinstance(bounds, Bounds) and not bounds.allow(value):
                raise UserError(f"{where}: is {value}; give {bounds.wanted}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _accepted(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with keys, found {value!r}")
        found = {key: _accepted(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
        return value if all(found[key] is value[key] for key in value) else found
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        found = tuple(_accepted(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value)))
        return found if isinstance(value, list) or any(a is not b for a, b in zip(found, value)) else value
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
