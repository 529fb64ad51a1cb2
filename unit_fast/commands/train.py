"""``unit-fast train``."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unit_fast.commands.command_line import value_of
from unit_fast.commands.shown import show_metrics, show_report
from unit_fast.config import RunConfig, load_config, to_json
from unit_fast.errors import UserError
from unit_fast.tasks import get_task


@dataclass(kw_only=True)
class Options:
    """Train a recipe. Every field of the configuration is an option too, by its dotted name."""

    data_root: str | None = None
    """Data root in the canonical layout (the same as --data.root)."""
    tasks: str | None = None
    """Train only these tasks of the recipe, e.g. coco,vqa2; their ratios are renormalised."""
    batch: int | None = None
    """Samples per forward pass (the same as --batch-per-process); the effective batch is this times --accumulate."""
    config_file: str | None = None
    """A JSON, YAML or TOML file with settings, e.g. a run's config.json; with --recipe it changes the recipe."""
    out: str | None = None
    """Run folder; default runs/TIME_RECIPE."""
    resume: str | None = None
    """auto goes on in --out; a run or checkpoint goes on from there. Without --recipe its configuration is taken."""
    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint, e.g. optim.lr."""
    stop_at: int | None = None
    """Save and stop after this many steps in all; the schedule still spans --steps."""
    dry_run: bool = False
    """Print the resolved configuration, parameters and memory, and stop."""
    progress: Literal["auto", "plain", "none"] = "auto"
    """auto: one live line on a terminal, else a plain line an interval."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def run(options: Options) -> int:
    config = config_of(options)
    if options.dry_run:
        return _dry_run(config)
    from unit_fast import report
    from unit_fast.run.folder import default_folder
    from unit_fast.run.train import train
    from unit_fast.weights.checkpoint import run_of

    if not config.data.root and not config.data.paths:
        raise UserError("no data: give --data-root ROOT (`unit-fast data generate DIR` makes one to try)")
    if options.resume == "auto" and options.out is None:
        raise UserError("--resume auto: give the run folder with --out DIR")
    out = options.out or (options.resume and run_of(options.resume)) or default_folder(config.recipe)
    run = train(
        config, out, options.resume, stop_at=options.stop_at, allow_changed=options.allow_changed,
        progress=options.progress, drawn=report.write_samples,
    )  # fmt: skip
    show_metrics(run.metrics)
    show_report(run)
    return run.exit_code


def config_of(options: Options) -> RunConfig:
    """The configuration, with what the shortcuts say of it."""
    config = options.config
    if options.data_root:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=options.data_root))
    if options.batch is not None:
        config = dataclasses.replace(config, batch_per_process=options.batch, task_batch={})
    return config


def default(arguments: list[str]) -> Options:
    """What the options change: a recipe, a file, or the configuration of the run to go on with."""
    from unit_fast.recipes import recipe

    name, file = value_of(arguments, "--recipe"), value_of(arguments, "--config-file")
    if file:
        config = load_config(file, recipe(name) if name else None)
    elif name is None and (folder := _folder_to_resume(arguments)):
        config = load_config(folder / "config.json")
    else:
        config = recipe(name or "all8_shared")
    if tasks := value_of(arguments, "--tasks"):
        config = _only(config, tasks)
    return Options(config=config)


def _folder_to_resume(arguments: list[str]) -> Path | None:
    resume, out = value_of(arguments, "--resume"), value_of(arguments, "--out")
    if resume == "auto" and out and (Path(out) / "config.json").is_file():
        return Path(out)
    if resume and resume != "auto":
        from unit_fast.weights.checkpoint import find

        return find(resume, ("last",))
    return None


def _only(config: RunConfig, tasks: str) -> RunConfig:
    """``config`` with some of its tasks."""
    chosen = {get_task(name.strip()).name for name in tasks.split(",") if name.strip()}
    for name in chosen - set(config.model.tasks):
        known = ", ".join(get_task(n).short for n in config.model.tasks)
        raise UserError(f"--tasks: {get_task(name).short} is not in recipe {config.recipe!r}; it has {known}")
    if not chosen:
        raise UserError("--tasks: names no task; e.g. --tasks coco,vqa2")
    kept = {name: task for name, task in config.model.tasks.items() if name in chosen}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tasks=kept),
        ratios={name: ratio for name, ratio in config.ratios.items() if name in chosen},
        task_batch={name: size for name, size in config.task_batch.items() if name in chosen},
    )


def _dry_run(config: RunConfig) -> int:
    from unit_fast.commands.dry_run import plan
    from unit_fast.data.outputs import resolved
    from unit_fast.recipes import batch_note

    config, lines = resolved(config)
    for line in lines:
        print(line, file=sys.stderr)
    found = plan(config)
    print(to_json(config), end="")
    print(f"parameters       {found['parameters']:,}, {found['trainable']:,} trained")
    print(f"batch            {batch_note(config)}")
    fixed, kept = found["weights_gradients_optimizer_gib"], found["activations_gib"]
    print(
        f"memory           at least {found['memory_gib']:.1f} GiB on {found['device']}: {fixed:.1f} GiB of weights, "
        "gradients and optimiser, and for the backward pass of one batch of the largest samples (float32)\n"
        f"                 {', '.join(f'{name} {size:.2f}' for name, size in kept.items())} GiB"
    )
    return 0
