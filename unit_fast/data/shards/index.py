"""Images in tar files (shards) instead of loose files, read in any order.

A shard folder is written by ``unit-fast data shard`` (``write.py``). It holds ``<name>-000000.tar`` and so on in
WebDataset's form, and ``index.json``: WebDataset's shard index ("wids"), in which each shard has in addition its size,
its time and ``members``, a list of [name, offset of the bytes, number of bytes]. Shards may lie in other folders too,
given by an absolute path or a ``file:`` URL; those folders hold a ``unit_fast_shards.json`` of the same set. Only local
files are read.
"""

import functools
import os
import re
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unit_fast.data.shards.member import BLOCK, INDEX, Member, NoMember
from unit_fast.data.store import files
from unit_fast.errors import UserError, printable

MARK = "unit_fast_shards.json"
"""In every folder with shards: the set they belong to."""
KIND = "wids-shard-index-v1"
OURS = "unit_fast"
"""Key of ``index.json`` under which is what WebDataset does not know; it comes first in the file."""
VERSION = 1
AGAIN = "copy it anew, or write the shards again with `unit-fast data shard`"

_HEAD = 4096
"""Bytes of ``index.json`` in which ``OURS`` or ``KIND`` must stand."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file as the index describes it."""

    path: str
    bytes: int
    members: int


class Shards:
    """The images of a shard folder. Memory: 24 bytes and the longest name an image, shared by forked processes.

    Args:
        path: the folder.

    Raises:
        UserError: ``index.json`` is damaged, names a shard elsewhere, has an unsafe name or a name twice.
    """

    def __init__(self, path: Path):
        self.path, self.index = path, path / INDEX
        where = printable(self.index, 400)
        content = files.read_json(self.index)
        ours = content.get(OURS) if isinstance(content, dict) else None
        if not isinstance(ours, dict) or ours.get("version") != VERSION:
            raise UserError(
                f"{where}: not an index of this version of `unit-fast data shard`; write the shards again with it"
            )
        self.set = files.string(ours, "set", f"{where}: {OURS}")
        shards, names, rows = [], [], []
        for n, record in enumerate(files.sequence(content, "shardlist", where)):
            there = f"{where}: shardlist[{n}]"
            size = files.integer(record, "filesize", there)
            shard = self._file(files.string(record, "url", there), there)
            members = files.sequence(record, "members", there)
            for m, member in enumerate(members):
                names.append(_checked(member, size, f"{there}.members[{m}]"))
                rows.append((n, member[1], member[2]))
            shards.append(Shard(shard, size, len(members)))
        encoded = [name.encode() for name in names]
        order = sorted(range(len(names)), key=encoded.__getitem__)
        for a, b in zip(order, order[1:]):
            if encoded[a] == encoded[b]:
                raise UserError(f"{where}: {printable(names[a])!r} stands twice; write the shards again")
        self.shards = tuple(shards)
        self._names = np.array([encoded[i] for i in order], dtype=np.bytes_)
        self._rows = np.array([rows[i] for i in order], dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Member]:
        """All images, by name."""
        return (self._member(i, name.decode()) for i, name in enumerate(self._names.tolist()))

    def find(self, name: str) -> Member | None:
        """The image of this name."""
        try:
            key = name.encode()
        except UnicodeEncodeError:
            return None
        if not 0 < len(key) <= self._names.itemsize or b"\0" in key:
            return None
        # in the array's own type: with a longer or shorter one numpy would convert the whole array first
        i = int(np.searchsorted(self._names, np.array(key, dtype=self._names.dtype)))
        return self._member(i, name) if i < len(self) and self._names[i] == key else None

    def get(self, name: str) -> Member | NoMember:
        """The image of a name that came from data.

        Raises:
            UserError: as for a loose file: the name is empty, absolute, or leaves the folder.
        """
        found = self.find(name) if isinstance(name, str) else None
        if found is None:
            usual = files.safe_path(self.path, name)
            usual = usual.relative_to(os.path.realpath(self.path)).as_posix()  # a//b is a/b
            found = self.find(usual) or NoMember(str(self.path), usual)
        return found

    def problems(self) -> list[str]:
        """What is wrong with the tar files as far as their presence and size tell, a message each."""
        found = []
        for shard in self.shards:
            where = printable(shard.path, 400)
            try:
                size = os.stat(shard.path).st_size
            except OSError as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else files.describe(error)
                found.append(f"{where}: {reason}, but {printable(self.index, 400)} names it; {AGAIN}")
                continue
            if size != shard.bytes:
                found.append(
                    f"{where}: {size:,} bytes, but {printable(self.index, 400)} says {shard.bytes:,}: cut off or "
                    f"replaced; {AGAIN}"
                )
        return found

    def damage(self) -> list[str]:
        """Shards whose members are not those of the index, a message each; all tar headers are read."""
        expected: dict[int, list] = {n: [] for n in range(len(self.shards))}
        for member, (n, *_) in zip(self, self._rows.tolist()):
            expected[n].append((member.name, member.offset, member.size))
        found = []
        for n, shard in enumerate(self.shards):
            try:
                if os.stat(shard.path).st_size != shard.bytes:
                    continue  # ``problems`` tells
                there = {(name, offset, size) for name, offset, size, _ in scan(shard.path)}
            except FileNotFoundError:
                continue
            except (OSError, UserError) as error:
                found.append(f"{printable(error, 600)}; {AGAIN}")
                continue
            missing, more = sorted(set(expected[n]) - there), sorted(there - set(expected[n]))
            if missing or more:
                odd = (missing or more)[0][0]
                found.append(
                    f"{printable(shard.path, 400)}: {len(missing)} members of {INDEX} are not at their place, "
                    f"{len(more)} others are there, e.g. {printable(odd)}; {AGAIN}"
                )
        return found

    def _member(self, row: int, name: str) -> Member:
        n, offset, size = self._rows[row].tolist()
        shard = self.shards[n]
        return Member(shard.path, name, offset, size, shard.bytes)

    def _file(self, url: str, where: str) -> str:
        """The path of a shard. It lies in the shard folder, or where a mark says that it belongs to the set."""
        scheme = _SCHEME.match(url)
        if scheme is not None:
            parts = urllib.parse.urlsplit(url)
            if scheme[1].lower() != "file" or parts.netloc not in ("", "localhost"):
                raise UserError(
                    f"{where}: url {printable(url)} is not a local file; remote stores are not read: copy the shards "
                    "to a disk"
                )
            url = urllib.request.url2pathname(parts.path)
        if not url or "\0" in url:
            raise UserError(f"{where}: url {printable(repr(url))} is no file name")
        base = os.path.realpath(self.path)
        path = os.path.realpath(os.path.join(base, url))
        folder = os.path.dirname(path)
        if os.path.exists(path) and folder != base and not folder.startswith(base.rstrip(os.sep) + os.sep):
            mark = read_mark(Path(folder))
            if mark is None or mark.get("set") != self.set:
                raise UserError(
                    f"{where}: url {printable(url)} leads out of the shard folder, to a folder without the {MARK} of "
                    "this set; shards elsewhere need that file beside them"
                )
        return path


