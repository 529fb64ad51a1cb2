"""A checksum of tensors that travels in the metadata of their safetensors file."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

DIGEST = "unit_fast.sha256"
"""Entry of a safetensors file's own metadata: ``digest`` of its tensors."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors (on the host), whatever their order and strides."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()
