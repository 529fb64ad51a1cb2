"""Command line arguments to dataclasses through tyro; a mistake is one line with the nearest names."""

import contextlib
import io
import os
import re
from collections.abc import Sequence

from unit_fast.commands.options import near
from unit_fast.errors import UserError

LISTS = ("--freeze", "--skip-load", "--allow-changed", "--track")
"""Options whose values may be separated by commas."""
PAIRS = ("--data.paths", "--data.columns", "--paths", "--columns")
"""Options whose values are ``key=value``, or keys and values in turn."""
REPEATED = ("--image",)
"""Options that may be given again; where the command's own argument stands first, also with several values."""
TO_FILE = {"--json": "--json-file"}
"""Options without a value, and what takes a file's name where one ending in ``.json`` follows."""


def parse(command, arguments: Sequence[str], *, prog: str, default=None):
    """An instance of the dataclass ``command`` from ``arguments``; ``UserError`` in one line on a mistake."""
    import tyro

    options = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        # A wide page keeps tyro's message in one piece.
        with _columns(2000), contextlib.redirect_stderr(said):
            return tyro.cli(command, args=split_lists(arguments), prog=prog, **options)
    except SystemExit:
        message = _one_line(said.getvalue())
    if unknown := re.match(r"unknown option (\S+)", message):
        message += near(unknown[1].partition("=")[0], command, default)
    raise UserError(f"{message}; `{prog} --help` lists the options")


@contextlib.contextmanager
def _columns(width: int):
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def split_lists(arguments: Sequence[str]) -> list[str]:
    """``--freeze image,text`` and ``--freeze=image,text`` as ``--freeze image text``, for the options in ``LISTS``; for
    those in ``PAIRS`` ``--paths key=value`` as ``--paths key value``; ``--image a b`` (a pattern that the shell has
    replaced) as ``--image a --image b``; ``--json FILE.json`` as ``--json-file FILE.json``."""
    found: list[str] = []
    inside, value_is_next = "", False
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in TO_FILE and (value or following).endswith(".json"):
            inside = ""
            found.append(TO_FILE[name] + equals + value)
            continue
        if name in REPEATED and not equals and not arguments[0].startswith("-"):
            inside, value_is_next = name, False
            if following.startswith("-") or not following:  # tyro says that its value is missing
                found.append(name)
            continue
        if name in (*LISTS, *PAIRS):
            found.append(name)
            inside, value_is_next = name, False
            argument = value
            if not equals:
                continue
        elif argument.startswith("-"):
            inside = ""
        if inside in REPEATED:
            found.extend((inside, argument))
        elif inside in LISTS:
            found.extend(filter(None, argument.split(",")))
        elif inside in PAIRS and not value_is_next:
            found.extend(argument.split("=", 1))
            value_is_next = "=" not in argument
        else:
            found.append(argument)
            value_is_next = False
    return found


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """The value of ``--option`` before the arguments are parsed: it decides what the others mean."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def given(arguments: Sequence[str], *options: str) -> bool:
    """Whether one of ``options`` is among the arguments."""
    return any(argument.partition("=")[0].replace("_", "-") in options for argument in arguments)


def _one_line(text: str) -> str:
    """What was wrong, of tyro's framed message; its suggestions stand below a rule."""
    lines = [line.strip("│╭╮╰╯|+ ").strip() for line in text.splitlines()]  # the frame is ASCII on some terminals
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]{3,}", line):
            sections.append([])
        elif line and not re.search(r"[─-]{3,}$", line):
            sections[-1].append(line)
    if "╭" not in text and len(sections) > 1:
        del sections[0]  # the title, which otherwise stands in the frame
    message = " ".join(sections[0]) if sections[0] else "the command line was not understood"
    message = re.sub(r"^Unrecognized options: ([^, ]+).*", r"unknown option \1", message)
    message = re.sub(r"^Error parsing config[\w.]*: ", "", message)  # the field's own words name it
    return message.rstrip(".")
