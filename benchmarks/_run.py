"""The runner of every benchmark: correctness first, then interleaved rounds, then a table and one JSON line a row.

A benchmark describes its cases (a problem, a reference, the providers that solve it); ``main`` does the rest:

1. prints what is measured, how, and what is left out;
2. gate: every provider's outputs are compared with the reference; one that differs ends the run with exit status 1
   before any figure is printed;
3. warm-up, then rounds in which the providers take turns, each round starting with the next of them, so that a machine
   that slows down slows all; on CUDA the L2 cache is overwritten before each run;
4. median with 20 % and 80 % points, a table, and one JSON line a row with everything needed to judge it;
5. with ``--memory``, the peak memory of a child process that runs three steps of one provider and nothing else.

A slower result is printed like any other.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor

from benchmarks import _tune
from benchmarks._machine import ROOT, environment, peak_resident, percent_of_peak

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_STEPS = 3


class Marks:
    """Stop watch handed to a provider's step: ``marks("forward")`` ends the phase that began at the last mark.

    ``marks.skip()`` starts anew without booking the time since the last mark. On CUDA marks are events on the current
    stream, so that nothing waits for the device inside the step.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._phases: list[tuple[str, object, object]] = []
        self.skip()

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def skip(self) -> None:
        self._last = self._now()

    def __call__(self, phase: str) -> None:
        now = self._now()
        self._phases.append((phase, self._last, now))
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by phase; phases of the same name add up."""
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, float] = {}
        for phase, start, end in self._phases:
            taken = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            out[phase] = out.get(phase, 0.0) + taken
        return out


class Provider:
    """One way to solve a case. Subclasses hold whatever they need between steps."""

    def step(self, marks: Marks) -> None:
        """Solve once, calling ``marks(phase)`` at the end of each phase. Without any call the whole is "total"."""
        raise NotImplementedError

    def outputs(self) -> Mapping[str, Tensor]:
        """Results for the gate, by name, computed without randomness."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem."""

    name: str
    """Short, as ``--case`` takes it."""
    shape: str
    """For the table, e.g. ``2 x 320x426``."""
    dtype: str = "float32"
    device: str = "cpu"
    providers: Mapping[str, Callable[[], Provider]]
    """Name -> factory. Built once, before the gate, in this order."""
    reference: str
    """Name of the provider the others are compared with, or of an entry of ``references``."""
    references: Mapping[str, Callable[[], Provider]] = field(default_factory=dict)
    """Providers that are compared with but not timed."""
    tolerances: Mapping[str, float]
    """Largest relative error allowed, by prefix of the output's name; the longest prefix counts, "" is the default."""
    error: Literal["max", "l2"] = "max"
    """How outputs differ: by their largest element, or in the 2-norm (where single elements may be far off and right,
    as gradients behind a ReLU whose input is near zero)."""
    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What ``main`` runs."""

    name: str
    """Stem of the results file, e.g. ``bench_step``."""
    module: str
    """For ``python -m``: the child processes of the memory figures are started so."""
    title: str
    method: Sequence[str]
    """Lines for the box printed first."""
    excluded: str
    """What the figures leave out."""
    cases: Sequence[Case]
    ours: str = "ours"
    summary: Callable[[Sequence[dict], Console], None] | None = None
    """Prints something of its own after the table, given the rows."""


# ------------------------------------------------------------------------------------------------------------ gate


@dataclass(frozen=True)
class Check:
    key: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN compares false


def relative_error(value: Tensor | None, expected: Tensor, norm: str = "max") -> float:
    """Norm of the difference over the norm of what is expected; infinite on a missing value, another shape or NaN."""
    if value is None or value.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    if not bool(value.isfinite().all()):
        return float("inf")
    degree = {"max": float("inf"), "l2": 2}[norm]
    difference, scale = (float(torch.linalg.vector_norm(x, degree)) for x in (value - expected, expected))
    return difference / scale if scale > 0 else difference


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerances: Mapping[str, float], norm: str = "max"
) -> list[Check]:
    """One check an output. A key that only one side has is an infinite error."""
    checks = []
    for key in [*expected, *(k for k in found if k not in expected)]:
        prefix = max((p for p in tolerances if key.startswith(p)), key=len)
        error = relative_error(found.get(key), expected[key], norm) if key in expected else float("inf")
        checks.append(Check(key, error, tolerances[prefix]))
    return checks


def gate(case: Case, providers: Mapping[str, Provider], console: Console) -> bool:
    """Compare every provider with the reference; print one line each. False when one differs."""
    if case.reference in providers:
        reference = providers[case.reference]
    else:
        reference = case.references[case.reference]()
    expected, fine = dict(reference.outputs()), True
    for name, provider in providers.items():
        if provider is reference:
            continue
        checks = compare(expected, dict(provider.outputs()), case.tolerances, case.error)
        worst = max(checks, key=lambda c: (not c.ok, c.error / c.allowed if c.allowed else c.error))
        bad = [c for c in checks if not c.ok]
        fine &= not bad
        verdict = "equal" if not bad else f"DIFFERS in {len(bad)} outputs"
        console.print(
            f"gate {case.name}: {name} {verdict} to {case.reference}: {len(checks)} outputs, worst {worst.error:.1e} "
            f"(allowed {worst.allowed:.0e}) at {worst.key}",
            highlight=False,
            soft_wrap=True,
        )
    return fine


# --------------------------------------------------------------------------------------------------------- measuring


class L2Flush:
    """Overwrites the L2 cache of a CUDA device; does nothing elsewhere."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The providers' turn in a round: every round starts with the next one."""
    start = round_number % len(names)
    return [*names[start:], *names[:start]]


