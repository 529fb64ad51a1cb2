"""Named places where a test can make something go wrong. They do nothing unless armed."""

from collections.abc import Callable

_armed: dict[str, Callable[[], None]] = {}


def arm(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` whenever ``point(name)`` is passed."""
    _armed[name] = action


def disarm() -> None:
    _armed.clear()


def point(name: str) -> None:
    """A place called ``name``, e.g. ``save.before_rename``."""
    if _armed and name in _armed:
        _armed[name]()
