"""What a run says where memory does not suffice."""

import contextlib
from collections.abc import Iterator

import torch

from unit_fast.config import RunConfig
from unit_fast.errors import OutOfMemory, is_out_of_memory, printable
from unit_fast.run.state import State


@contextlib.contextmanager
def memory_told(state: State, config: RunConfig, device: torch.device, task: str | None = None) -> Iterator[None]:
    """Within the block, what runs out of memory is an ``OutOfMemory`` that says what to do."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        batch = config.batch_of(task) if task else config.batch_per_process
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(
            f"out of memory in step {state.step + 1} on {task or 'the model'}, batch {batch}{peak} "
            f"({printable(said)}). In this order: halve --batch and double --accumulate; use --precision bf16; lower "
            "--data.max-side and --data.train-short-sides. A run that goes on with --resume takes them with "
            "--allow-changed, e.g. --allow-changed batch_per_process,accumulate"
        ) from error
