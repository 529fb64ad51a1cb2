"""One training step of the whole model: ours against the authors' formulation (``baselines/unit_eager.py``).

``python -m benchmarks.bench_step``. On a CPU all providers take turns on the same weights and batches; printed are
their times by phase, the ratios beside the aims, and, with ``--memory``, the peak memory of a process that runs each
alone. On a card six tasks in four batch sizes: samples a second, launches, kernels, waits, copies, how busy the card
is, peak memory, kernels by category, and the share of what the card's peaks allow (``step/card.py``).

The gate compares the losses and the gradient of every parameter: the baseline's with dropout off, ours on the path that
is timed, dropout active but with a probability that rounds to dropping nothing.
"""

import argparse
import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.runner import main as runner
from benchmarks.runner.cases import Benchmark, Case
from benchmarks.runner.show import cell, times_as_fast
from benchmarks.step import card
from benchmarks.step.problems import (  # noqa: F401  taken from here by others
    CASES,
    LR,
    LR_BACKBONE,
    MAX_NORM,
    QUICK,
    eager_inputs,
    make_batch,
    mmf_config,
    mmf_state,
    shape_of,
)
from benchmarks.step.providers import Eager, Ours

MINUTES = 10.0
PROVIDERS = ("eager", "library", "ours")
"""Those of a CPU."""


def ratios(rows: list[dict], console: Console, cases: dict) -> None:
    """How many times as fast as the authors' formulation ours is, by phase, and as small, beside the aims."""
    table = Table(title="ours against eager: times as fast, times as small", title_justify="left", box=box.SIMPLE)
    table.add_column("case")
    for title in ("forward", "losses", "backward", "optimiser", "step", "aim", "against library", "memory", "aim"):
        table.add_column(title, justify="right")
    for name, case in cases.items():
        by = {row["provider"]: row for row in rows if row["case"] == name}
        if "ours" not in by or "eager" not in by:
            continue
        ours, eager, library = by["ours"], by["eager"], by.get("library", {})
        figures = [
            *(times_as_fast(ours["phases_ms"][p], eager["phases_ms"][p]) for p in ours["phases_ms"]),
            times_as_fast(ours["time_ms"], eager["time_ms"]),
            1 / case[4],
            times_as_fast(ours["time_ms"], library.get("time_ms")),
            times_as_fast(ours["peak_memory_gib"], eager["peak_memory_gib"]),
            case[5] and 1 / case[5],
        ]
        table.add_row(name, *(cell(figure, "{:.2f}") for figure in figures))
    console.print(table)


def build(args: argparse.Namespace) -> Benchmark:
    shapes, config = (QUICK if args.quick else CASES), mmf_config(args.quick)
    # The memory runs hold one model; all others share one set of weights.
    state = None if args.memory_child else mmf_state(args.quick)
    cases = []
    for name, shape in shapes.items():
        providers = {
            "eager": lambda shape=shape: Eager(shape, config, state),
            "library": lambda shape=shape: Eager(shape, config, state, library=True),
            "ours": lambda shape=shape: Ours(shape, config, state),
        }
        case = Case(
            name=name,
            shape=shape_of(shape),
            providers=providers,
            reference="eager",
            tolerances={"loss/": 1e-4, "grad/": 1e-2},
            error="l2",
        )
        cases.append(case)
    return Benchmark(
        name="bench_step",
        title="One training step of the 8-dataset model",
        quick="a small model",
        method=[
            "eager: the authors' formulation. library: the same with SDPA, channels_last, torch's fused AdamW.",
            "Training mode, dropout 0.1, float32, the same weights and samples. Text: ours padded to the longest of "
            "the batch, the others to the full length.",
            "Phases: forward with heads; matching and losses; backward; clip, AdamW (eager and ours skip tensors "
            "whose gradient is zero), zero_grad.",
            "Gate: every loss to 1e-4, every gradient to 1e-2 of its norm.",
        ],
        excluded="data loading, batch to device, learning-rate schedule, logging",
        cases=cases,
        summary=lambda rows, console: ratios(rows, console, shapes),
    )


def parser() -> argparse.ArgumentParser:
    out = runner.parser(__doc__)
    out.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: a card where there is one, else the CPU; --quick without a card tries a card's code as well",
    )  # fmt: skip
    out.add_argument("--minutes", type=float, help=f"on a card: no row is begun after these (default: {MINUTES:g})")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where the gate refused a provider (no figure is printed), 2 on a wrong option."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    if args.memory_child:
        return runner.run(build, args, arguments)
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        print("--device cuda: this machine, or this torch, has no CUDA device; leave it out", file=sys.stderr)
        return 2
    on_card = there and args.device != "cpu"
    if args.minutes is not None and not on_card:
        print("--minutes: it is for a card, nothing is cut short on a CPU; leave it out", file=sys.stderr)
        return 2
    args.minutes = MINUTES if args.minutes is None else args.minutes
    trying = args.quick and not there and args.device == "auto"
    if (on_card or trying) and (problem := card.refused(args, on_card=on_card)):
        print(problem, file=sys.stderr)
        return 2
    status = 0
    if trying:
        status = _for_cpu(args, arguments)
    elif not on_card:
        status = runner.run(build, args, arguments)
    if status or not (on_card or trying):
        return status
    if args.quick:
        args.rounds, args.warmup = min(args.rounds, 2), 1
    torch.set_num_threads(args.threads)
    return card.run(args, torch.device("cuda" if on_card else "cpu"))


def _for_cpu(args: argparse.Namespace, arguments: list[str]) -> int:
    """The CPU's part of a quick run: without the cases and providers that only a card's code knows."""
    chosen = argparse.Namespace(**vars(args))
    chosen.case = args.case and [name for name in args.case if name in QUICK]
    chosen.provider = args.provider and [name for name in args.provider if name in PROVIDERS]
    nothing = (args.case and not chosen.case) or (args.provider and not chosen.provider)
    return 0 if nothing else runner.run(build, chosen, arguments)


if __name__ == "__main__":
    sys.exit(main())
