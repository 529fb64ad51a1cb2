"""Reading files that others wrote: JSON, lines, arrays of records, and file names inside a root.

Everything raises ``UserError`` naming the file; nothing here runs code from a file.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from unit_fast.errors import UserError, printable

JSON_LIMIT = 2 * 2**30
"""Bytes of the largest JSON file that is read; Visual Genome's largest has 0.8 GB, COCO's 0.5 GB."""
LINE_LIMIT = 4 * 2**20
"""Characters of the longest line of a text table."""
TABLE_LIMIT = 4 * 2**30
"""Bytes of the largest text table; the largest of GLUE has 0.08 GB."""

# The float parser of json turns 1e999 into infinity without a word. Only a number with such an exponent, or with
# hundreds of digits, can do that: look for one first, since a Python call per number would double the reading time.
_MAY_OVERFLOW = re.compile(rb"[0-9.][eE]\+?[0-9]{3}|[0-9]{200}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def describe(error: BaseException) -> str:
    """One line about an exception of a library."""
    text = printable(str(error)) or "no details"
    return f"{type(error).__name__}: {text}"


def open_file(path: str | Path, limit: int | None = None):
    """Binary file object of a regular file. ``UserError`` when it is absent, not a file, or larger than ``limit``."""
    try:
        # without O_NONBLOCK opening a FIFO that nobody writes to would wait for ever
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
        found = os.fstat(file.fileno())
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path, 400)}: cannot be read ({describe(error)})") from None
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise UserError(f"{printable(path, 400)}: not a plain file; give one")
    size = found.st_size
    if limit is not None and size > limit:
        file.close()
        raise UserError(
            f"{printable(path, 400)}: {size:,} bytes, more than the limit of {limit:,}; split the file or give a "
            f"smaller one"
        )
    return file


def sync_folder(folder: Path) -> None:
    """Make names that were created or renamed in ``folder`` outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: str | Path, limit: int = JSON_LIMIT, drop: tuple[str, ...] = ()):
    """The value in a JSON file.

    Args:
        path: the file; UTF-8, with or without a byte order mark.
        limit: largest size, bytes.
        drop: keys whose values are thrown away while reading, at any depth, to save memory (e.g. ``segmentation``).

    Raises:
        UserError: naming the file: too large, not JSON, NaN or an infinite number, a key twice in one object, nested
            too deeply, or text that is not Unicode (a lone surrogate).
    """
    with open_file(path, limit) as file:
        data = file.read()
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    return parse_json(data, printable(path, 400), drop)


def parse_json(data: bytes, where: str, drop: tuple[str, ...] = ()):
    """The value in JSON text; see ``read_json``. ``where`` begins the error messages."""

    def refuse(what):
        raise UserError(f"{where}: {what}")

    def pairs(items):
        made = dict(items)
        if len(made) != len(items):
            seen = set()
            key = next(k for k, _ in items if k in seen or seen.add(k))
            refuse(f"key {printable(key)!r} stands twice in one object; remove one")
        for key in drop:
            made.pop(key, None)
        return made

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            refuse(f"the number {printable(text, 40)} is not finite")
        return value

    def constant(name):
        refuse(f"{name} is not a JSON number; write a finite one")

    options = {"parse_float": number} if _MAY_OVERFLOW.search(data) else {}
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, **options)
        if _SURROGATE.search(data):
            _refuse_surrogates(value, refuse)
    except UserError:
        raise
    except RecursionError:
        refuse("objects or lists are nested too deeply")
    except (ValueError, MemoryError) as error:
        refuse(f"not valid JSON ({describe(error)})")
    return value


def _refuse_surrogates(value, refuse):
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                refuse(f"the text {ascii(item[:40])} is not valid Unicode (a lone surrogate)")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    r"""(1-based number, text without line end) of each line. Only ``\n`` and ``\r\n`` end a line: sentences may hold
    other Unicode line separators."""
    with open_file(path, TABLE_LIMIT) as file:
        number = 0
        while raw := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(raw) > LINE_LIMIT:
                raise UserError(f"{printable(path, 400)}:{number}: line longer than {LINE_LIMIT:,} bytes")
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{printable(path, 400)}:{number}: not UTF-8 ({describe(error)})") from None
            line = line.removesuffix("\n").removesuffix("\r")
            yield number, line


def safe_path(root: str | Path, name: str, within: str | Path | None = None) -> Path:
    """``root / name`` for a file name that came from data.

    The result, links followed, lies inside ``root`` or inside ``within`` (both with their own links followed).

    Raises:
        UserError: the name is empty, absolute, holds ``..`` or a NUL, or a link leads out.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"file name {printable(ascii(name))} is empty or holds a NUL character")
    plain = Path(name)
    if len(name) > 4000 or any(len(part.encode("utf-8", "replace")) > 255 for part in plain.parts):
        raise UserError(f"file name {printable(name)!r} is longer than a file system allows")
    if plain.is_absolute() or ".." in plain.parts or name.startswith(("\\", "~")):
        raise UserError(f"file name {printable(name)!r} leaves its folder {printable(root, 400)}; use relative names")
    try:
        base = os.path.realpath(root)
        path = os.path.realpath(os.path.join(base, name))  # strings: this is done for every image read
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # links in a circle are an error of their own
        inside = _is_in(path, base) or (within is not None and _is_in(path, os.path.realpath(within)))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"file name {printable(name)!r} cannot be used ({describe(error)})") from None
    if not inside:
        raise UserError(
            f"{printable(os.path.join(base, name), 400)} is a link out of the data root; copy the file, or set the "
            f"folder's path to where the files are"
        )
    return Path(path)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def integer(record, key: str, where: str) -> int:
    """``record[key]`` as an int; ``UserError`` for a missing key, a bool, a float with a fraction, a string."""
    value = _field(record, key, where)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise UserError(f"{where}: {key} must be an integer, found {_shown(value)}")
    return value


def number(record, key: str, where: str) -> float:
    """``record[key]`` as a finite float."""
    value = _field(record, key, where)
    if type(value) is int and abs(value) < 2**1000:  # beyond a float's range there is nothing that is finite
        value = float(value)
    if type(value) is not float or not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, found {_shown(value)}")
    return value


def side(record, key: str, where: str) -> int:
    """``record[key]`` as a side of an image, pixels: an integer from 1 to 2^31 - 1."""
    value = integer(record, key, where)
    if not 1 <= value < 2**31:
        raise UserError(f"{where}: {key} is {value}; a side of an image must be from 1 to {2**31 - 1:,} pixels")
    return value


def string(record, key: str, where: str) -> str:
    """``record[key]`` as text."""
    value = _field(record, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, found {printable(repr(value), 60)}")
    return value


def sequence(record, key: str, where: str) -> list:
    """``record[key]`` as a list."""
    value = _field(record, key, where)
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} must be a list, found {type(value).__name__}")
    return value


def records(record, key: str, name: str) -> Iterator[tuple[str, object]]:
    """(where it stands, the entry) of each entry of the list ``record[key]`` of the file ``name``."""
    for n, entry in enumerate(sequence(record, key, name)):
        yield f"{name}: {key}[{n}]", entry


def _shown(value) -> str:
    """``value`` for a message; writing a number of thousands of digits would be an error of its own."""
    if type(value) is int and abs(value) >= 2**1000:
        return f"a number of {value.bit_length():,} bits"
    return printable(repr(value), 60)


def _field(record, key, where):
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with keys, found {type(record).__name__}")
    if key not in record:
        raise UserError(f"{where}: key {key!r} is missing; found {printable(', '.join(map(str, record)) or 'none')}")
    return record[key]
