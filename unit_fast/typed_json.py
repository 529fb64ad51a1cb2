"""Plain values, as JSON, YAML and TOML have them, to a tree of dataclasses; what does not fit is named."""

import dataclasses
import typing

from unit_fast.errors import UserError, nearest


def from_dict(cls, values: dict, source: str = "", base=None):
    """Dataclass ``cls`` from ``values``; what they leave out is as in ``base``, an instance, or the default.

    A field that is itself a dataclass is changed key by key; a table (``dict``) or list is replaced.

    Raises:
        UserError: an unknown key, with the nearest names, or a wrong value; begins with ``source``, e.g. the file.
    """
    return _made(cls, values, source or cls.__name__, "", base)


def _made(cls, values, source: str, place: str, base):
    where = f"{source}: {place}" if place else source
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with keys, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, hints)}")
    found = {}
    for key, value in values.items():
        hint, inner = hints[key], f"{place}.{key}" if place else key
        _, entry = typing.get_args(hint) if typing.get_origin(hint) is dict else (None, None)
        if dataclasses.is_dataclass(hint):
            value = _made(hint, value, source, inner, getattr(base, key, None))
        elif dataclasses.is_dataclass(entry) and isinstance(value, dict):
            value = {name: _made(entry, item, source, f"{inner}.{name}", None) for name, item in value.items()}
        found[key] = value
    try:
        return cls(**found) if base is None else dataclasses.replace(base, **found)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except TypeError as error:  # a field without a default that is not there
        raise UserError(f"{where}: {error}") from error
