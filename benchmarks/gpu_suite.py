"""Everything that needs a card, for a short lease: whole steps, tests marked gpu, then every op's benchmark.

    python -m benchmarks.gpu_suite --out FOLDER            # on a machine with a CUDA device
    python -m benchmarks.gpu_suite --out FOLDER --quick    # on any: the benchmarks' small forms, to see that they run
    python -m benchmarks.gpu_suite --out FOLDER --only bench_step --only pytest

Each part is a child process of a few minutes at most; the order is that of what the parts decide. ``FOLDER`` gets four
files: ``results.jsonl`` (a line as soon as it is known), ``log.txt`` (what the parts print), ``pytest.xml``,
and ``summary.json``, rewritten after each part: how each ended, and for every goal of the project whether it is met,
missed or not measured. A run that is cut off leaves what it has. Nothing is fetched or installed, but what ``--wheels``
holds. Exit status 1 where a part failed or was cut off, 2 where nothing was run.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.runner.goals import judge
from benchmarks.runner.machine import ROOT, environment

MINUTES = 10.0
_RESERVE_SECONDS = 10.0
"""Kept back for starting and ending children."""
_LEAST_SECONDS = 5.0
_ITS_OWN = 0.8
"""Share of its time after which the benchmark of whole steps begins no further row."""
MIB = 2**20
LARGEST_FILE = 16 * MIB
RESULTS, LOG, SUMMARY, TESTS = "results.jsonl", "log.txt", "summary.json", "pytest.xml"

STEPS = {
    "bench_step": (("--case", "coco"), 150),
    "bench_step_text": (("--case", "qnli", "--case", "sst2"), 120),
    "bench_step_vg": (("--case", "vg"), 150),
    "bench_step_vqa2": (("--case", "vqa2"), 150),
    "bench_step_snli_ve": (("--case", "snli_ve"), 150),
    "bench_step_compiled": (("--case", "coco_b2", "--case", "coco_b8", "--provider", "compiled"), 240),
}
"""Parts of the benchmark of whole steps -> its options, and seconds. The first is what decides most."""
UNCOMPILED = ("library", "ours_eager", "eager", "ours_deterministic")
"""The peers of all of them but the last: compiling a model takes minutes of a lease."""
FIRST = ("attention", "cross_attention", "match", "set_loss", "optimizer", "residual_norm", "frozen_bn_act")
"""Ops in the order of what they decide; others follow by name."""
OF_SEVERAL_OPS = ("match", "optimizer", "cross_attention")
"""Benchmarks that are not named after one op: matching is its cost and the assignment, the optimiser is more than its
kernels, cross-attention is a regime of attention."""
OF_NO_OP = {"data": ("--case", "detection_train", "--provider", "torchvision_v2", "--batches", "12", "--rounds", "5")}
"""Benchmarks without a kernel, and what they are told so as to end in time: reading images, and how long a real step
waits for them."""
TEST_SECONDS = 240.0
BENCHMARK_SECONDS = 120.0
NO_OP_SECONDS = 200.0


@dataclass(frozen=True)
class Step:
    """One part: a child process."""

    name: str
    command: tuple[str, ...]
    limit_seconds: float


def pytest_command(out: Path, processes: int, parallel: bool, folder: Path = ROOT) -> tuple[str, ...]:
    """The tests marked gpu, from the files that have any: the others may import what a machine with a card lacks.

    ``parallel``: in processes that take each other's work when they have none (a kernel compiles for seconds, and no
    split beforehand knows which).
    """
    spread = ("-n", str(processes), "--dist", "worksteal") if parallel else ()
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in (folder / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    options = ("-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors", f"--junitxml={out / TESTS}")
    return (sys.executable, "-m", "pytest", *options, *spread, *files)


def has(package: str, extra: Path | None = None) -> bool:
    """Whether a child process can import it: from here, or from the folder of unpacked wheels."""
    return importlib.util.find_spec(package) is not None or (extra is not None and (extra / package).exists())


def steps(
    out: Path, *, quick: bool, cuda: bool, only: Sequence[str] = (), folder: Path = ROOT, extra: Path | None = None
) -> list[Step]:
    """The parts in order. Without a card the tests are left out: they would only be skipped."""

    def benchmark(name: str, module: str, options: Sequence[str], seconds: float) -> Step:
        command = (sys.executable, "-m", f"benchmarks.{module}", "--json", str(out / RESULTS), *options)
        return Step(name, (*command, *(("--quick",) if quick else ())), seconds)

    whole = []
    if (folder / "benchmarks" / "bench_step.py").exists():
        for name, (options, seconds) in STEPS.items():
            if "--provider" not in options:
                options = (*options, *(word for peer in UNCOMPILED for word in ("--provider", peer)))
            options = (*options, "--minutes", f"{_ITS_OWN * seconds / 60:.2f}")
            if not quick:
                whole.append(benchmark(name, "bench_step", options, seconds))
        if quick:  # a quick run of the benchmark is small, and has cases of its own
            whole.append(benchmark("bench_step", "bench_step", (), BENCHMARK_SECONDS))
    tests = []
    if cuda:
        command = pytest_command(out, os.cpu_count() or 1, has("xdist", extra), folder)
        tests.append(Step("pytest", command, TEST_SECONDS))
    ops = {p.stem.removeprefix("bench_") for p in (folder / "benchmarks").glob("bench_*.py")}
    kernels = {path.stem for path in (folder / "kernels").iterdir()}
    ops = {op for op in ops if op in (*OF_SEVERAL_OPS, *OF_NO_OP) or op in kernels}
    single = [
        benchmark(
            f"bench_{op}", f"bench_{op}", OF_NO_OP.get(op, ()), NO_OP_SECONDS if op in OF_NO_OP else BENCHMARK_SECONDS
        )
        for op in sorted(ops, key=lambda op: (FIRST.index(op) if op in FIRST else len(FIRST), op))
    ]
    first = [step for step in single if step.name.removeprefix("bench_") in FIRST[:3]]
    found = [*whole[:1], *tests, *first, *whole[1:-1], *(s for s in single if s not in first), *whole[1:][-1:]]
    unknown = set(only) - {step.name for step in found}
    if unknown:
        raise ValueError(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(s.name for s in found)}")
    return [step for step in found if not only or step.name in only]


def run_step(step: Step, out: Path, limit_seconds: float, environ: Mapping[str, str] | None = None) -> dict:
    """Run one part, its output behind that of the others; what ``summary.json`` says of it."""
    started = time.monotonic()
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n=== {step.name}: {' '.join(step.command)}\n")
        log.flush()
        child = subprocess.Popen(
            step.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            start_new_session=True, env=environ,
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


def shorten(path: Path, most: int = LARGEST_FILE) -> None:
    """Cut the middle out of a text that is longer than ``most`` bytes."""
    size = path.stat().st_size if path.exists() else 0
    if size <= most:
        return
    note = f"\n... {size - most} bytes and a few left out ...\n".encode()
    half = (most - len(note)) // 2
    with path.open("rb") as file:
        first = file.read(half)
        file.seek(size - half)
        last = file.read()
    path.write_bytes(first + note + last)


def rows_in(path: Path) -> list[dict]:
    """The rows of a results file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def run(
    todo: Sequence[Step],
    out: Path,
    seconds: float,
    *,
    environ: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> list[dict]:
    """Run the parts one after the other within ``seconds``; the rows of ``summary.json``."""
    end = time.monotonic() + seconds
    stamp, done = environment(), []
    for step in todo:
        left = end - time.monotonic() - _RESERVE_SECONDS
        if left < _LEAST_SECONDS:
            row = {"step": step.name, "status": "not started", "exit_code": None, "seconds": 0.0}
        else:
            print(f"{step.name} ... ", end="", flush=True)
            row = run_step(step, out, min(step.limit_seconds, left), environ)
            print(f"{row['status']}, {row['seconds']:.0f} s", flush=True)
        done.append(row)
        shorten(out / LOG)
        aside = out / "summary.new"
        summary = {"steps": done, "goals": judge(rows_in(out / RESULTS)), "notes": list(notes), **stamp}
        aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        aside.replace(out / SUMMARY)
    return done


_PROBE = {"benchmark": "", "case": "", "provider": "", "device": "cuda"}
"""A row of nothing, to find out whether older rows are of this card."""


def unpack(wheels: Path, target: Path) -> None:
    """Install the wheels of a folder into ``target``, with nothing but them. ``ValueError`` with what pip says."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"--wheels: {wheels} holds no *.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, *found], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"--wheels: pip could not install them: {done.stderr.strip()[-500:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print where the results are."""
    parser = argparse.ArgumentParser(
        description="Run the tests and benchmarks that need a card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--quick", action="store_true", help="small problems, also on a CPU: does it run?")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all parts together")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="only this part (repeatable)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the parts may import besides what is there")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        print("no CUDA device: nothing to measure here; --quick runs the small forms on a CPU", file=sys.stderr)
        return 2
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="unit_fast_wheels_") as folder:
        extra = Path(folder) if options.wheels else None
        environ = dict(os.environ)
        try:
            if extra:
                unpack(options.wheels, extra)
                environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(extra), environ.get("PYTHONPATH"))))
            todo = steps(out, quick=options.quick, cuda=cuda, only=options.only, extra=extra)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        if not todo:
            print("no benchmark of an op found", file=sys.stderr)
            return 2
        notes = []
        if any(step.name == "pytest" for step in todo) and not has("xdist", extra):
            notes.append("pytest-xdist is not installed: the tests run in one process, which takes minutes longer")
            print(notes[-1], flush=True)
        out.mkdir(parents=True, exist_ok=True)
        try:
            judge([*rows_in(out / RESULTS), *([{**_PROBE, "gpu": torch.cuda.get_device_name()}] if cuda else [])])
        except ValueError as error:
            print(f"--out: {out / RESULTS} is of another card ({error}); give another folder", file=sys.stderr)
            return 2
        done = run(todo, out, 60 * options.minutes, environ=environ, notes=notes)
    goals = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["goals"]
    for goal in goals:
        print(line(goal))
    print(f"{sum(row['status'] == 'ok' for row in done)} of {len(done)} parts ok: {out / SUMMARY}")
    return 0 if all(row["status"] == "ok" for row in done) else 1


def line(goal: Mapping) -> str:
    """A goal and its verdict."""
    target = goal["target"]
    wanted = " or ".join(f"{v:g} ({k})" for k, v in target.items()) if isinstance(target, dict) else f"{target:g}"
    found = (
        goal["why"] if goal["found"] is None else f"{goal['found']:g}" + (f" ({goal['why']})" if goal["why"] else "")
    )
    return f"{goal['verdict']:>12}: {goal['goal']}: {goal['wanted']} {wanted} {goal['unit']}; {found}"


if __name__ == "__main__":
    sys.exit(main())
