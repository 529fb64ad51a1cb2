"""``unit-fast train``."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unit_fast.commands.command_line import given, value_of
from unit_fast.commands.shown import show_metrics, show_report, take_threads
from unit_fast.config import RunConfig, load_config
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

COMMON = (
    "recipe", "data_root", "tasks", "batch", "steps", "optim.lr", "init_from", "out", "resume", "eval_every", "device",
    "threads", "seed", "config_file", "data.columns", "dry_run",
)  # fmt: skip
"""What most runs need."""


@dataclass(kw_only=True)
class Options:
    """Train a recipe. Every field of the configuration is an option too, by its dotted name."""

    data_root: str | None = None
    """Data root in the canonical layout, or a folder of your own data (the same as --data.root)."""
    tasks: str | None = None
    """Train only these tasks of the recipe, e.g. coco,vqa2; their ratios are renormalised."""
    batch: int | None = None
    """Samples per forward pass (the same as --batch-per-process); --accumulate follows where a recipe says how many
    samples an update has, 64 for the paper's."""
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
    """Print the resolved configuration, parameters and memory, look at data, weights and --out as the run would, and
    stop."""
    measure: bool = False
    """With --dry-run: train some seconds on each task and print the steps an hour."""
    progress: Literal["auto", "plain", "none"] = "auto"
    """auto: one live line on a terminal, else a plain line an interval."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def run(options: Options) -> int:
    config = config_of(options)
    if options.measure and not options.dry_run:
        raise UserError("--measure: give it with --dry-run")
    if options.dry_run:
        take_threads(config.device, config.threads, keep=options.resume is not None)
        from unit_fast.commands import dry_run

        return dry_run.run(config, _out(options, config), options.resume, options.allow_changed, options.measure)
    from unit_fast import report
    from unit_fast.run.train import train

    check_data(config)
    # a resumed run goes on with as many threads as it began with, or its bits would be others
    take_threads(config.device, config.threads, keep=options.resume is not None)
    run = train(
        config, _out(options, config), options.resume, stop_at=options.stop_at, allow_changed=options.allow_changed,
        progress=options.progress, drawn=report.write_samples,
    )  # fmt: skip
    show_metrics(run.metrics)
    show_report(run)
    return run.exit_code


def check_data(config: RunConfig) -> None:
    """``UserError`` where the configuration names no data."""
    if not config.data.root and not config.data.paths:
        raise UserError("no data: give --data-root ROOT (`unit-fast data generate DIR` makes one to try)")


def _out(options: Options, config: RunConfig):
    """The run folder."""
    from unit_fast.run.folder import default_folder
    from unit_fast.weights.checkpoint import run_of

    if options.resume == "auto" and options.out is None:
        raise UserError("--resume auto: give the run folder with --out DIR")
    return options.out or (options.resume and run_of(options.resume)) or default_folder(config.recipe)


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
    return Options(config=_to_follow(config, arguments))


def _to_follow(config: RunConfig, arguments: list[str]) -> RunConfig:
    """``config`` without the batch or the accumulation where only the other is given: it follows then."""
    batch, accumulate = given(arguments, "--batch", "--batch-per-process"), given(arguments, "--accumulate")
    target = value_of(arguments, "--target-batch")
    if batch and accumulate and target:
        raise UserError("--target-batch: follows from --batch and --accumulate; give at most two of the three")
    if target and target.isdecimal():  # the parser refuses what is no number
        config = dataclasses.replace(config, target_batch=int(target))
    if not config.target_batch or batch and accumulate or not (batch or accumulate or target):
        return config
    return dataclasses.replace(config, **{"batch_per_process" if accumulate and not batch else "accumulate": 0})


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
