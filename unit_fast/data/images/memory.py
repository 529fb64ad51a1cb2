"""Memory for pixels: batches' blocks that are used again, and images kept decoded."""

import mmap
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from unit_fast.data.images.decode import Stamp


class Buffers:
    """Memory for batches of pixels that is used again once nothing refers to it any more.

    A new 80 MB block costs the kernel as much time to provide, page by page, as the normalised pixels cost to compute
    (3 of 6 ms an image on a Xeon). Torch keeps no free CPU memory, so this does; at most ``keep`` blocks.
    """

    def __init__(self, keep: int = 4):
        self.keep, self._free, self._lock = keep, [], threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor of this shape."""
        size = 4 * int(np.prod(shape))
        with self._lock:
            fitting = [block for block in self._free if len(block) >= size]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._free.remove(block)
        if block is None:
            block = mmap.mmap(-1, max(size, mmap.PAGESIZE))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        view = np.frombuffer(block, dtype=np.float32, count=size // 4)
        # The tensor's storage holds ``view``: when the last tensor on it is gone, so is ``view``.
        weakref.finalize(view, self._back, block).atexit = False
        return torch.from_numpy(view).view(shape)

    def _back(self, block) -> None:
        with self._lock:
            self._free.append(block)
            if len(self._free) > self.keep:
                self._free.remove(min(self._free, key=len))


class KeptImages:
    """Decoded images, those read first, up to ``limit`` bytes.

    Nothing is dropped for a later one: visits are in random order, so none is likelier to be asked for again. A file of
    another stamp is another image. Not thread-safe.
    """

    def __init__(self, limit: int):
        self.left, self._kept = limit, {}

    def get(self, path, stamp: Stamp | None = None):
        """The image of the file with this stamp, which belongs to the cache; None where it has none."""
        known, _, image = self._kept.get(str(path), (None, 0, None))
        return image if known == stamp else None

    def put(self, path, image, size: int, stamp: Stamp | None = None) -> bool:
        """Keep ``image`` of ``size`` bytes, a tensor as a copy on the host; False where there is no room."""
        room = self.left + self._kept.get(str(path), (None, 0))[1]
        if size > room:
            return False
        # a decoder's own tensor may be part of a whole batch's memory
        image = image.to("cpu", copy=True) if isinstance(image, Tensor) else image
        self._kept[str(path)] = stamp, size, image
        self.left = room - size
        return True
