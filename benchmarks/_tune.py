"""``--tune``: times an op's launch parameters on this card and writes the best into ``kernels/tuned/<card>.json``.

For each (operator, bucket) that the op's ``candidates(shape)`` name: every candidate is launched on every shape of the
bucket, in interleaved rounds with a cold L2 cache; the one with the least time relative to the defaults wins. One that
fails, or whose result is not the default's, is left out; so is one that, in any dtype, needs more shared memory than a
block has, or spills where kernels may not. Tables are replaced in one step, entries of other buckets stay.
"""

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from unit_fast_kernels import _assemble, _tuned
from unit_fast_kernels._op import REGISTERED

ROUNDS = 15
DTYPE = torch.bfloat16
OTHERS = (torch.float16, torch.float32)
_CLOSE = 0.02
"""Largest difference from the default's result, relative to its largest value: another order of sums, not a fault."""


def op_of(module: str) -> str | None:
    """``benchmarks.bench_<op>`` -> the op, where a kernel module of that name says what it launches."""
    name = module.rpartition(".")[2]
    op = name.removeprefix("bench_")
    if op == name or not (_tuned.FOLDER.parent / f"{op}.py").exists():
        return None
    found = importlib.import_module(f"unit_fast_kernels.{op}")
    return op if hasattr(found, "candidates") and hasattr(found, "launches") else None


def add_tune(parser: argparse.ArgumentParser) -> None:
    """The option of a benchmark whose op has candidates."""
    parser.add_argument(
        "--tune", action="store_true", help="time launch parameters on this card, write kernels/tuned/; nothing else"
    )


def why_not() -> str | None:
    """Why there is nothing to tune on here, or None."""
    if not torch.cuda.is_available():
        return "--tune needs a CUDA device: it times the kernels on the card; this machine has none"
    name = torch.cuda.get_device_name()
    if not any(card in name.lower() for card in _tuned.CARDS):
        return f"--tune writes tables for {', '.join(_tuned.CARDS)}; this card is {name}"
    return None


# ------------------------------------------------------------------------------------------------------------- search


@dataclass
class Bucket:
    """What is decided together: one entry of a table."""

    op: str
    name: str
    candidates: list[dict[str, int]] = field(default_factory=list)
    """The launcher's default on this card first."""
    cases: list[tuple[str, str, tuple]] = field(default_factory=list)
    """(shape, registered operator, arguments) that look this entry up."""


def _only(bucket: Bucket, parameters: Mapping[str, int]):
    """Within the block the entry has these parameters, the others what they had."""
    return _tuned.trying(lambda op, name, default: parameters if (op, name) == (bucket.op, bucket.name) else None)


def buckets(module, dtype: torch.dtype, device: torch.device) -> list[Bucket]:
    """The entries of ``module`` (SHAPES, candidates, launches), each with its candidates and what looks it up."""
    found: dict[tuple[str, str], Bucket] = {}
    for shape, size in module.SHAPES.items():
        for candidate in module.candidates(size):
            key = candidate["op"], candidate["bucket"]
            bucket = found.setdefault(key, Bucket(*key))
            if candidate["parameters"] not in bucket.candidates:
                bucket.candidates.append(dict(candidate["parameters"]))
        for operator, arguments in module.launches(size, dtype, device):
            asked: dict[tuple[str, str], dict[str, int]] = {}
            with _tuned.trying(lambda op, name, default, asked=asked: asked.setdefault((op, name), dict(default))):
                REGISTERED[operator].launch(*arguments)
            for key, default in asked.items():
                if key in found:
                    bucket = found[key]
                    bucket.cases.append((shape, operator, arguments))
                    bucket.candidates = [default, *(c for c in bucket.candidates if c != default)]
    unused = [f"{b.op}/{b.name}" for b in found.values() if not b.cases]
    if unused:
        raise ValueError(f"candidates for {', '.join(unused)}, which no launch of these shapes looks up")
    return list(found.values())


def _results(bucket: Bucket, parameters: Mapping[str, int]) -> list[list[torch.Tensor]]:
    with _only(bucket, parameters):
        outputs = [REGISTERED[operator].launch(*arguments) for _, operator, arguments in bucket.cases]
    return [[x for x in (out if isinstance(out, tuple | list) else (out,)) if x is not None] for out in outputs]


