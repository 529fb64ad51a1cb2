"""Arrays kept on disk and opened as memory-mapped ones the next time.

An entry is a folder: ``meta.json`` and one ``.npy`` file an array. It is found by its key: what the content depends on,
and a hash of the reading code. An entry of another key is never used. Whether it is intact is known from the sizes and
checksums in ``meta.json``, itself under a checksum; an entry that is not is deleted and made again. Pickles are never
read.

Entries are written to a temporary folder and renamed: of two processes one wins, none sees a half. A new entry removes
older ones of the same files, except those that a living process has open (a lock on ``meta.json``).
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pkgutil
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unit_fast.config import DataConfig
from unit_fast.data.store.content import Content, hash_of
from unit_fast.data.store.files import sync_folder
from unit_fast.errors import UserError, printable

FORMAT = 1
"""Version of the entries' form; raise it when they are written otherwise."""
META = "meta.json"
_TEMPORARY = ".tmp-"
_ABANDONED_S = 24 * 3600
"""Age after which a temporary folder is the rest of a process that died."""
_MODULES = (
    "errors", "readers/by_hash", "readers/categories", "readers/coco", "readers/coco_folder", "readers/detection",
    "readers/glue", "readers/objects", "readers/own", "readers/own_columns", "readers/own_rows", "readers/snli_ve",
    "readers/sources", "readers/tables", "readers/visual_genome", "readers/vqa2", "store/cache", "store/content",
    "store/files", "store/pickles", "text/tokens", "text/wordpieces",
)  # fmt: skip
_NOT_AS_WRITTEN = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MAPPED = 64 * 2**10
"""Smaller arrays are read, not mapped: a mapping costs an open file."""

_log = logging.getLogger("unit_fast.data")
_told: set[str] = set()


class Damaged(Exception):
    """An entry is not what was written; the text says why."""


class Unreadable(Exception):
    """An entry cannot be read now (rights, open files, memory), which says nothing about it."""


