"""``unit-fast demo``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unit_fast.commands.shown import show_metrics, show_report
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
    progress: Literal["auto", "plain", "none"] = "auto"
    """auto: one live line on a terminal, else a plain line an interval."""


def run(options: Options) -> int:
    from unit_fast import report
    from unit_fast.data.generated.world import generate
    from unit_fast.recipes import recipe
    from unit_fast.recipes.demo import DEMO_SCALE
    from unit_fast.run.folder import default_folder
    from unit_fast.run.train import train

    name = "demo_quick" if options.quick else "demo"
    out = Path(options.out or "runs/demo")
    if options.out is None and (out / "metrics.jsonl").exists():
        out = default_folder("demo")
    elif (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds a run already; give another folder")
    print(f"generating the world into {out / 'world'}", flush=True)
    generate(out / "world", seed=options.seed, scale=DEMO_SCALE[name])
    config = recipe(name)
    config = dataclasses.replace(
        config, seed=options.seed, data=dataclasses.replace(config.data, root=str(out / "world"))
    )
    run = train(config, out, progress=options.progress, drawn=report.write_samples)
    show_metrics(run.metrics)
    print(f"run folder: {run.folder}")
    show_report(run)
    return run.exit_code
