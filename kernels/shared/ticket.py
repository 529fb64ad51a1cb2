"""Tickets: the program of a launch that comes last adds what all of them left, so that a sum needs no second launch.

Each of a group's programs stores its partial sums and then takes a ticket, ``if is_last(counter_ptr, programs):``. The
last one sees what all others stored and adds it in a fixed order: who came last changes nothing. It has set the counter
back to 0, so nothing has to zero it before the next launch, nor before the next replay of a CUDA graph.

``counters`` keeps the counters, int32, on the device. Two launches that may run at once never share one: what runs
eagerly has those of its stream, and each call captured into a graph has its own for good (replays of one graph wait for
each other, but those of two graphs, or of a graph and its capturing stream, need not). Relied on:

* A counter is zeroed by the stream that first needs it, eagerly. A graph takes some of a block that an earlier eager
  call left; ``torch.cuda.graph`` waits for the device before it captures, so they are zero before any replay. With
  ``CUDAGraph.capture_begin`` alone the caller has to wait. Without an eager call before the capture there is no block:
  that raises. Counters made in the graphs' own pool would be overwritten by replays: who runs eager steps in it calls
  ``reserve`` before, outside. ``torch.compile(mode="reduce-overhead")`` needs an eager call before it too.
* A launch runs to its end. If one is broken off by a fault the counters stay where they are, but then the CUDA context
  is lost too, and the process with it.
"""

import threading

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from unit_fast_kernels.shared import capture
from unit_fast_kernels.shared.triton import cdiv, jit, tl

LINE = 32
"""A captured call's counters start at a multiple of 128 bytes: Triton compiles for pointers divisible by 16."""
BLOCK = 1 << 16
"""Counters set aside for captured calls at a time: 256 KiB, 2048 calls of up to 32 counters."""

RESERVED = 1024
"""Counters of a stream; a call takes as many as there are decoder layers."""

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, list[Tensor]] = {}
"""Blocks; all are kept, for graphs hold their addresses."""
_taken: dict[torch.device, int] = {}
"""Counters taken from the last block."""
_lock = threading.Lock()


@jit
def is_last(counter_ptr, programs):
    """Whether this program is the last of ``programs`` that come here with this counter, which is 0 again then.

    What any of them stored before is seen behind this by the last one, if it loads past the L1 cache (``.cg``).
    """
    tl.debug_barrier()  # all threads' stores precede the one thread's ticket
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


def counters(like: Tensor, count: int) -> Tensor:
    """int32 [at least ``count``] on the device of ``like``, all 0 when the launch that is about to come starts.

    For one launch on the current stream. RuntimeError where a CUDA graph is captured before any eager call.
    """
    device = like.device
    if isinstance(like, FakeTensor):  # a launch is recorded, nothing runs
        return torch.empty(count, dtype=torch.int32, device=device)
    stream, capturing = _stream(device)
    with _lock:
        return _of_graph(device, count) if capturing else _eager(device, stream, count)


def reserve(device: torch.device) -> None:
    """Make the counters that the current stream's launches will need, also those captured from it later."""
    stream, _ = _stream(device)
    with _lock:
        _eager(device, stream, RESERVED)


def _stream(device: torch.device) -> tuple[int, bool]:
    """(the current stream, whether it is being captured)."""
    number = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return number, capture.capturing(device)


def _eager(device: torch.device, stream: int, count: int) -> Tensor:
    blocks = _for_graphs.setdefault(device, [])
    if not blocks or len(blocks[-1]) - _taken[device] < max(BLOCK // 2, _lines(count)):
        blocks.append(torch.zeros(max(BLOCK, 2 * _lines(count)), dtype=torch.int32, device=device))
        _taken[device] = 0
    found = _of_stream.get((device, stream))
    if found is None or len(found) < count:
        size = _lines(max(count, RESERVED))
        found = _of_stream[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    if device.type == "cpu" and found.count_nonzero():
        del _of_stream[device, stream]
        raise RuntimeError("a launch was interrupted in Triton's interpreter and left its counters; call again")
    return found


def _of_graph(device: torch.device, count: int) -> Tensor:
    blocks = _for_graphs.get(device, [])
    start = _taken.get(device, 0)
    if not blocks or len(blocks[-1]) - start < count:
        raise RuntimeError(
            f"a CUDA graph is being captured on {device}, but no counters are left for it; run the same step once "
            "eagerly before it is captured"
        )
    _taken[device] = start + _lines(count)
    return blocks[-1][start : start + count]


def _lines(count: int) -> int:
    return cdiv(count, LINE) * LINE