def _checked(member, size: int, where: str) -> str:
    """The name of an entry [name, offset, bytes] of the index; ``UserError`` where it cannot be one."""
    if not isinstance(member, list) or [type(value) for value in member] != [str, int, int]:
        raise UserError(f"{where}: expected [name, offset, bytes], found {printable(repr(member), 80)}")
    name, offset, count = member
    parts = name.split("/")
    if "\0" in name or "" in parts or "." in parts or ".." in parts or name.startswith(("\\", "~")):
        raise UserError(f"{where}: member name {printable(name)!r} leaves its folder; names are relative, without ..")
    if offset < BLOCK or offset % BLOCK or count < 0 or offset + count > size:
        raise UserError(f"{where}: {count} bytes at {offset} cannot be in a tar file of {size} bytes")
    return name


def scan(path: str | Path) -> list[tuple[str, int, int, int]]:
    """(name, offset of the bytes, number of bytes, time in seconds) of each member of a tar file, in its order.

    Raises:
        UserError: not an uncompressed tar file, cut off, or with something else than plain files in it.
        OSError: it cannot be read.
    """
    where = printable(path, 400)
    found = []
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                if not member.isreg():
                    raise UserError(f"{where}: {printable(member.name)} is not a plain file")
                found.append((member.name, member.offset_data, member.size, int(member.mtime)))
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:  # ValueError: a size beyond any file
        raise UserError(f"{where}: not a whole tar file ({files.describe(error)})") from None
    return found


def read_mark(folder: Path) -> dict | None:
    """What ``MARK`` in a folder says; None without one. ``UserError`` when it is damaged."""
    path = folder / MARK
    if not path.is_file():
        return None
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise UserError(f"{printable(path, 400)}: not a mark of this version of `unit-fast data shard`")
    return content


def opened(folder: Path) -> Shards | None:
    """The shards of ``folder``; None where it is a folder of loose files.

    Raises:
        UserError: a shard folder that is not finished or whose index is damaged, or WebDataset shards without our
            index, whose members could be read in one order only.
    """
    index = folder / INDEX
    try:
        with open(index, "rb") as file:
            head = file.read(_HEAD)
            state = os.fstat(file.fileno())
    except OSError:
        if (folder / MARK).exists():
            raise UserError(
                f"{printable(folder, 400)}: shards without {INDEX}: they are not all written, or this is not the first "
                "of several folders; run the same `unit-fast data shard` again, or give the folder with the index"
            ) from None
        return None
    if f'"{OURS}"'.encode() in head or (folder / MARK).exists():
        return _loaded(str(folder), state.st_size, state.st_mtime_ns, state.st_ino)
    if KIND.encode() in head:
        raise UserError(
            f"{printable(index, 400)}: WebDataset shards of another writer, whose index has no places of members; "
            "unpack them and write them with `unit-fast data shard`"
        )
    return None


@functools.lru_cache(maxsize=16)
def _loaded(folder: str, *stamp: int) -> Shards:
    """Several data sets read the same images: one index in memory serves them all."""
    return Shards(Path(folder))
