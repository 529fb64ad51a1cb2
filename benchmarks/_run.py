"""The runner of every benchmark: correctness first, then interleaved rounds, then a table and one JSON line a row.

A benchmark describes its cases (a problem, a reference, the providers that solve it); ``main`` does the rest:

1. prints what is measured, how, and what is left out;
2. gate: every provider's outputs are compared with the reference; one that differs ends the run with exit status 1
   before any figure is printed;
3. warm-up, then rounds in which the providers take turns, each round starting with the next of them, so that a machine
   that slows down slows all; on CUDA the L2 cache is overwritten before each run, and each step that can be is
   captured in a graph and its replays are timed the same way: from the host, a small kernel's launch is measured;
4. median with 20 % and 80 % points, a table, and one JSON line a row with everything needed to judge it;
5. with ``--memory``, the peak memory of a child process that runs three steps of one provider and nothing else.

A slower result is printed like any other.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import _device, _show, _tune
from benchmarks._device import order
from benchmarks._gate import gate
from benchmarks._kernels import Profile
from benchmarks._machine import ROOT, card_of, environment, peak_resident, percent_of_peak
from benchmarks._marks import Marks, NoMarks

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_STEPS = 3


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


# --------------------------------------------------------------------------------------------------------- measuring


class L2Flush:
    """Overwrites the L2 cache of a CUDA device; does nothing elsewhere."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def one_step(provider: Provider, device: torch.device) -> dict[str, float]:
    """Milliseconds by phase of one step, and their sum under ``total``."""
    marks = Marks(device)
    marks.skip()
    provider.step(marks)
    if not marks.used:
        marks("total")
    return marks.milliseconds()


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


@dataclass(frozen=True)
class OnCard:
    """What is measured on a card besides the rounds from the host, by provider."""

    captured: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    """Milliseconds by round and phase of replays."""
    why_not: Mapping[str, str] = field(default_factory=dict)
    """Why a provider is not captured."""
    profiles: Mapping[str, Profile] = field(default_factory=dict)


def on_card(providers: Mapping[str, Provider], device: torch.device, rounds: int) -> OnCard:
    """Replays and profiles of the providers on CUDA; nothing elsewhere."""
    if device.type != "cuda":
        return OnCard()
    profiles = {name: _device.profile(lambda p=p: p.step(NoMarks()), device) for name, p in providers.items()}
    captured, why_not = _device.captured_rounds(providers, device, rounds, L2Flush(device))
    return OnCard(captured, why_not, profiles)


def rows_of(
    case: Case, times: Mapping[str, list[dict[str, float]]], memory: Mapping[str, float], stamp: Mapping, name: str,
    card: OnCard | None = None,
) -> list[dict]:  # fmt: skip
    """One row a provider: what the JSON line holds. ``time_ms``: timed from the host; ``captured_ms``: of replays."""
    card = card or OnCard()
    totals = {provider: quantiles([t["total"] for t in rounds])[0] for provider, rounds in times.items()}
    replayed = {provider: quantiles([t["total"] for t in rounds])[0] for provider, rounds in card.captured.items()}
    rows = []
    for provider, rounds in times.items():
        median, low, high = quantiles([t["total"] for t in rounds])
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
            "phases_ms": _phases(rounds),
            "speedup_vs_best": _speedup(totals, provider),
            "captured_ms": round(replayed[provider], 4) if provider in replayed else None,
            "captured_phases_ms": _phases(card.captured[provider]) if provider in replayed else None,
            "captured_speedup_vs_best": _speedup(replayed, provider),
            "captured_why_not": card.why_not.get(provider),
            **_counts(card.profiles.get(provider)),
            "peak_memory_gib": memory.get(provider),
            "percent_of_peak": percent_of_peak(case, replayed.get(provider, median), stamp["gpu"]),
            **stamp,
        }
        rows.append(row)
    return rows


def _phases(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase."""
    return {phase: round(quantiles([t[phase] for t in rounds])[0], 4) for phase in rounds[0] if phase != "total"}


def _speedup(totals: Mapping[str, float], provider: str) -> float | None:
    """The best of the others over this one; None where there is no other, or this one has no time."""
    others = [t for other, t in totals.items() if other != provider]
    return round(min(others) / totals[provider], 4) if others and provider in totals else None


def _counts(found: Profile | None) -> dict:
    """What a step launches and how often it waits, by the profiler; None where nothing was profiled."""
    keys = ("launches", "kernels", "waits", "copies_to_host", "copies_to_device")
    if found is None:
        return dict.fromkeys((*keys, "kernels_by_name"))
    names = {name[:120]: sums["kernels"] for name, sums in found.by_name.items()}
    return {**{key: getattr(found, key) for key in keys}, "kernels_by_name": names}


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
    return run(build, args, arguments)


def run(build: Callable[[argparse.Namespace], Benchmark], args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """``main`` for options that are parsed already; ``arguments`` are what they were parsed from, for the child
    processes of the memory figures."""
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
    rounds = f"Rounds: {args.rounds} interleaved after {args.warmup} warm-up steps each; median (p20 - p80)."
    console.print(_show.heading(benchmark.title, [*benchmark.method, rounds], benchmark.excluded, stamp))
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
        device = torch.device(case.device)
        times = measure(providers, device, args.rounds, args.warmup)
        card = on_card(providers, device, args.rounds)
        del providers
        memory = {name: peak_memory(benchmark, case, name, passed) for name in chosen} if args.memory else {}
        rows = rows_of(case, times, memory, stamp, benchmark.name, card)
        console.print(_show.table(rows))
        for line in _show.not_captured(rows):
            console.print(line, highlight=False, soft_wrap=True)
        all_rows += rows
        if args.json:
            append(rows, args.json)
        elif not (args.quick or args.no_results):
            replace(rows, results_path(benchmark.name, stamp["gpu"]))
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


def results_path(benchmark: str, gpu: str | None) -> Path:
    """Where the rows of a benchmark are kept: a file for each card, so that no table mixes them, one for CPUs."""
    return RESULTS / (f"{benchmark}_{card_of(gpu)}.jsonl" if gpu else f"{benchmark}.jsonl")


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
