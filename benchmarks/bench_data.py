"""Loading images for training: our loader against torchvision v2 and Pillow loaders, in images a second.

``python -m benchmarks.bench_data`` writes a data root of generated photographs at COCO's sizes, ``--data-root ROOT``
reads real ones. Two cases: detection training (SPEC 4.3, COCO) and VQA v2 (800 / 1333, with questions). Every provider
is a process of its own, runs with the number of workers that serves it best, and reads the same batches.

``--tune`` looks for the best settings of our loader instead.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from benchmarks.data import rounds
from benchmarks.data.child import Child
from benchmarks.data.gate import ALLOWED_MEAN, ALLOWED_P999, decoders, judge, reference
from benchmarks.data.providers import TASKS, Spec
from benchmarks.data.root import write_root
from benchmarks.runner import results
from benchmarks.runner.cases import Case
from benchmarks.runner.machine import environment, version_of
from benchmarks.runner.rows import rows_of
from unit_fast.errors import UserError

NAME = "bench_data"
IMAGES, QUICK_IMAGES = 256, 32
"""Generated photographs."""
GATE_BATCHES = 4


# ------------------------------------------------------------------------------------------------------------ a case


@dataclasses.dataclass
class CaseRun:
    """One case on its way through first pass, gate, choice of workers, rounds, memory."""

    args: argparse.Namespace
    name: str
    spec: Spec
    source: str
    console: Console
    extra: dict[str, dict] = dataclasses.field(default_factory=dict)
    """Provider -> fields of its row."""

    def of(self, provider: str, workers: int = 0) -> Spec:
        return dataclasses.replace(self.spec, provider=provider, workers=workers)

    def prepare(self, providers: Sequence[str]) -> bool:
        """First pass, gate and choice of workers. False, without figures, where a provider is wrong."""
        args, children, fine = self.args, {}, True
        expected = reference(self.spec, 1 if args.quick else GATE_BATCHES)
        try:
            for provider in providers:
                child = children[provider] = Child(rounds.MODULE, args.threads)
                self.extra[provider] = {}
                spec = self.of(provider, min(2, args.threads))
                if provider == "ours" and rounds.has_dali():
                    run = rounds.first_pass(child, spec)
                    self.extra[provider] |= {
                        "first_pass_images_per_s": round(run["images"] / run["seconds"], 2),
                        "first_pass_images": run["images"],
                        "first_pass_checked": run["checked"],
                    }
                child.ask("open", **dataclasses.asdict(spec))
                path = Path(self.spec.cache_dir) / f"{provider}.pt"
                child.ask("save", count=len(expected), path=str(path))
                child.ask("close")
                found = torch.load(path, weights_only=True)
                path.unlink()
                good, line = judge(expected, found)
                fine &= good
                self._say(f"gate {self.name}: {provider} {line} (allowed {ALLOWED_MEAN:g}, {ALLOWED_P999:g})")
            if not fine:
                return False
            for line in decoders(self.spec):
                self._say(line)
            for provider in providers:
                counts = rounds.counts_of(provider, args.threads)
                speeds = rounds.pick(children[provider], self.of(provider), counts, args.batches)
                best = max(speeds, key=speeds.get)
                self.extra[provider] |= {"workers": best, "tried": {str(n): round(v, 1) for n, v in speeds.items()}}
        finally:
            for child in children.values():
                child.__exit__()
        return True

    def measure(self) -> list[dict]:
        """Rounds, memory and rows."""
        args, children = self.args, {}
        stamp = environment()
        stamp["versions"] |= {package: version_of(package) for package in ("pillow", "nvidia-dali-cuda130")}
        load = [os.getloadavg()[0]]
        try:
            for provider, extra in self.extra.items():
                children[provider] = Child(rounds.MODULE, args.threads)
                children[provider].ask("open", **dataclasses.asdict(self.of(provider, extra["workers"])))
            settle = max(rounds.spare(extra["workers"], self.spec.prefetch) for extra in self.extra.values())
            answers = rounds.rounds_of(children, settle, args.batches, args.rounds, args.warmup)
            load.append(os.getloadavg()[0])
            memory = {}
            for name, child in children.items():
                peak = child.peak_while("run", settle=0, count=settle + args.batches)
                memory[name] = round(peak / 2**30, 3)
            if args.step and self.name == "detection_train":
                # settle again: the loader has read ahead while it waited for its turn
                step = children["ours"].ask("train", settle=settle if args.device == "cuda" else 1, count=args.batches)
                self.extra["ours"] |= {
                    "data_wait_percent": round(100 * step["waited"] / step["seconds"], 2),
                    "step_images_per_s": round(step["images"] / step["seconds"], 2),
                }
        finally:
            for child in children.values():
                child.__exit__()
        case = Case(
            name=self.name, shape=f"{self.spec.batch} images a batch, {self.source}", device=args.device,
            providers={}, reference="", tolerances={},
        )  # fmt: skip
        times = {name: [{"total": 1e3 * a["seconds"] / args.batches} for a in found] for name, found in answers.items()}
        rows = rows_of(case, times, memory, stamp, NAME)
        for row in rows:
            provider = row["provider"]
            row |= {"data_wait_percent": None, "step_images_per_s": None, "prefetch": self.spec.prefetch}
            row |= {"load": [round(value, 2) for value in load], "source": self.source}
            row |= rounds.figures(answers[provider], answers.get(rounds.BEST_PEER)) | self.extra[provider]
        return rows

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------- report


def table_of(rows: Sequence[dict]) -> Table:
    first = rows[0]
    table = Table(title=f"{first['case']}: {first['shape']}", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("provider", no_wrap=True)
    for title in ("workers", "images/s", "p20", "p80", f"vs {rounds.BEST_PEER}", "CPU ms/image", "GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        ratio = row["vs_torchvision_v2"]
        table.add_row(
            row["provider"], str(row["workers"]),
            *(f"{row[key]:.1f}" for key in ("images_per_s", "images_per_s_p20", "images_per_s_p80")),
            "-" if ratio is None else f"{ratio:.2f}x", f"{row['cpu_ms_per_image']:.2f}",
            f"{row['peak_memory_gib']:.2f}",
        )  # fmt: skip
    return table


def notes(rows: Sequence[dict]) -> list[str]:
    """Lines under a table."""
    lines = []
    for row in rows:
        tried = ", ".join(f"{count}: {speed:g}" for count, speed in row["tried"].items())
        lines.append(f"{row['provider']}: images/s by workers in the short runs: {tried}")
    for row in rows:
        if "first_pass_images_per_s" in row:
            lines.append(
                f"{row['provider']}: {row['first_pass_images_per_s']:.1f} images/s in a first pass, the loader's start "
                f"included; {row['first_pass_checked']} of {row['first_pass_images']} images were decoded with Pillow "
                "too, to check them"
            )
        if row["data_wait_percent"] is not None:
            lines.append(
                f"{row['provider']}: a real training loop waits for its data {row['data_wait_percent']:.1f} % of the "
                f"time at {row['step_images_per_s']:.1f} images/s ({row['device']})"
            )
    lines.append(f"load average of the machine before and after the rounds: {rows[0]['load']}")
    return lines


def _box(args: argparse.Namespace, stamp: Mapping) -> Panel:
    counts = ", ".join(map(str, rounds.counts_of(rounds.BEST_PEER, args.threads)))
    lines = [
        "ours: our loader (DALI decodes, our threads do the rest). ours_whole: DALI does all. ours_torchvision: our "
        "reference engine." if rounds.has_dali() else "DALI is not installed: ours is our torchvision engine.",
        "torchvision_v2: decode_image, transforms v2 on uint8 tensors. pil_detr: Pillow, DETR's transforms. Both: "
        "DataLoader, padding collate; annotations, boxes and the order of reading (grouped by size) are given to them.",
        "Each provider is a process with its workers; while one is measured the others have read ahead and are idle "
        "(their CPU time stands still). What one has ready is read before its clock starts.",
        f"Workers: the best of {counts} in short runs (DALI's threads: not 0).",
        f"Rounds: {args.rounds} interleaved after {args.warmup}; median (p20, p80) of {args.batches} batches. The "
        f"ratio is the median of the rounds' ratios. Files are in the page cache.",
        "CPU: of the process and all its workers. GiB: the largest total of them, each page once, in a run apart.",
        "Gate: boxes, labels, masks and texts equal; pixels within 1 step of 255 on average and 8 at 99.9 %.",
        f"Machine: {stamp['gpu'] or stamp['cpu']}; {args.threads} of {stamp['cores']} cores; torch "
        f"{stamp['versions']['torch']}; commit {stamp['commit']}.",
    ]  # fmt: skip
    return Panel("\n".join(lines), title="Loading images for training", title_align="left")


# --------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0))
    out = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    out.add_argument("--data-root", type=Path, help="real photographs; default: generated ones")
    out.add_argument("--json", type=Path, help="append the rows to this file instead of benchmarks/results/")
    out.add_argument("--no-results", action="store_true", help="write no results file")
    out.add_argument("--quick", action="store_true", help="small images, two rounds: does it run? Keeps no results")
    out.add_argument("--tune", action="store_true", help="look for the best settings of our loader instead")
    out.add_argument("--threads", type=int, default=cores, help="CPU cores that each provider may use")
    out.add_argument("--case", action="append", choices=list(TASKS), help="only this case (repeatable)")
    out.add_argument("--provider", action="append", help="only this provider beside ours (repeatable)")
    out.add_argument("--batch", type=int, default=8, help="images of a batch")
    out.add_argument("--batches", type=int, default=16, help="batches of a round")
    out.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    out.add_argument("--warmup", type=int, default=1, help="untimed rounds")
    out.add_argument(
        "--step", action=argparse.BooleanOptionalAction, default=None,
        help="how long real updates wait for data; default: where there is a GPU",
    )  # fmt: skip
    return out


def _root(args: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """The data root, and what it is in words."""
    if args.data_root is not None:
        return args.data_root.expanduser().absolute(), "real photographs"
    images = QUICK_IMAGES if args.quick else IMAGES
    write_root(folder, images, small=args.quick)
    return folder, f"{images} generated photographs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print. Exit status 1 where the gate refused a provider (no figure is printed), 2 on a wrong
    option or data root."""
    options = parser()
    args = options.parse_args(arguments)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.step = args.device == "cuda" and not args.tune if args.step is None else args.step
    if args.quick:
        args.rounds, args.batches = min(args.rounds, 2), min(args.batches, 3)
    known = rounds.providers_of()
    for name in args.provider or ():
        if name not in known:
            print(f"--provider: unknown or not usable here {name!r}; known: {', '.join(known)}", file=sys.stderr)
            return 2
    if args.tune and (args.json or args.step or args.no_results or not set(args.provider or ()) <= set(rounds.OURS)):
        print("--tune prints settings of our loader: it takes no peers, --json, --step", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0))
    if not 1 <= args.threads <= cores or min(args.rounds, args.batches, args.batch) < 1 or args.warmup < 0:
        print(
            f"--threads must be 1 to {cores} here, --rounds, --batches and --batch at least 1, --warmup at least 0",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="unit_fast_bench_data_") as folder:
        try:
            return _run_all(args, known, Path(folder))
        except UserError as error:
            print(error, file=sys.stderr)
            return 2


def _run_all(args: argparse.Namespace, known: list[str], folder: Path) -> int:
    console = Console(width=max(100, Console().width))
    root, source = _root(args, folder / "root")
    chosen = [name for name in known if not args.provider or name == "ours" or name in args.provider]
    runs = []
    for name in args.case or TASKS:
        cache = folder / f"cache_{name}"
        cache.mkdir()
        spec = Spec(
            provider="ours", case=name, root=str(root), cache_dir=str(cache), workers=0, batch=args.batch,
            quick=args.quick, device=args.device,
        )  # fmt: skip
        runs.append(CaseRun(args, name, spec, source, console))
    if args.tune:
        from benchmarks.data.tune import tune

        tune(args, [run.spec for run in runs], console)
        return 0
    console.print(_box(args, environment()))
    for run in runs:
        if not run.prepare(chosen):
            console.print(f"[bold red]{run.name}: a provider does not equal the reference: no figures.[/]")
            return 1
        rows = run.measure()
        console.print(table_of(rows))
        for line in notes(rows):
            console.print(line, highlight=False, soft_wrap=True)
        results.keep(rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
