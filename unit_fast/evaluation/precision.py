"""The precision that a model is evaluated in, and outputs and weights that are not finite."""

import contextlib

import torch
from torch import Tensor

from unit_fast import numerics
from unit_fast.batch import Output
from unit_fast.errors import printable


@contextlib.contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which a model runs on ``device`` under ``RunConfig.precision``; off CUDA tf32 is fp32."""
    bf16 = numerics.takes_bf16(precision, device)
    with (
        numerics.arithmetic(precision, "auto", device),
        torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext(),
    ):
        yield


def finite_rows(output: Output) -> Tensor:
    """bool [B]: whether all outputs of a sample are finite, of the last layer where there are several."""
    last = [output.logits, output.boxes]
    found = [x[-1] for x in last if x is not None]
    found += [x for x in (output.attribute_logits, output.scores) if x is not None]
    return torch.stack([x.isfinite().flatten(1).all(1) for x in found]).all(0)


def nonfinite_weights(model: torch.nn.Module) -> str:
    """A clause about the model's weights and constants that are not finite; empty where all are. Reads the device."""
    tensors = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    fine = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
    bad = [name for name, is_fine in zip(tensors, fine) if not is_fine]
    if not bad:
        return ""
    return f"{len(bad)} of {len(tensors)} weight tensors are not finite (first: {printable(bad[0])})"


def why_nonfinite(model: torch.nn.Module) -> str:
    """Why outputs may not be finite, and what to do."""
    if weights := nonfinite_weights(model):
        return f"{weights}: take another checkpoint"
    return "all weights are finite, so numbers became too large on the way: try --precision fp32, look at the input"
