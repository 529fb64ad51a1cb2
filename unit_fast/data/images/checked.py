"""Which images can be decoded, found out once by decoding them with Pillow and remembered.

DALI drops its whole pipeline when one image of a batch cannot be decoded. So an image is shown to it only after Pillow
has decoded it; what came of that is kept in memory and, by path, size and time of change, in an SQLite file of the
cache folder, for later runs and other processes.
"""

import contextlib
import dataclasses
import logging
import sqlite3
import threading
from pathlib import Path

from unit_fast.data.errors import BadImage
from unit_fast.data.images.decode import Stamp, is_turned, load_image, probe, stamp
from unit_fast.data.store.files import describe
from unit_fast.errors import printable

FILE = "images.sqlite"
_WRITE_EVERY = 256
"""Images found out between two writes."""
_TABLE = """create table if not exists images (
    path text primary key, bytes integer, time_ns integer, height integer, width integer, plain integer, reason text,
    turned integer
)"""
_COLUMNS = "bytes, time_ns, height, width, plain, reason, turned"

_log = logging.getLogger("unit_fast.data")


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image."""

    stamp: Stamp
    height: int = 0
    width: int = 0
    plain: bool = False
    """A JPEG of the kind that every decoder reads alike; others Pillow decodes at every visit."""
    reason: str = ""
    """Why it cannot be used; empty where it can."""
    turned: bool = False
    """Viewers turn it, as its EXIF orientation says."""


class CheckedImages:
    """Decodes each image once before its first use. Thread-safe.

    Args:
        folder: where ``images.sqlite`` is kept; None keeps nothing beyond this process.
        max_pixels: images with more are refused from their header.
    """

    def __init__(self, folder: Path | None, max_pixels: int):
        self.max_pixels = max_pixels
        self.decoded = 0
        """Images decoded to find out about them."""
        self._known: dict[str, Facts] = {}
        self._new: dict[str, Facts] = {}
        self._lock = threading.Lock()
        self._store = self._open(folder) if folder is not None else None

    def facts(self, path) -> Facts:
        """What is known of the image at ``path``, after decoding it if need be.

        Raises:
            BadImage: it is absent, not a JPEG or PNG, larger than ``max_pixels``, or damaged.
        """
        now = stamp(path)
        name = str(path)
        known = self._known.get(name)
        if known is None or known.stamp != now:
            known = self._stored(name, now)
            if known is None:
                known = self._decode(path, now)
                self._remember(name, known)
            else:
                self._known[name] = known
        if not known.reason and known.height * known.width > self.max_pixels:  # the limit may have changed since
            probe(path, self.max_pixels)
        if known.reason:
            raise BadImage(path, known.reason)
        return known

    def refuse(self, path) -> None:
        """From now on Pillow decodes this image: another decoder could not."""
        known = self.facts(path)
        self._remember(str(path), dataclasses.replace(known, plain=False))

    def forget(self, path) -> None:
        """Decode the image again at its next visit: it is not what it was."""
        with self._lock:
            self._known.pop(str(path), None)
            self._new.pop(str(path), None)
            self._run("delete from images where path = ?", (str(path),))

    def _decode(self, path, now: Stamp) -> Facts:
        self.decoded += 1
        try:
            height, width, plain = probe(path, self.max_pixels)
            turned = is_turned(load_image(path, self.max_pixels))
        except BadImage as error:
            if "data.max_pixels" in error.reason:  # not damage: another limit would take it
                raise
            return Facts(now, reason=error.reason)
        return Facts(now, height, width, plain, turned=turned)

    def _remember(self, name: str, facts: Facts) -> None:
        with self._lock:
            self._known[name] = self._new[name] = facts
            if len(self._new) >= _WRITE_EVERY:
                self._write()

    def _open(self, folder: Path):
        store = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store = sqlite3.connect(folder / FILE, timeout=10, check_same_thread=False, isolation_level=None)
            store.execute("pragma journal_mode = wal")
            store.execute("pragma synchronous = normal")
            store.execute(_TABLE)
            with contextlib.suppress(sqlite3.OperationalError):  # of a file made before orientations were looked at
                store.execute("alter table images add column turned integer")
            store.execute(f"select path, {_COLUMNS} from images limit 1").fetchall()
            return store
        except (sqlite3.Error, OSError) as error:
            if store is not None:
                store.close()
            _log.warning(
                "%s: not usable (%s): images are checked anew in every run; delete the file or set data.cache_dir",
                printable(folder / FILE, 400), describe(error),
            )  # fmt: skip
            return None

    def _run(self, command: str, values: tuple = ()) -> list:
        """Rows of a command; a store that fails is left alone from then on."""
        if self._store is None:
            return []
        try:
            return self._store.execute(command, values).fetchall()
        except sqlite3.Error as error:
            _log.warning("%s: %s; what is found out about images is not kept any more", FILE, describe(error))
            with contextlib.suppress(sqlite3.Error):
                self._store.close()
            self._store = None
            return []

    def _stored(self, name: str, now: Stamp) -> Facts | None:
        with self._lock:
            rows = self._run(f"select {_COLUMNS} from images where path = ?", (name,))
        for size, time_ns, height, width, plain, reason, turned in rows:
            if (size, time_ns) == (now.bytes, now.time_ns):
                return Facts(now, height, width, bool(plain), reason, bool(turned))
        return None

    def _write(self) -> None:
        rows, self._new = self._new, {}
        self._run("begin immediate")
        for name, f in rows.items():
            values = (name, *f.stamp, f.height, f.width, int(f.plain), f.reason, int(f.turned))
            self._run(f"insert or replace into images (path, {_COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?)", values)
        self._run("commit")

    def close(self) -> None:
        """Write what was found out and close the file; what is found out afterwards is kept in memory alone."""
        with self._lock:
            if self._new:
                self._write()
            if self._store is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._store.close()
                self._store = None