def _close(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    for a, b in zip((x for out in found for x in out), (x for out in expected for x in out), strict=True):
        if b.numel() and not float((a.double() - b.double()).abs().max()) <= _CLOSE * float(b.double().abs().max()):
            return False
    return True


def cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument once with a cold L2 cache and returns milliseconds."""
    from benchmarks._run import L2Flush

    flush = L2Flush(device)

    def milliseconds(function):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return milliseconds


@dataclass(frozen=True)
class Timed:
    parameters: dict[str, int]
    milliseconds: tuple[float, ...]
    """Median of each case."""
    ratio: float
    """Time relative to the defaults, geometric mean over the cases."""


def time_candidates(bucket: Bucket, timer: Callable, rounds: int = ROUNDS) -> list[Timed]:
    """The candidates that run and give the default's result, fastest first."""
    expected = _results(bucket, bucket.candidates[0])
    running = []
    for parameters in bucket.candidates:
        try:
            if _close(_results(bucket, parameters), expected):
                running.append(parameters)
        except Exception as error:  # Triton has several for what a card cannot take; none says that the card is ill
            if "illegal" in str(error) or "misaligned" in str(error):
                raise
    if bucket.candidates[0] not in running:
        raise RuntimeError(f"{bucket.op}/{bucket.name}: two runs with the default parameters differ")
    taken = [[[] for _ in bucket.cases] for _ in running]
    for _ in range(rounds):
        for number, parameters in enumerate(running):
            with _only(bucket, parameters):
                for case, (_, operator, arguments) in enumerate(bucket.cases):
                    launch = functools.partial(REGISTERED[operator].launch, *arguments)
                    taken[number][case].append(timer(launch))
    medians = [tuple(statistics.median(t) for t in cases) for cases in taken]
    timed = [
        Timed(p, m, math.exp(statistics.fmean(math.log(a / b) for a, b in zip(m, medians[0]))))
        for p, m in zip(running, medians)
    ]
    return sorted(timed, key=lambda t: t.ratio)


def fits(module, bucket: Bucket, parameters: Mapping[str, int], card: str) -> bool:
    """Whether the launches with these parameters stay within shared memory and do not spill, in every dtype."""
    (arch,) = (a for a, cards in _assemble.ARCHITECTURES.items() if card in cards)
    shapes = dict.fromkeys(shape for shape, *_ in bucket.cases)
    for dtype in (DTYPE, *OTHERS):

        def passes(dtype=dtype):
            for shape in shapes:
                for operator, arguments in module.launches(module.SHAPES[shape], dtype, "cuda:0"):
                    REGISTERED[operator].launch(*arguments)

        with _only(bucket, parameters):
            launches = _assemble.record(passes, card)
        for binary in _assemble.assemble_all([(launch, arch) for launch in launches]).values():
            spilled = binary.spill_bytes or binary.stack_bytes
            if binary.shared_bytes > _assemble.SHARED_LIMIT[arch] or (spilled and dtype != torch.float32):
                return False
    return True


# -------------------------------------------------------------------------------------------------------------- tables


def write(card: str, entries: Mapping[tuple[str, str], Mapping[str, int]], folder: Path = _tuned.FOLDER) -> Path:
    """Put {(operator, bucket): parameters} into the table of ``card``; the file is replaced in one step."""
    path = folder / f"{card}.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for (op, bucket), parameters in entries.items():
        table.setdefault(op, {})[bucket] = dict(parameters)
    lines = [
        f" {json.dumps(op)}: {{\n"
        + ",\n".join(f"  {json.dumps(b)}: {json.dumps(table[op][b])}" for b in sorted(table[op]))
        + "\n }"
        for op in sorted(table)
    ]
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False, encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    _tuned.table.cache_clear()
    return path


def tune(
    module, card: str, device: torch.device, timer: Callable, console: Console, *,
    allowed: Callable = fits, folder: Path = _tuned.FOLDER, rounds: int = ROUNDS,
) -> dict[tuple[str, str], dict[str, int]]:  # fmt: skip
    """Time, choose and write every entry of ``module``; each is written as soon as it is known."""
    chosen = {}
    for bucket in buckets(module, DTYPE, device):
        started = time.perf_counter()
        timed = time_candidates(bucket, timer, rounds)
        best = next((t for t in timed if allowed(module, bucket, t.parameters, card)), None)
        if best is None:
            raise RuntimeError(f"{bucket.op}/{bucket.name}: no candidate stays within the limits, nor do the defaults")
        chosen[bucket.op, bucket.name] = best.parameters
        path = write(card, {(bucket.op, bucket.name): best.parameters}, folder)
        console.print(_shown(bucket, timed, best))
        console.print(
            f"{path.name}: {bucket.op}/{bucket.name} = {best.parameters}; "
            f"{len(timed)} of {len(bucket.candidates)} candidates ran; {time.perf_counter() - started:.0f} s",
            highlight=False,
        )
    return chosen


def _shown(bucket: Bucket, timed: Sequence[Timed], best: Timed) -> Table:
    table = Table(title=f"{bucket.op}/{bucket.name}, ms", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("parameters", no_wrap=True)
    for shape, *_ in bucket.cases:
        table.add_column(shape, justify="right")
    table.add_column("vs default", justify="right")
    default = next(t for t in timed if t.parameters == bucket.candidates[0])
    for row in timed[:5] if default in timed[:5] else (*timed[:5], default):
        name = ", ".join(f"{k}={v}" for k, v in row.parameters.items())
        name += " <-" if row is best else " (default)" if row is default else ""
        table.add_row(name, *(f"{ms:.4f}" for ms in row.milliseconds), f"{row.ratio:.3f}")
    return table


def main(op: str) -> int:
    """Tune the kernels of ``op`` on this machine's first card. Exit status 2 where there is none."""
    problem = why_not()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = torch.device("cuda:0")
    module = importlib.import_module(f"unit_fast_kernels.{op}")
    tune(module, _tuned.card(device), device, cuda_timer(device), Console())
    return 0