class Cache:
    """A folder of entries. ``folder`` None: nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def open(self, name: str, key: dict, build: Callable[[], Content], still: Callable[[], bool]) -> Content:
        """The entry ``name`` with ``key``, made by ``build`` where there is none.

        Args:
            name: what it is made of, the same for all versions: older versions are removed when one is written.
            key: JSON values that say everything the content depends on.
            build: makes the content; its errors are passed on, and nothing is written then.
            still: whether ``key`` holds still after ``build``; otherwise nothing is written.
        """
        if self.folder is None:
            return build()
        key = {"format": FORMAT, "code": code_hash(), **key}
        entry = self.folder / f"{name}-{hash_of(key)[:16]}"
        try:
            found = self._find(entry, key)
        except Unreadable as error:
            self._tell(f"cache {printable(entry, 400)} cannot be read ({printable(str(error))}): going on without it")
            return build()
        if found is not None:
            return found
        content = build()
        if not still() or not self._write(name, entry, key, content):
            return content
        try:
            return self._load(entry, key) or content
        except (Damaged, Unreadable) as error:
            self._tell(f"cache {printable(entry, 400)} cannot be read back ({printable(str(error))})")
            return content

    def _find(self, entry: Path, key: dict) -> Content | None:
        """The intact entry, or None. A damaged one is deleted, with one log line."""
        try:
            return self._load(entry, key)
        except Damaged:
            pass
        try:  # once more: another process may just have replaced it
            return self._load(entry, key)
        except Damaged as error:
            _log.warning("cache %s is damaged (%s): made again", printable(entry, 400), printable(str(error)))
            self._delete(entry)
            return None

    def _load(self, entry: Path, key: dict) -> Content | None:
        """The entry's content, arrays mapped read-only; None when there is no such entry."""
        try:
            held = open(entry / META, "rb")  # noqa: SIM115 - open as long as the content is used
        except OSError as error:
            if isinstance(error, _NOT_AS_WRITTEN) and not os.path.lexists(entry):
                return None
            kind = Damaged if isinstance(error, _NOT_AS_WRITTEN) else Unreadable
            raise kind(f"{META}: {error.strerror}") from None
        try:
            # where locks do not work, or the entry is being deleted: the mapped files stay readable all the same
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            meta = _checked_meta(held.read())
            if meta["key"] != key:
                raise Damaged(f"{META} is of another entry")
            arrays = {n: _load_array(entry / f"{n}.npy", stated) for n, stated in meta["arrays"].items()}
            return Content(arrays, meta["values"], entry.name, held)
        except BaseException as error:
            held.close()
            if isinstance(error, (*_NOT_AS_WRITTEN, ValueError, KeyError, TypeError, AttributeError)):
                raise Damaged(f"{type(error).__name__}: {error}") from None
            if isinstance(error, OSError):
                raise Unreadable(str(error)) from None
            raise

    def _write(self, name: str, entry: Path, key: dict, content: Content) -> bool:
        """Whether an entry is there afterwards; a disk that refuses is one log line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
            try:
                _write_files(temporary, key, content)
                try:
                    os.rename(temporary, entry)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    # another process was first: its entry says the same
                sync_folder(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            self._tell(
                f"no cache in {printable(self.folder, 400)} ({printable(str(error.strerror or error))}): files are "
                f"read anew at each start; give a writable data.cache_dir"
            )
            return False
        self._sweep(name, entry)
        return True

    def _sweep(self, name: str, entry: Path) -> None:
        """Remove older entries of the same name that nobody has open, and what dead processes left."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                old = path.name.startswith(f"{name}-") and path != entry and not _in_use(path)
                with contextlib.suppress(OSError):
                    dead = path.name.startswith(_TEMPORARY) and time.time() - path.stat().st_mtime > _ABANDONED_S
                    if old or dead:
                        self._delete(path)

    def _delete(self, path: Path) -> None:
        """Remove an entry: out of sight at once, so that none is seen half deleted."""
        try:
            grave = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
            try:
                os.rename(path, grave / path.name)
            finally:
                shutil.rmtree(grave, ignore_errors=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._tell(f"cache {printable(path, 400)} cannot be removed ({printable(str(error.strerror or error))})")

    def _tell(self, line: str) -> None:
        """A warning, once a process."""
        if line not in _told:
            _told.add(line)
            _log.warning("%s", line)


def _write_files(folder: Path, key: dict, content: Content) -> None:
    umask = os.umask(0)
    os.umask(umask)
    arrays = {}
    for name, array in content.arrays.items():
        path = folder / f"{name}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # a rename that survives a power cut must not outlive the data
        arrays[name] = {
            "dtype": array.dtype.str, "shape": list(array.shape), "bytes": path.stat().st_size, "crc32": _crc32(path),
        }  # fmt: skip
    meta = {"key": key, "arrays": arrays, "values": content.values}
    with (folder / META).open("w", encoding="ascii") as file:
        json.dump({"sha256": hash_of(meta), "content": meta}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
    sync_folder(folder)


def _checked_meta(raw: bytes) -> dict:
    meta = json.loads(raw.decode("ascii"))
    if hash_of(meta["content"]) != meta["sha256"]:
        raise Damaged(f"{META} does not have its checksum")
    return meta["content"]


def _load_array(path: Path, stated: dict) -> np.ndarray:
    if (size := path.stat().st_size) != stated["bytes"]:
        raise Damaged(f"{path.name} has {size:,} bytes instead of {stated['bytes']:,}")
    if _crc32(path) != stated["crc32"]:
        raise Damaged(f"{path.name} does not have its checksum")
    array = np.load(path, mmap_mode="r" if size > _MAPPED else None, allow_pickle=False)
    if array.dtype.str != stated["dtype"] or list(array.shape) != stated["shape"]:
        raise Damaged(f"{path.name} is {array.dtype} {array.shape} instead of {stated['dtype']} {stated['shape']}")
    # a plain array over the mapping: numpy's own class for it makes every slice many times slower
    return np.asarray(array).view(np.ndarray)


def _crc32(path: Path) -> int:
    """Checksum of a file, read beside the mapping so that its pages do not count as this process's."""
    value, buffer = 0, memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def _in_use(entry: Path) -> bool:
    try:
        with open(entry / META, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # or another user's
        return True
    except OSError:  # no locks here, or no such file: nothing says that it is used
        return False
    return False


@functools.cache
def code_hash() -> str:
    """Hash of the modules that read files: with other code an entry is another one."""
    total = hashlib.sha256()
    for name in _MODULES:
        total.update(pkgutil.get_data("unit_fast.data", f"{name}.py"))
    return total.hexdigest()


def open_cache(data: DataConfig) -> Cache:
    """The cache of ``data.cache_dir``.

    Raises:
        UserError: the folder given lies in the data root, which is never written to.
    """
    if data.cache_dir == "":
        return Cache(None)
    try:
        if data.cache_dir is not None:
            folder = Path(data.cache_dir).expanduser().absolute()
        else:
            home = os.environ.get("XDG_CACHE_HOME", "")
            folder = (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "unit_fast"
    except RuntimeError as error:  # no home folder
        Cache(None)._tell(f"no cache ({printable(str(error))}): files are read anew at each start; give data.cache_dir")
        return Cache(None)
    if data.root is not None:
        root = os.path.realpath(os.path.expanduser(data.root))
        if os.path.commonpath([root, os.path.realpath(folder)]) == root:
            line = f"{printable(folder, 400)} lies in the data root {printable(root, 400)}, which is never written to"
            if data.cache_dir is not None:
                raise UserError(f"data.cache_dir: {line}; give a folder outside")
            Cache(None)._tell(f"no cache: {line}; give data.cache_dir")
            return Cache(None)
    return Cache(folder)
