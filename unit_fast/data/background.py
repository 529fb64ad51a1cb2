"""Reading ahead in a thread, and copying to a CUDA device on a stream of its own."""

import contextlib
import logging
import queue
import threading
from collections.abc import Iterable

import torch

_log = logging.getLogger("unit_fast.data")


class OneCore:
    """Lets torch's operators in ``count`` new threads run on one core each; nothing changes for other threads.

    Several threads whose operators all spread over the cores wait for each other busily, which takes longer than the
    work. Each new thread calls ``begin``, and who made them ``end``.
    """

    def __init__(self, count: int):
        self._all, self._before = threading.Barrier(count + 1), torch.get_num_threads()

    def begin(self) -> None:
        torch.get_num_threads()  # makes torch set this thread up, which it would otherwise do later, over our number
        torch.set_num_threads(1)  # also the number of threads to come, which ``end`` puts back
        self._all.wait()

    def end(self) -> None:
        self._all.wait()
        torch.set_num_threads(self._before)


class Background:
    """Takes items from an iterator in a thread of its own, up to ``depth`` ahead, in order.

    An exception of the iterator is raised by ``next`` after the items before it. On a CUDA ``device`` the iterator
    works on a stream of its own, on which the ``batches`` of each item are copied there from pinned memory; the item's
    ``ready`` is what ``received`` waits for.
    """

    def __init__(self, items: Iterable, depth: int, device: torch.device | None = None):
        on_gpu = device is not None and device.type == "cuda"
        self._items, self._device, self._stream = items, device, torch.cuda.Stream(device) if on_gpu else None
        self._queue: queue.Queue = queue.Queue(max(1, depth))
        self._stopped = threading.Event()
        cores = OneCore(1)
        self._thread = threading.Thread(target=self._run, args=(cores,), name="loader", daemon=True)
        self._thread.start()
        cores.end()

    def _run(self, cores: OneCore) -> None:
        cores.begin()
        try:
            with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
                for item in self._items:
                    if self._stream:
                        item.batches = [batch.pin_memory().to(self._device) for batch in item.batches]
                        item.ready = self._stream.record_event()
                    if not self._put((item, None)):
                        return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self._put((None, error))
        finally:
            if hasattr(self._items, "close"):
                self._items.close()

    def _put(self, found) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(found, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # for whoever asks again
            raise error
        return item

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        self._stopped.set()
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            _log.warning("the loader's thread hangs in a read and is left behind")


def received(step, device: torch.device) -> None:
    """Let the current stream wait for the copies, and the allocator know that it uses them."""
    current = torch.cuda.current_stream(device)
    current.wait_event(step.ready)
    for batch in step.batches:
        for tensor in batch.tensors().values():
            tensor.record_stream(current)
