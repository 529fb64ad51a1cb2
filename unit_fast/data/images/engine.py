"""Who reads images: which engine, and with how many threads."""

import importlib.util

import torch

from unit_fast.config import DataConfig
from unit_fast.errors import UserError

MOST_THREADS = 8
"""Threads that decode unless told otherwise. A core decodes some 400 photographs a second."""


def engine_of(data: DataConfig) -> str:
    """``dali`` or ``torchvision``: what ``data.engine`` means here. ``UserError`` where it cannot be."""
    if data.engine == "dali" and not has_dali():
        raise UserError(
            "--data.engine dali: DALI is not installed; run `pip install nvidia-dali-cuda130`, or take "
            "--data.engine torchvision"
        )
    if data.engine == "dali" and data.cache_mib and data.dali_graph == "whole":
        raise UserError(
            f"--data.cache-mib {data.cache_mib}: with --data.dali-graph whole decoded images never leave DALI; take 0 "
            "or --data.dali-graph decode"
        )
    if data.engine == "dali" and data.cache_mib and data.decoder == "mixed":
        raise UserError(
            f"--data.cache-mib {data.cache_mib}: images are kept in the memory of the host, and --data.decoder mixed "
            "decodes on the GPU; take 0 or --data.decoder cpu"
        )
    if data.engine != "auto":
        return data.engine
    return "torchvision" if why_not_dali(data) else "dali"


def why_not_dali(data: DataConfig) -> str | None:
    """Why ``auto`` does not take DALI, or None where it does."""
    if data.cache_mib:
        return (
            f"data.cache_mib {data.cache_mib} keeps images as torchvision's way decodes them; --data.engine dali keeps "
            "DALI's"
        )
    return None if has_dali() else "DALI is not installed (pip install nvidia-dali-cuda130)"


def has_dali() -> bool:
    """Whether DALI is installed; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def decoding_threads(data: DataConfig) -> int:
    """Threads that decode images: ``data.workers``, or as many as torch takes and at most ``MOST_THREADS``."""
    return data.workers or min(MOST_THREADS, torch.get_num_threads())
