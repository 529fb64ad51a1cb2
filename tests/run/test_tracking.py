"""Experiment trackers get the rows of metrics.jsonl, and cannot end a run."""

import importlib.util
import json
import shutil

import pytest

from tests.small_runs import log_of, rows, run, small_config
from unit_fast.errors import UserError
from unit_fast.run import tracking
from unit_fast.run.tracking import scalars

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_of_figures():
    row = {
        "kind": "train", "step": 4, "task": "detection_coco", "loss": 2.5, "lr": 0.1, "samples_per_s": 8.0,
        "terms": {"train/detection_coco/loss_ce": 1.5, "train/detection_coco/loss_ce_0": 1.0}, "grad_norm": None,
        "run_seconds": 1.0, "time": 2.0, "updates": 3,
    }  # fmt: skip
    assert scalars(row) == {
        "train/coco/loss": 2.5, "train/lr": 0.1, "train/samples_per_s": 8.0, "train/coco/loss_ce": 1.5,
        "train/coco/loss_ce_0": 1.0, "train/coco/updates": 3,
    }  # fmt: skip
    assert scalars({"kind": "eval_ema", "step": 4, "task": "sst2", "metrics": {"accuracy": 0.5}}) == {
        "eval_ema/sst2/accuracy": 0.5
    }


def events(folder) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def expected(folder) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in scalars(row).items():
            found.setdefault(name, {})[row["step"]] = value
    return found


def test_tensorboard_holds_the_rows_also_of_a_run_that_was_killed_and_resumed(root, tmp_path):
    pytest.importorskip("tensorboard")
    config = small_config(root, "coco", "sst2", steps=8, log_every=1, save_every=4, eval_every=4, eval_limit=2,
                          track=("tensorboard",))  # fmt: skip
    run(config, tmp_path / "run", stop_at=6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000006")  # as after a kill: rows without their weights
    run(config, tmp_path / "run", "auto")
    shown, wanted = events(tmp_path / "run" / "tensorboard"), expected(tmp_path / "run")
    assert set(shown) == set(wanted)
    assert {5, 6} <= {step for values in wanted.values() for step in values}, "armed: steps were made twice"
    assert {"train/coco/loss", "train/lr", "eval/coco/detection_mean_ap", "eval/sst2/accuracy"} <= set(shown)
    for tag, values in wanted.items():
        assert shown[tag] == pytest.approx(values, rel=1e-6), tag


def test_wandb_keeps_a_run_without_a_network(root, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(root, "sst2", steps=4, log_every=2, track=("wandb",))
    run(config, tmp_path / "run", stop_at=2)
    first = json.loads((tmp_path / "run" / tracking.KEPT).read_text())["wandb"]
    run(config, tmp_path / "run", "auto")
    kept = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem for path in kept} == {f"run-{first}"}, "the resumed run is the same one"
    content = b"".join(path.read_bytes() for path in kept)
    for name in (b"train/sst2/loss", b"train/lr", b"unit_fast"):
        assert name in content


def test_trackio_has_the_figures(root, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", f"unit-fast-{tmp_path.name}")
    run(small_config(root, "sst2", steps=4, log_every=2, track=("trackio",)), tmp_path / "run")
    name = json.loads((tmp_path / "run" / tracking.KEPT).read_text())["trackio"]
    (found,) = trackio.Api().runs(f"unit-fast-{tmp_path.name}")
    assert found.name == f"run-{name}"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_anything_is_done(root, tmp_path, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    with pytest.raises(UserError, match=f"track: {name} is not installed; pip install {name}"):
        run(small_config(root, "sst2", steps=1, track=(name,)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


class Broken:
    """A tracker whose service has gone."""

    def __init__(self, *_):
        self.rows = self.closed = 0

    def scalars(self, *_):
        self.rows += 1
        if self.rows > 1:
            raise ConnectionError("no service")

    def close(self):
        self.closed += 1


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(root, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.KINDS, "tensorboard", Broken)
    monkeypatch.setattr(tracking, "check", lambda names: None)
    config = small_config(root, "sst2", steps=4, log_every=1, track=("tensorboard",))
    assert run(config, tmp_path / "run").status == "finished"
    assert len(rows(tmp_path / "run")) == 4
    assert log_of(tmp_path / "run").count("tensorboard takes no more rows (ConnectionError: no service)") == 1


def test_one_that_cannot_start_ends_the_run_before_its_first_step(root, tmp_path, monkeypatch):
    opened = Broken()
    monkeypatch.setitem(tracking.KINDS, "tensorboard", lambda *_: opened)
    monkeypatch.setattr(tracking, "check", lambda names: None)
    monkeypatch.setitem(tracking.KINDS, "wandb", lambda *_: 1 / 0)
    config = small_config(root, "sst2", steps=1, track=("tensorboard", "wandb"))
    with pytest.raises(UserError, match="track: wandb could not be started .division by zero.; WANDB_MODE=offline"):
        run(config, tmp_path / "run")
    assert opened.closed == 1
    assert "step 1/1" not in log_of(tmp_path / "run")
