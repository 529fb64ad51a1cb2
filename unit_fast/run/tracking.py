"""Experiment trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, each through its public API."""

import importlib.util
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from unit_fast.config import RunConfig, to_dict, to_json
from unit_fast.errors import UserError, printable
from unit_fast.files import replace
from unit_fast.tasks import get_task

KEPT = "tracking.json"
"""In the run folder: what the trackers call the run, so that a resumed one goes on in it."""

_OF_THE_RUN = ("lr", "samples_per_s", "data_wait", "loader_images_per_s")
"""Figures of a row that are not of its task alone."""


class Tracker(Protocol):
    """What takes the rows."""

    def scalars(self, step: int, time: float, values: dict[str, float]) -> None:
        """Take what was found after ``step`` updates at ``time``, seconds since 1970."""

    def close(self) -> None:
        """Write out what is left."""


def check(names: Sequence[str]) -> None:
    """``UserError`` where the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; pip install {name}, or leave --track {name} out")


def open_trackers(names: Sequence[str], folder: Path, config: RunConfig, step: int) -> dict[str, Tracker]:
    """Tracker by name, for the run in ``folder`` that goes on after ``step``. ``UserError`` where one cannot start."""
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = KINDS[name](folder, config, step)
        except Exception as error:
            for tracker in opened.values():
                tracker.close()
            hint = "; WANDB_MODE=offline keeps everything in the run folder" if name == "wandb" else ""
            raise UserError(
                f"track: {name} could not be started ({printable(error)}){hint}; or leave --track {name} out"
            ) from error
    return opened


def scalars(row: dict) -> dict[str, float]:
    """The numbers of a row of ``metrics.jsonl`` by name: ``train/coco/loss``, ``train/lr``, ``eval/coco/AP50``."""
    kind, task = row["kind"], get_task(row["task"]).short
    figures = {k: v for k, v in row.items() if k not in ("step", "time", "run_seconds")}
    figures |= {name.rpartition("/")[2]: value for name, value in row.get("terms", {}).items()}
    figures |= row.get("metrics", {})
    return {
        f"{kind}/{name}" if name in _OF_THE_RUN else f"{kind}/{task}/{name}": value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run folder, for ``tensorboard --logdir RUNS``."""

    def __init__(self, folder: Path, config: RunConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Of an event that a resumed run makes again only the new one is shown.
        purge = {"purge_step": step + 1} if step else {}
        self.writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10, **purge)
        if not step:
            self.writer.add_text("config", "".join(f"    {line}\n" for line in to_json(config).splitlines()))

    def scalars(self, step: int, time: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=time)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases, its files in ``wandb/`` of the run folder; ``WANDB_MODE=offline`` sends nothing."""

    def __init__(self, folder: Path, config: RunConfig, step: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "unit_fast"), name=folder.resolve().name, dir=str(folder),
            id=_kept_id(folder, "wandb"), resume="allow", config=to_dict(config),
            settings=wandb.Settings(console="off"),  # it would take the live line for output
        )  # fmt: skip
        # Its own counter of steps cannot go back, as a resumed run does.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, time: float, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of Trackio, in the project ``unit_fast`` (or ``TRACKIO_PROJECT``) on this machine."""

    def __init__(self, folder: Path, config: RunConfig, step: int):
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "unit_fast"),
            name=f"{folder.resolve().name}-{_kept_id(folder, 'trackio')}", resume="allow", config=to_dict(config),
        )  # fmt: skip

    def scalars(self, step: int, time: float, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def _kept_id(folder: Path, name: str) -> str:
    """What tracker ``name`` calls the run in ``folder``: made once."""
    try:
        known = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or not isinstance(known.get(name), str):
        known = {**(known if isinstance(known, dict) else {}), name: uuid.uuid4().hex[:8]}
        replace(folder / KEPT, json.dumps(known, indent=1) + "\n")
    return known[name]
