"""An image in a shard, which stands where a ``Path`` stands for a loose file.

Reading one opens the tar, reads at the member's place and closes it, as for a loose file: no position is shared between
threads or forked processes, nothing is held open, and the member's tar header is compared with the index.
"""

import os
import tarfile
from dataclasses import dataclass

from unit_fast.data.errors import BadImage
from unit_fast.data.images.decode import Stamp
from unit_fast.errors import printable

INDEX = "index.json"
BLOCK = tarfile.BLOCKSIZE
NOT_IN_SHARDS = "not in the shards"


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard. Self-contained and small, so that it can be sent to another process."""

    shard: str
    """Path of the tar file."""
    name: str
    offset: int
    """Where the image begins in the tar file, bytes."""
    size: int
    """Bytes of the image."""
    shard_bytes: int
    """Bytes the tar file must have."""

    def __str__(self) -> str:
        return f"{self.shard}::{self.name}"

    def exists(self) -> bool:
        return True

    def stamp(self) -> Stamp:
        """Bytes of the image, and time of the tar file. ``BadImage`` when that is not the one of the index."""
        try:
            found = os.stat(self.shard)
        except FileNotFoundError:
            raise BadImage(self, "its shard does not exist any more") from None
        self._check(found)
        return Stamp(self.size, found.st_mtime_ns)

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            BadImage: the tar file is gone, or not the one of the index: of another size, or with something else at the
                member's place.
            OSError: the disk's.
        """
        try:
            file = open(self.shard, "rb", buffering=0)  # noqa: SIM115 - closed below
        except FileNotFoundError:
            raise BadImage(self, "its shard does not exist any more") from None
        with file:
            self._check(os.fstat(file.fileno()))
            header = _read_at(file.fileno(), BLOCK, self.offset - BLOCK)
            content = _read_at(file.fileno(), self.size, self.offset)
        if len(content) != self.size:  # cut off since its size was asked
            raise BadImage(self, f"its shard ends after {len(content)} of {self.size} bytes")
        try:
            header = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise BadImage(self, f"its shard has no member at this place ({INDEX} is of another one)") from None
        if (header.name, header.size) != (self.name, self.size):
            raise BadImage(self, f"its shard has {printable(header.name)} at this place ({INDEX} is of another one)")
        return content

    def _check(self, found: os.stat_result) -> None:
        if found.st_size != self.shard_bytes:
            raise BadImage(self, f"its shard has {found.st_size:,} bytes, {INDEX} says {self.shard_bytes:,}")


@dataclass(frozen=True, slots=True)
class NoMember:
    """A name that no shard holds: as the path of a file that does not exist."""

    folder: str
    name: str

    def __str__(self) -> str:
        return f"{self.folder}::{self.name}"

    def exists(self) -> bool:
        return False

    def stamp(self) -> Stamp:
        raise BadImage(self, NOT_IN_SHARDS)

    def read(self) -> bytes:
        raise BadImage(self, NOT_IN_SHARDS)


def _read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Up to ``count`` bytes from ``offset``; fewer only at the end of the file."""
    parts = []
    while count > 0:
        part = os.pread(descriptor, count, offset)
        if not part:
            break
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
