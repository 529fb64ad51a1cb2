"""The one error class for mistakes a user can fix, and the help it gives.

Raise ``UserError`` with one message: what was wrong, what was found, what to do. The command line prints it without a
stack trace and exits with code 2.
"""

import difflib


class UserError(ValueError):
    """Bad input: a file, key or argument. The message names it and the remedy."""


class OutOfMemory(UserError):
    """The device's memory, or the machine's, did not suffice."""

    status = "out_of_memory"
    """Key of ``run.folder.EXIT``."""
    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory or the machine's did not suffice."""
    if any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__):
        return True
    # torch has no class for what its CPU allocator raises
    texts = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in texts)


def nearest(name: str, known) -> str:
    """``"; nearest: a, b"`` for the error message about an unknown ``name``, or all of ``known`` if nothing is near."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def printable(text, limit: int = 200) -> str:
    """``text`` from data, safe for a terminal or a log line: control and bidi characters escaped, length capped."""
    text = str(text)
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
