"""Everything that needs a card, in one command and within ten minutes: tests marked gpu, then every op's benchmark.

    python -m benchmarks.gpu_suite --out FOLDER            # on a machine with a CUDA device
    python -m benchmarks.gpu_suite --out FOLDER --quick    # on any: the benchmarks' small forms, to see that they run

Each step is a child process with a time limit; ``FOLDER`` gets its output (``<step>.log``), its rows
(``<step>.jsonl``, a line as soon as it is known) and ``summary.json``, rewritten after each step, so that a run that is
cut off leaves what it has. Steps that matter most come first. Exit status 1 where a step failed or was cut off, 2 where
nothing was run.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks._machine import ROOT, environment

MINUTES = 10.0
_RESERVE_SECONDS = 10.0
"""Kept back for starting and ending children."""
FIRST = ("attention", "cross_attention", "residual_norm", "match", "set_loss", "optimizer", "step_graph", "data")
"""Ops in the order of what they decide; others follow by name."""
OF_SEVERAL_OPS = ("match", "optimizer", "step_graph")
"""Benchmarks that are not named after one op: matching is its cost and the assignment, the optimiser is more than its
kernels, and a captured step is everything."""
OF_NO_OP = {"data": ("--case", "detection_train", "--provider", "torchvision_v2", "--batches", "12", "--rounds", "5")}
"""Benchmarks without a kernel, and what they are told so as to end in time: reading images, and how long a real step
waits for them."""
TEST_SECONDS = 200.0
BENCHMARK_SECONDS = 120.0
NO_OP_SECONDS = 200.0
_LEAST_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """One child process."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float


def steps(out: Path, *, quick: bool, cuda: bool, only: Sequence[str] = (), folder: Path = ROOT) -> list[Step]:
    """The steps in order. Without a card the tests are left out: they would only be skipped."""
    found = []
    if cuda:
        command = ("-m", "pytest", "-m", "gpu", "-q", "-rfE", f"--junitxml={out / 'pytest.xml'}")
        found.append(Step("pytest", (sys.executable, *command), TEST_SECONDS))
    ops = {p.stem.removeprefix("bench_") for p in (folder / "benchmarks").glob("bench_*.py")}
    ops = {op for op in ops if op in (*OF_SEVERAL_OPS, *OF_NO_OP) or (folder / "kernels" / f"{op}.py").exists()}
    for op in sorted(ops, key=lambda op: (FIRST.index(op) if op in FIRST else len(FIRST), op)):
        command = ("-m", f"benchmarks.bench_{op}", "--json", str(out / f"bench_{op}.jsonl"), *OF_NO_OP.get(op, ()))
        command = (sys.executable, *command, *(("--quick",) if quick else ()))
        found.append(Step(f"bench_{op}", command, NO_OP_SECONDS if op in OF_NO_OP else BENCHMARK_SECONDS))
    unknown = set(only) - {step.name for step in found}
    if unknown:
        raise ValueError(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(s.name for s in found)}")
    return [step for step in found if not only or step.name in only]


def run_step(step: Step, out: Path, limit_seconds: float) -> dict:
    """Run one step; what ``summary.json`` says of it."""
    started = time.monotonic()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(limit_seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "cut off"
        finally:  # whatever ended it, nothing that it started goes on
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return {
        "step": step.name, "status": status, "exit_code": code, "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": round(limit_seconds, 1), "command": list(step.command),
    }  # fmt: skip


def run(todo: Sequence[Step], out: Path, seconds: float) -> list[dict]:
    """Run the steps one after the other within ``seconds``; the rows of ``summary.json``."""
    end = time.monotonic() + seconds
    stamp, done = environment(), []
    for step in todo:
        left = end - time.monotonic() - _RESERVE_SECONDS
        if left < _LEAST_SECONDS:
            row = {"step": step.name, "status": "not started", "exit_code": None, "seconds": 0.0}
        else:
            print(f"{step.name} ... ", end="", flush=True)
            row = run_step(step, out, min(step.limit_seconds, left))
            print(f"{row['status']}, {row['seconds']:.0f} s", flush=True)
        done.append(row)
        aside = out / "summary.new"
        aside.write_text(json.dumps({"steps": done, **stamp}, indent=1) + "\n", encoding="utf-8")
        aside.replace(out / "summary.json")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print where the results are."""
    parser = argparse.ArgumentParser(
        description="Run the tests and benchmarks that need a card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--quick", action="store_true", help="small problems, also on a CPU: does it run?")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all steps together")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="only this step (repeatable)")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        print("no CUDA device: nothing to measure here; --quick runs the small forms on a CPU", file=sys.stderr)
        return 2
    out = options.out.resolve()
    try:
        todo = steps(out, quick=options.quick, cuda=cuda, only=options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not todo:
        print("no benchmark of an op found", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    done = run(todo, out, 60 * options.minutes)
    print(f"{sum(row['status'] == 'ok' for row in done)} of {len(done)} steps ok: {out / 'summary.json'}")
    return 0 if all(row["status"] == "ok" for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
