"""``--tune``: times an op's launch parameters on this card and writes the best into ``kernels/tuned/<card>.json``.

For each (operator, bucket) that the op's ``candidates(shape)`` name, a walk: from the launcher's default to candidates
near it, from the best of those on, until none is better. They are assembled in parallel first (the binaries then wait
in Triton's cache), and one that spills or takes more shared memory than a block has is not timed. Timing is in
interleaved rounds with a cold L2 cache on every shape of the bucket; the least time relative to the default wins. A
candidate that fails, or whose result is not the default's, is left out; so is one that does not fit in another dtype.
Tables are replaced in one step, entries of other buckets stay.
"""

import argparse
import functools
import importlib
import importlib.util
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
from unit_fast_kernels.assembly import assemble, record
from unit_fast_kernels.shared import tuned
from unit_fast_kernels.shared.registration import REGISTERED

from benchmarks.runner.timing import L2Flush, one_step

ROUNDS = 15
DTYPE = torch.bfloat16
OTHERS = (torch.float16, torch.float32)
MINUTES = 20.0
_CLOSE = 0.02
"""Largest difference from the default's result, relative to its largest value: another order of sums, not a fault."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark whose operators have candidates."""
    parser.add_argument(
        "--tune", action="store_true", help="time launch parameters on this card, write kernels/tuned/; nothing else"
    )
    parser.add_argument("--tune-minutes", type=float, default=MINUTES, help="no further entry is begun after these")


def why_not() -> str | None:
    """Why there is nothing to tune on here, or None."""
    if not torch.cuda.is_available():
        return "--tune needs a CUDA device: it times the kernels on the card; this machine has none"
    name = torch.cuda.get_device_name()
    if not any(card in name.lower() for card in tuned.CARDS):
        return f"--tune writes tables for {', '.join(tuned.CARDS)}; this card is {name}"
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
    return tuned.trying(lambda op, name, default: parameters if (op, name) == (bucket.op, bucket.name) else None)


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
            with tuned.trying(lambda op, name, default, asked=asked: asked.setdefault((op, name), dict(default))):
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


def cold_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs its argument once with a cold L2 cache and returns milliseconds."""
    flush = L2Flush(device)

    def milliseconds(function):
        flush()
        return one_step(lambda marks: function(), device)["total"]

    return milliseconds


@dataclass(frozen=True)
class Timed:
    parameters: dict[str, int]
    milliseconds: tuple[float, ...]
    """Median of each case."""
    ratio: float
    """Time relative to the defaults, geometric mean over the cases."""


def time_candidates(
    bucket: Bucket, candidates: Sequence[dict[str, int]], timer: Callable, rounds: int = ROUNDS
) -> list[Timed]:
    """The default, and those of the candidates that run and give the default's result, in the order given."""
    default = bucket.candidates[0]
    expected = _results(bucket, default)
    if not _close(_results(bucket, default), expected):
        raise RuntimeError(f"{bucket.op}/{bucket.name}: two runs with the default parameters differ")
    running = [default]
    for parameters in candidates:
        try:
            if parameters != default and _close(_results(bucket, parameters), expected):
                running.append(parameters)
        except Exception as error:  # Triton has several for what a card cannot take; none says that the card is ill
            if "illegal" in str(error) or "misaligned" in str(error):
                raise
    taken = [[[] for _ in bucket.cases] for _ in running]
    for _ in range(rounds):
        for number, parameters in enumerate(running):
            with _only(bucket, parameters):
                for case, (_, operator, arguments) in enumerate(bucket.cases):
                    launch = functools.partial(REGISTERED[operator].launch, *arguments)
                    taken[number][case].append(timer(launch))
    medians = [tuple(statistics.median(t) for t in cases) for cases in taken]
    return [
        Timed(p, m, math.exp(statistics.fmean(math.log(a / b) for a, b in zip(m, medians[0]))))
        for p, m in zip(running, medians)
    ]