def one_step(provider: Provider, device: torch.device) -> dict[str, float]:
    """Milliseconds by phase of one step, and their sum under ``total``."""
    marks = Marks(device)
    marks.skip()
    provider.step(marks)
    if not marks._phases:
        marks("total")
    phases = marks.milliseconds()
    phases.setdefault("total", sum(phases.values()))
    return phases


def measure(
    providers: Mapping[str, Provider], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds by provider, round and phase."""
    names, flush = list(providers), L2Flush(device)
    for name in names:
        for _ in range(warmup):
            one_step(providers[name], device)
    out: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in order(names, number):
            flush()
            out[name].append(one_step(providers[name], device))
    return out


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % points (linear between neighbours)."""
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(float(p) for p in points)


def rows_of(
    case: Case, times: Mapping[str, list[dict[str, float]]], memory: Mapping[str, float], stamp: Mapping, name: str
) -> list[dict]:
    """One row a provider: what the JSON line holds."""
    totals = {provider: quantiles([t["total"] for t in rounds])[0] for provider, rounds in times.items()}
    rows = []
    for provider, rounds in times.items():
        median, low, high = quantiles([t["total"] for t in rounds])
        phases = [phase for phase in rounds[0] if phase != "total"]
        others = [t for other, t in totals.items() if other != provider]
        row = {
            "benchmark": name,
            "case": case.name,
            "shape": case.shape,
            "dtype": case.dtype,
            "device": case.device,
            "provider": provider,
            "time_ms": round(median, 4),
            "p20_ms": round(low, 4),
            "p80_ms": round(high, 4),
            "rounds": len(rounds),
            "phases_ms": {phase: round(quantiles([t[phase] for t in rounds])[0], 4) for phase in phases},
            "speedup_vs_best": round(min(others) / median, 4) if others else None,
            "peak_memory_gib": memory.get(provider),
            "percent_of_peak": percent_of_peak(case, median, stamp["gpu"]),
            **stamp,
        }
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ memory


def child_memory(provider: Provider, device: torch.device) -> dict:
    """Peak memory after three steps, in this process: resident, and the allocator's peak on CUDA."""
    for _ in range(MEMORY_STEPS):
        one_step(provider, device)
    host = peak_resident()
    device_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"host_gib": host / 2**30, "device_gib": device_bytes and device_bytes / 2**30}


def peak_memory(benchmark: Benchmark, case: Case, provider: str, arguments: Sequence[str]) -> float:
    """GiB at the peak of a child process that runs three steps of one provider (of the device on CUDA)."""
    command = [sys.executable, "-m", benchmark.module, *arguments, "--memory-child", case.name, provider]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the memory run of {case.name}, {provider} failed:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return round(figures["device_gib"] or figures["host_gib"], 3)


