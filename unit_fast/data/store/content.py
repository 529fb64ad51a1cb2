"""What a reader makes of its files: flat arrays, texts among them, and plain values."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


class Strings:
    """Texts in one uint8 array, decoded when asked for.

    Args:
        blob: uint8 [bytes], UTF-8.
        ends: int64 [n + 1]: text i is ``blob[ends[i] : ends[i + 1]]``.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return _decode(self.blob[self.ends[index] : self.ends[index + 1]])

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self.ends[1:]:
            yield _decode(self.blob[begin:end])
            begin = end


def _decode(raw: np.ndarray) -> str:
    # surrogates cannot come from a checked file, but a text must come back as it went in whatever it holds
    return raw.tobytes().decode("utf-8", "surrogatepass")


@dataclass
class Content:
    """What a reader made of its files: flat arrays by name, and plain JSON values by name."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    name: str | None = None
    """Name of the cache entry these arrays are mapped from; None: they are in memory."""
    held: object = None
    """The entry's open ``meta.json``: its lock says that the entry is in use."""

    def __getstate__(self):
        return {**self.__dict__, "held": None}  # an open file cannot be sent to another process

    def digest(self) -> str:
        """SHA-256 of the arrays: names, types, shapes and bytes. 0.03 s of a core for as many boxes as COCO has."""
        total = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            total.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
            total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return total.hexdigest()

    def put_strings(self, name: str, texts: list[str]) -> None:
        """Add ``texts`` as ``<name>.text`` and ``<name>.ends``."""
        raw = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.arrays[f"{name}.text"] = np.frombuffer(b"".join(raw), dtype=np.uint8)
        self.arrays[f"{name}.ends"] = np.concatenate([[0], np.cumsum([len(r) for r in raw])]).astype(np.int64)

    def strings(self, name: str) -> Strings:
        """The texts of ``put_strings``."""
        return Strings(self.arrays[f"{name}.text"], self.arrays[f"{name}.ends"])


def hash_of(value) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()
