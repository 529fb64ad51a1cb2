"""Whether launches go into a CUDA graph now, and what must not happen then.

A capture takes its memory from the graphs' pool, where a replay lays its own activations over whatever the host has
written in between. So within a capture nothing may be made that lasts, nor copied from the host: what a replay reads
was made before, by an eager step or by a call that is there for it, or is written within the graph before it is read.
Eager steps that take their memory from the same pool (``graph_memory``) leave nothing there either.
"""

import contextlib
import threading

import torch

_here = threading.local()


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now goes into a CUDA graph. The host knows; nothing is waited for."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # fake tensors need no driver
        return False
    return torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def graph_memory():
    """Says that the block's memory comes from a pool of graphs: their replays overwrite what is left in it."""
    _here.graph_memory = True
    try:
        yield
    finally:
        _here.graph_memory = False


def in_graph_memory(device: torch.device) -> bool:
    """Whether memory taken now may be overwritten by a replay."""
    return getattr(_here, "graph_memory", False) or capturing(device)


def refuse(device: torch.device, what: str) -> None:
    """``RuntimeError`` within a capture, where ``what`` would have to be made or copied."""
    if capturing(device):
        raise RuntimeError(
            f"{what} within the capture of a CUDA graph, whose memory the next replay uses for something else; run "
            "the same step once eagerly before the capture, or call MaskedAdamW.prepare()"
        )
