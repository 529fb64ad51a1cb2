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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.runner import memory, results, show, tune
from benchmarks.runner.cases import Benchmark
from benchmarks.runner.gate import gate
from benchmarks.runner.machine import environment
from benchmarks.runner.rows import OnCard, rows_of
from benchmarks.runner.timing import measure


def parser(about: str) -> argparse.ArgumentParser:
    """The options every benchmark has; a benchmark adds its own. ``about`` is its docstring."""
    out = argparse.ArgumentParser(
        description=about.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    build: Callable[[argparse.Namespace], Benchmark],
    about: str,
    arguments: Sequence[str] | None = None,
    *,
    ops: Sequence[str] = (),
) -> int:
    """Run a benchmark. ``build`` gets the parsed options; ``about`` is the benchmark's docstring.

    Where it has ``ops``, ``--tune`` tunes their launch parameters instead.
    Exit status: 0, or 1 when the gate refused a provider (no figure is printed then), 2 on a wrong option.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser(about)
    if ops:
        tune.add_options(options)
    args = options.parse_args(arguments)
    if ops and args.tune:
        return max(tune.main(op, args.tune_minutes / len(ops)) for op in ops)
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
        print(json.dumps(memory.of_this_process(provider, torch.device(case.device))))
        return 0
    known = dict.fromkeys(name for case in benchmark.cases for name in case.providers)
    for option, wanted, names in (("--case", args.case, by_name), ("--provider", args.provider, known)):
        for name in wanted or ():
            if name not in names:
                print(f"{option}: unknown {name!r}; known: {', '.join(names)}", file=sys.stderr)
                return 2

    console, stamp = Console(width=max(100, Console().width)), environment()
    title = benchmark.title + (f" (quick: {benchmark.quick})" if args.quick else "")
    rounds = f"Rounds: {args.rounds} interleaved after {args.warmup} warm-up steps each; median (p20 - p80)."
    console.print(show.heading(title, [*benchmark.method, rounds], benchmark.excluded, stamp))
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
        card = OnCard.of(providers, device, args.rounds)
        del providers
        peaks = {name: memory.of_a_child(benchmark.name, case.name, name, passed) for name in chosen if args.memory}
        rows = rows_of(case, times, peaks, stamp, benchmark.name, card)
        console.print(show.table(rows))
        for line in show.not_captured(rows):
            console.print(line, highlight=False, soft_wrap=True)
        all_rows += rows
        results.keep(rows, args)
    if benchmark.summary is not None:
        benchmark.summary(all_rows, console)
    return 0