# -------------------------------------------------------------------------------------------------------------- main


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has; a benchmark adds its own."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    out.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    out.add_argument("--warmup", type=int, default=2, help="untimed steps of each provider before the rounds")
    out.add_argument("--threads", type=int, default=2, help="CPU threads")
    out.add_argument("--case", action="append", help="only this case (repeatable)")
    out.add_argument("--provider", action="append", help="only this provider beside ours (repeatable)")
    out.add_argument("--quick", action="store_true", help="small problems, two rounds: does it run? Keeps no results")
    out.add_argument("--memory", action="store_true", help="measure peak memory too, in child processes")
    out.add_argument(
        "--json", type=Path, help="append the JSON lines to this file instead of keeping them in benchmarks/results/"
    )
    out.add_argument("--no-results", action="store_true", help="write no results file")
    out.add_argument("--memory-child", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    return out


def main(
    build: Callable[[argparse.Namespace], Benchmark], arguments: Sequence[str] | None = None, *, options=None
) -> int:
    """Run a benchmark. ``build`` gets the parsed options; ``options`` is its parser (default: the common one).

    A benchmark that is called as its op is (``bench_<op>``) has ``--tune`` where the op has launch parameters to try.
    Exit status: 0, or 1 when the gate refused a provider (no figure is printed then), 2 on a wrong option.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = options or parser(build.__doc__ or "")
    op = _tune.op_of(_module_of(build))
    if op is not None:
        _tune.add_tune(options)
    args = options.parse_args(arguments)
    if op is not None and args.tune:
        return _tune.main(op, args.tune_minutes)
    if args.quick:
        args.rounds, args.warmup = min(args.rounds, 2), 1
    if args.rounds < 1 or args.threads < 1:
        print("--rounds and --threads must be at least 1", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    benchmark = build(args)
    by_name = {case.name: case for case in benchmark.cases}
    if args.memory_child:
        case = by_name[args.memory_child[0]]
        provider = case.providers[args.memory_child[1]]()
        print(json.dumps(child_memory(provider, torch.device(case.device))))
        return 0
    known = dict.fromkeys(name for case in benchmark.cases for name in case.providers)
    for option, wanted, names in (("--case", args.case, by_name), ("--provider", args.provider, known)):
        for name in wanted or ():
            if name not in names:
                print(f"{option}: unknown {name!r}; known: {', '.join(names)}", file=sys.stderr)
                return 2

    console, stamp = Console(width=max(100, Console().width)), environment()
    console.print(_box(benchmark, args, stamp))
    all_rows = []
    passed = [a for a in arguments if a != "--memory"]
    for case in benchmark.cases:
        if args.case and case.name not in args.case:
            continue
        chosen = [n for n in case.providers if not args.provider or n == benchmark.ours or n in args.provider]
        providers = {name: case.providers[name]() for name in chosen}
        if not gate(case, providers, console):
            console.print(f"[bold red]{case.name}: a provider does not equal the reference: no figures.[/]")
            return 1
        times = measure(providers, torch.device(case.device), args.rounds, args.warmup)
        del providers
        memory = {name: peak_memory(benchmark, case, name, passed) for name in chosen} if args.memory else {}
        rows = rows_of(case, times, memory, stamp, benchmark.name)
        console.print(_table(rows))
        all_rows += rows
        if args.json:
            append(rows, args.json)
        elif not (args.quick or args.no_results):
            replace(rows, RESULTS / f"{benchmark.name}.jsonl")
    if benchmark.summary is not None:
        benchmark.summary(all_rows, console)
    return 0


def _module_of(build: Callable) -> str:
    """The module of a benchmark, also where it was started with ``python -m``."""
    specification = getattr(sys.modules.get(build.__module__), "__spec__", None)
    return specification.name if specification else build.__module__


def append(rows: Sequence[dict], path: Path) -> None:
    """Append the rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def replace(rows: Sequence[dict], path: Path) -> None:
    """Put the rows into a results file, in place of those of the same problem, provider and machine."""

    def key(row):
        return tuple(row[k] for k in ("case", "shape", "dtype", "device", "provider", "cpu", "cores", "gpu", "threads"))

    new = {key(row) for row in rows}
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    aside = path.with_suffix(".new")
    aside.unlink(missing_ok=True)
    append([row for row in kept if key(row) not in new] + list(rows), aside)
    aside.replace(path)


def _box(benchmark: Benchmark, args: argparse.Namespace, stamp: Mapping) -> Panel:
    machine, torch_version = stamp["gpu"] or f"{stamp['cpu']}, {stamp['cores']} cores", stamp["versions"]["torch"]
    lines = [
        *benchmark.method,
        f"Rounds: {args.rounds} interleaved after {args.warmup} warm-up steps each; median (p20 - p80).",
        f"Left out: {benchmark.excluded}",
        f"Machine: {machine}; {stamp['threads']} threads; torch {torch_version}; commit {stamp['commit']}.",
    ]
    return Panel("\n".join(lines), title=benchmark.title, title_align="left")


def _table(rows: Sequence[dict]) -> Table:
    first = rows[0]
    phases = list(first["phases_ms"])
    title = f"{first['case']}: {first['shape']}, {first['dtype']}, ms"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    for title in (*phases, "total", "p20", "p80", "vs best", "% peak", "GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["provider"],
            *(f"{row['phases_ms'][phase]:.4g}" for phase in phases),
            *(f"{row[key]:.4g}" for key in ("time_ms", "p20_ms", "p80_ms")),
            "-" if row["speedup_vs_best"] is None else f"{row['speedup_vs_best']:.2f}x",
            "-" if row["percent_of_peak"] is None else f"{row['percent_of_peak']:.1f}",
            "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}",
        )
    return table