def near(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    """Whether a and b differ in at most two parameters, each by a factor of two at most, or by being 0 or not."""
    changed = [(a[k], b[k]) for k in a if a[k] != b[k]]
    return len(changed) <= 2 and all(min(x, y) == 0 or max(x, y) <= 2 * min(x, y) for x, y in changed)


def walk(bucket: Bucket, timer: Callable, fitting: Callable[[list], list], rounds: int = ROUNDS) -> list[Timed]:
    """What was timed, fastest first. ``fitting`` says which of a list of candidates are worth it."""
    timed: dict[str, Timed] = {}
    seen: list[dict[str, int]] = []
    best = bucket.candidates[0]
    while True:
        new = [c for c in bucket.candidates if c not in seen and (near(c, best) or c == best)]
        if not new:
            break
        seen += new
        for found in time_candidates(bucket, fitting(new), timer, rounds):
            timed.setdefault(json.dumps(found.parameters), found)
        first = min(timed.values(), key=lambda t: t.ratio).parameters
        if first == best:
            break
        best = first
    return sorted(timed.values(), key=lambda t: t.ratio)


def fitting(module, bucket: Bucket, candidates: Sequence[dict], card: str, dtypes: Sequence[torch.dtype]) -> list[dict]:
    """The candidates with which the kernels that they change compile, do not spill (float32 may) and stay within a
    block's shared memory, in these dtypes."""
    (arch,) = (a for a, cards in assemble.ARCHITECTURES.items() if card in cards)
    shapes = dict.fromkeys(shape for shape, *_ in bucket.cases)

    def launches(parameters, dtype) -> dict[str, list]:
        def passes():
            for shape in shapes:
                for operator, arguments in module.launches(module.SHAPES[shape], dtype, "cuda:0"):
                    REGISTERED[operator].launch(*arguments)

        with _only(bucket, parameters):
            recorded = record.record(passes, card)
        return {name: [x for x in recorded if x.name == name] for name in {x.name for x in recorded}}

    kept = list(candidates)
    for dtype in dtypes:
        with_default = launches(bucket.candidates[0], dtype)
        by_candidate = [launches(parameters, dtype) for parameters in kept]
        changed = {n for found in by_candidate for n in found if found[n] != with_default.get(n)}
        jobs = [[x for n in found if n in changed for x in found[n]] for found in by_candidate]
        failed: dict[str, Exception] = {}
        folder = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
        binaries = assemble.assemble_all(
            [(x, arch) for wanted in jobs for x in wanted], failed=failed, triton_cache=folder
        )

        def good(wanted, dtype=dtype, failed=failed, binaries=binaries) -> bool:
            keys = [x.key(arch) for x in wanted]
            if any(key in failed for key in keys):
                return False
            found = [binaries[key] for key in keys]
            spilled = any(x.spill_bytes or x.stack_bytes for x in found) and dtype != torch.float32
            return not spilled and all(x.shared_bytes <= assemble.SHARED_LIMIT[arch] for x in found)

        kept = [parameters for parameters, wanted in zip(kept, jobs) if good(wanted)]
    return kept


# -------------------------------------------------------------------------------------------------------------- tables


def write(card: str, entries: Mapping[tuple[str, str], Mapping[str, int]], folder: Path = tuned.FOLDER) -> Path:
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
    tuned.table.cache_clear()
    return path


def tune(
    module, card: str, device: torch.device, timer: Callable, console: Console, *, fits: Callable = fitting,
    folder: Path = tuned.FOLDER, rounds: int = ROUNDS, minutes: float = MINUTES,
) -> dict[tuple[str, str], dict[str, int]]:  # fmt: skip
    """Time, choose and write the entries of ``module`` in the order of its shapes, each as soon as it is known."""
    chosen, begun = {}, time.perf_counter()
    for bucket in buckets(module, DTYPE, device):
        started = time.perf_counter()
        if started - begun > 60 * minutes:
            console.print(f"{bucket.op}/{bucket.name}: left for another run (--tune-minutes)", highlight=False)
            continue
        timed = walk(bucket, timer, lambda found, b=bucket: fits(module, b, found, card, (DTYPE,)), rounds)
        best = next((t for t in timed if fits(module, bucket, [t.parameters], card, (DTYPE, *OTHERS))), None)
        if best is None:
            raise RuntimeError(f"{bucket.op}/{bucket.name}: no candidate stays within the limits, nor do the defaults")
        chosen[bucket.op, bucket.name] = best.parameters
        path = write(card, {(bucket.op, bucket.name): best.parameters}, folder)
        console.print(_shown(bucket, timed, best))
        console.print(
            f"{path.name}: {bucket.op}/{bucket.name} = {best.parameters}; timed {len(timed)} of "
            f"{len(bucket.candidates)} candidates in {time.perf_counter() - started:.0f} s",
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


def main(op: str, minutes: float = MINUTES) -> int:
    """Tune the kernels of ``op`` on this machine's first card. Exit status 2 where there is none."""
    problem = why_not()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = torch.device("cuda:0")
    module = importlib.import_module(f"unit_fast_kernels.{op}")
    tune(module, tuned.card(device), device, cold_timer(device), Console(), minutes=minutes)
    return 0
