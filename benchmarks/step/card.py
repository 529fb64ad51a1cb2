"""Whole steps on a card: a provider at a time, a row as soon as it is known.

Providers hold gigabytes and some run out of memory, so they do not take turns as on a CPU: each is built, warmed up,
timed in rounds of steps back to back, profiled and dropped. The order is that of what the figures decide, so that a run
that ends early has what matters most.
"""

import argparse
import dataclasses
import gc
import importlib.util
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from rich.console import Console

from benchmarks.runner import results
from benchmarks.runner.capture import first_line
from benchmarks.runner.machine import environment
from benchmarks.runner.profile import Profile, profile
from benchmarks.runner.show import heading
from benchmarks.runner.timing import back_to_back, quantiles
from benchmarks.step import gate, show
from benchmarks.step.problems import CARD, QUICK_CARD, brief, mmf_config, samples
from benchmarks.step.providers import Eager
from benchmarks.step.updates import Step
from benchmarks.step.work import Work, count, count_all

NAME = "bench_step"
PROVIDERS = ("ours", "library", "ours_eager", "eager", "ours_deterministic", "compiled")
METHOD = (
    "eager: the authors' formulation. library: the same with SDPA, channels_last, torch's fused AdamW; compiled: that "
    "under torch.compile. ours_eager: our step as it runs without graphs; ours: the same captured and replayed; "
    "ours_deterministic: that with --deterministic on.",
    "Training mode, dropout 0.1, bfloat16 autocast on CUDA, batches on the device. Ours is padded to its bucket.",
    "ms: steps back to back. Launches, kernels, waits and copies of one step are the profiler's; busy: the share of "
    "the step's time in which the card ran anything. Bound: the least time that the step's FLOPs and bytes allow.",
    "Gate, a task at a time: losses and gradients against the authors' formulation in float32, within twice what "
    "bfloat16 does to it; replayed updates are the eager ones. compiled is library's own module and is not compared.",
)
_WARM_UP = 4
"""Steps before timing, at least: a bucket's eager steps, its capture, a replay."""


def cases_of(names: Sequence[str] | None, known: Mapping[str, tuple]) -> dict[str, tuple]:
    """The cases that were asked for: by their name, or all of a task's (``coco`` for ``coco_b2``, ``coco_b8``, ...)."""
    chosen = [n for n in known if not names or n in names or n.rpartition("_b")[0] in names]
    return {name: known[name] for name in chosen}


def why_not_compiled(quick: bool, asked: bool) -> str | None:
    """Why the library's variant is not compiled here, or None."""
    if quick and not asked:
        return "compiling takes longer than all the rest of a quick run; --provider compiled asks for it"
    compilers = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang"]
    if not any(name and shutil.which(name) for name in compilers):
        return "torch.compile needs a C compiler, none was found (CC, CXX, g++, gcc, clang)"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on CUDA, which is not installed"
    return None


def make(provider: str, case: tuple, config: dict, device: torch.device) -> Step | Eager:
    """A provider; its ``update()`` is one update."""
    if provider.startswith("ours"):
        deterministic = "on" if provider == "ours_deterministic" else "auto"
        return Step(case, config, device, provider != "ours_eager", deterministic)
    return Eager(
        case, config, None, provider != "eager", compiled=provider == "compiled", device=device,
        bf16=device.type == "cuda",
    )  # fmt: skip


def figures(
    made: Step | Eager, device: torch.device, *, rounds: int, warmup: int
) -> tuple[list[float], Profile, float | None]:
    """(ms of each round, profile, GiB at the peak). ``RuntimeError`` where a step that was to be replayed was not."""
    times = back_to_back(made.update, device, rounds=rounds, warmup=max(warmup, _WARM_UP))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    found = profile(made.update, device)
    if isinstance(made, Step) and made.graphs:
        made.graphs.check()
        if not made.replays():
            raise RuntimeError("ours: no step was replayed; the figures would be those of eager steps")
    return times, found, peak


