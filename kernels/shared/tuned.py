"""Launch parameters by (operator, architecture, shape bucket). Nothing searches while training.

``tuned/<card>.json`` holds ``{operator: {bucket: {parameter: value}}}``; ``python -m benchmarks.bench_<op> --tune``
writes it on that card. A card without a table takes that of its architecture (sm_90: h100, below: a100); a bucket that
is in no table takes the analytical default that the launcher passes: what assembled code without spills came to.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from unit_fast_kernels.shared.cards import CARDS

FOLDER = Path(__file__).resolve().parents[1] / "tuned"
_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("unit_fast_card", default=None)
_tried: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("unit_fast_tried", default=None)


@contextlib.contextmanager
def assume(card: str):
    """Within the block launchers take the parameters of ``card``, for assembling without one."""
    if card not in CARDS:
        raise ValueError(f"card is {card!r}; it must be one of {', '.join(CARDS)}")
    token = _assumed.set(card)
    try:
        yield
    finally:
        _assumed.reset(token)


@contextlib.contextmanager
def trying(parameters: Callable[[str, str, Mapping[str, int]], Mapping[str, int] | None]):
    """Within the block launchers take what ``parameters(operator, bucket, default)`` returns instead of what the table
    says, unless it is None: for tuning."""
    token = _tried.set(parameters)
    try:
        yield
    finally:
        _tried.reset(token)


@functools.cache
def _card_of(index: int) -> str:
    name = torch.cuda.get_device_name(index).lower()
    for card in CARDS:
        if card in name:
            return card
    return "h100" if torch.cuda.get_device_capability(index)[0] >= 9 else "a100"


def card(device: torch.device) -> str:
    """The table that ``device`` uses; the CPU (interpreter) counts as an A100."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _card_of(device.index or 0) if device.type == "cuda" else "a100"


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``, from the real card where there is one."""
    if _assumed.get() is None and device.type == "cuda":
        return _multiprocessors_of(device.index or 0)
    return CARDS[card(device)].multiprocessors


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def table(card_name: str) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """``tuned/<card>.json``, empty where there is none."""
    path = FOLDER / f"{card_name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def candidates_of(
    operators: Iterable[str], bucket: str, tried: Iterable[Mapping[str, int]]
) -> list[dict[str, str | Mapping[str, int]]]:
    """What tuning tries, as ``candidates`` of an operator's module returns it."""
    return [{"op": op, "bucket": bucket, "parameters": parameters} for op in operators for parameters in tried]


def launch_parameters(op: str, bucket: str, default: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """``default`` with what the table of ``device`` says for (op, bucket); keys unknown to ``default`` are an error."""
    tried = _tried.get()
    found = None if tried is None else tried(op, bucket, default)
    if found is None:
        found = table(card(device)).get(op, {}).get(bucket, {})
    unknown = set(found) - set(default)
    if unknown:
        raise ValueError(
            f"{FOLDER.name}/{card(device)}.json: {op}/{bucket} has {sorted(unknown)[0]!r}; "
            f"known are {', '.join(default)}"
        )
    return {**default, **found}
