"""Checks of an operator's arguments: ``ValueError`` with the operator's and the argument's name, and the remedy."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor
from unit_fast_kernels.shared.registration import DTYPES

NORMALISATIONS = ("per_image", "per_process")
"""Over what the mean of a loss is taken."""


def refuse(op: str, argument: str, found, remedy: str):
    """Raise ``ValueError``: ``argument`` of ``op`` is ``found``."""
    raise ValueError(f"{op}: {argument} is {found}; {remedy}")


def unfit_dtype(**tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take one of ``tensors``, or None."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{argument} is {tensor.dtype}: convert it to float32, bfloat16 or float16"
    return None


def check_shape(op: str, argument: str, tensor: Tensor, expected: tuple, legend: str) -> None:
    """``expected`` holds sizes, None for any."""
    if tensor.dim() != len(expected) or any(e not in (None, n) for e, n in zip(expected, tensor.shape)):
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        refuse(op, argument, f"of shape {list(tensor.shape)}", f"it must be {legend} = [{sizes}]")


def check_floating(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if not tensor.is_floating_point():
            refuse(op, argument, tensor.dtype, "it must be floating point: convert it with .float()")


def check_int64(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            refuse(op, argument, tensor.dtype, "it must be int64: convert it with .long()")


def check_integer(op: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            refuse(op, argument, tensor.dtype, "it must be an integer tensor")


def check_known(op: str, argument: str, name: str, known: Sequence[str]) -> None:
    """``name`` is one of ``known``."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        refuse(op, argument, repr(name), f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}")


def check_one_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            refuse(op, argument, f"on {tensor.device}", f"move it to {first.device}, where the other tensors are")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        refuse(op, "dropout_p", dropout_p, "it must be at least 0 and below 1")
    if dropout_p > 0.0:
        if seed is None:
            remedy = "with dropout_p > 0 it must be an int64 tensor of two numbers, drawn once a step"
            refuse(op, "seed", "None", remedy)
        if seed.dtype != torch.int64 or seed.shape != (2,):
            refuse(op, "seed", f"{seed.dtype} of shape {list(seed.shape)}", "it must be int64 of shape [2]")