def row_of(
    name: str, case: tuple, provider: str, stamp: Mapping, work: Work | None, device: torch.device, *,
    times: Sequence[float] = (), found: Profile | None = None, peak: float | None = None, status: str = "ok",
) -> dict:  # fmt: skip
    """The row of a results file. ``status`` is ``ok``, or why there are no figures."""
    median, low, high = quantiles(times) if times else (None, None, None)
    card = found is not None and device.type == "cuda"
    bound = work and work.bound_ms(stamp["gpu"])
    return {
        "benchmark": NAME,
        "case": name,
        "shape": brief(case),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "device": device.type,
        "provider": provider,
        "status": status,
        "time_ms": _rounded(median),
        "p20_ms": _rounded(low),
        "p80_ms": _rounded(high),
        "rounds": len(times),
        "samples_per_s": median and round(samples(case) / median * 1e3, 2),
        **(found.row() if card else dict.fromkeys(f.name for f in dataclasses.fields(Profile) if f.name != "by_name")),
        "busy_share": round(found.busy_ms / median, 4) if card else None,
        "peak_memory_gib": _rounded(peak),
        "work": work and {"flops": work.flops, "bytes": work.bytes},
        "bound_ms": _rounded(bound),
        "share_of_bound": round(bound / median, 4) if bound and median else None,
        **stamp,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def measure(
    name: str, case: tuple, provider: str, args, device: torch.device, stamp: Mapping, work: Work | None
) -> dict:
    """One row. A peer that runs out of memory or does not compile gets a row that says so; ours may only be short of
    memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        made = make(provider, case, mmf_config(args.quick), device)
        times, found, peak = figures(made, device, rounds=args.rounds, warmup=args.warmup)
        return row_of(name, case, provider, stamp, work, device, times=times, found=found, peak=peak)
    except torch.cuda.OutOfMemoryError:
        status = "out of memory"
    except Exception as error:  # the compiler has many kinds
        if provider != "compiled":
            raise
        status = f"failed: {type(error).__name__}: {first_line(error)}"
    finally:
        made = None  # its memory is the next one's
        gc.collect()
    return row_of(name, case, provider, stamp, work, device, status=status)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Gate, measure, print, write, for options that ``refused`` had nothing against. Exit status 1 where the gate
    refused a provider."""
    console = Console(width=max(140, Console().width))
    known = QUICK_CARD if args.quick else CARD
    cases = cases_of(args.case, known)
    chosen = [p for p in PROVIDERS if not args.provider or p == "ours" or p in args.provider]
    stamp, begun = environment(), time.monotonic()
    title = "One training step of the 8-dataset model on a card"
    if device.type == "cpu":
        title = "What is measured on a card, tried on a CPU: no kernels, and graphs have a stand-in"
    console.print(heading(title, METHOD, "data loading, batch to device, learning-rate schedule, logging", stamp))
    if "compiled" in chosen and (why := why_not_compiled(args.quick, "compiled" in (args.provider or ()))):
        console.print(f"compiled is left out: {why}", highlight=False, soft_wrap=True)
        chosen.remove("compiled")
    bf16 = device.type == "cuda"
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    works = {} if args.quick else count_all(cases, quick=False, bf16=bf16, processes=processes)
    todo = [(name, p) for name in cases for p in chosen if p != "compiled"]
    todo += [(name, p) for name in cases for p in chosen if p == "compiled"]
    gated, counted, rows, late = set(), {}, [], []
    for name, provider in todo:
        if time.monotonic() - begun > 60 * args.minutes:
            late.append(f"{name} {provider}")
            continue
        case = cases[name]
        if case[0] not in gated:
            if not passes(name, case, args.quick, device, console):
                console.print(f"[bold red]{name}: a provider does not equal the reference: no figures.[/]")
                return 1
            gated.add(case[0])
        if name not in counted:
            counted[name] = _work(works.get(name), name, case, args.quick, bf16, console)
        work = counted[name]
        row = measure(name, case, provider, args, device, stamp, work)
        rows.append(row)
        console.print(show.line(row), highlight=False, soft_wrap=True)
        results.keep([row], args)
    for name in cases:
        same = [row for row in rows if row["case"] == name]
        if same:
            console.print(show.table(same))
            console.print(show.categories(same))
    if late:
        console.print(f"not begun after {args.minutes:g} minutes: {', '.join(late)}", highlight=False, soft_wrap=True)
    return 0


def passes(name: str, case: tuple, quick: bool, device: torch.device, console: Console) -> bool:
    """Both gates, on two samples of the case at most."""
    task, image, tokens, objects, *_ = case
    case = (task, image and (min(2, image[0]), *image[1:]), tokens[:2], objects[:2])
    fine = gate.authors(name, case, quick=quick, device=device, console=console)
    return gate.captured(name, case, quick=quick, device=device, console=console) and fine


def _work(found: Future | None, name: str, case: tuple, quick: bool, bf16: bool, console: Console) -> Work | None:
    """What the step computes and moves at least. None where counting failed, which is said: times are worth more than
    their bound, and the counting is on a CPU, where it can be had later."""
    try:
        return count(case, quick=quick, bf16=bf16) if found is None else found.result()
    except Exception as error:  # whatever a process of its own ends with
        console.print(f"{name}: no bound, its work was not counted: {type(error).__name__}: {first_line(error)}")
        return None


def refused(args: argparse.Namespace, *, on_card: bool) -> str | None:
    """What is wrong with the options, or None. A quick run on a CPU takes the names of the CPU's cases too."""
    known = QUICK_CARD if args.quick else CARD
    names = [*dict.fromkeys(name.rpartition("_b")[0] for name in known), *known]
    for option, wanted, fitting in (("--case", args.case, names), ("--provider", args.provider, PROVIDERS)):
        for name in wanted or ():
            if name not in fitting:
                return f"{option}: unknown {name!r}; known: {', '.join(fitting)}"
    if args.memory and on_card:
        return "--memory: on a card peak memory is always measured; leave it out"
    if min(args.rounds, args.threads) < 1 or args.warmup < 0:
        return "--rounds and --threads must be at least 1, --warmup at least 0"
    return None
