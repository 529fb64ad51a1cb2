"""``unit-fast demo``."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unit_fast import threads
from unit_fast.commands.shown import check_threads, show_metrics, show_report, take_threads
from unit_fast.errors import UserError


@dataclass(kw_only=True)
class Options:
    """Generate a world of eight data sets, train one model on all of them, evaluate it and write a report."""

    quick: bool = False
    """About a minute: a smaller world and fewer steps."""
    out: str | None = None
    """Run folder; default runs/demo, or runs/TIME_demo where that is taken."""
    seed: int = 0
    """Seed of the world and of the training."""
    threads: int = 0
    """CPU threads; 0 takes OMP_NUM_THREADS, else 1: the model is so small that a second one gains little, and one never
    waits for another. Results depend on it."""
    progress: Literal["auto", "plain", "none"] = "auto"
    """auto: one live line on a terminal, else a plain line an interval."""


def run(options: Options) -> int:
    from unit_fast.data.generated.world import generate
    from unit_fast.recipes import recipe
    from unit_fast.recipes.demo import DEMO_SCALE
    from unit_fast.run.folder import default_folder

    name = "demo_quick" if options.quick else "demo"
    out = Path(options.out or "runs/demo")
    if options.out is None and (out / "metrics.jsonl").exists():
        out = default_folder("demo")
    elif (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds a run already; give another folder")
    check_threads(options.threads)
    config = recipe(name)
    count = options.threads or (0 if os.environ.get("OMP_NUM_THREADS", "").strip() else config.threads)
    # a process beside the training one that reads ahead, where it has a core to run on
    workers = config.data.workers if threads.usable_cores() > 1 else 0
    config = dataclasses.replace(
        config,
        seed=options.seed,
        threads=count,
        data=dataclasses.replace(config.data, root=str(out / "world"), workers=workers),
    )
    print(f"generating the world into {out / 'world'}", flush=True)
    generate(out / "world", seed=options.seed, scale=DEMO_SCALE[name])

    from unit_fast import report
    from unit_fast.run.train import train

    take_threads(config.device, config.threads)
    run = train(config, out, progress=options.progress, drawn=report.write_samples)
    show_metrics(run.metrics)
    print(f"run folder: {run.folder}")
    show_report(run)
    return run.exit_code
