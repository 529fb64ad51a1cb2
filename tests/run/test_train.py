"""A run: its folder, what is logged, evaluated and saved, updates that are not finite."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.small_runs import ALL, log_of, rows, run, saved_step, small_config, summary
from unit_fast.errors import UserError
from unit_fast.run import evaluator
from unit_fast.run.guard import BrokenWeights
from unit_fast.run.log import RunLog
from unit_fast.run.refusals import NonFinite
from unit_fast.run.setup import build
from unit_fast.run.step import Step
from unit_fast.tasks import TASKS
from unit_fast.weights import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def watched(root, tmp_path_factory):
    """A run of all tasks with evaluations, averaged weights and drawn examples."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    drawn = []
    config = small_config(root, *ALL, eval_every=8, save_every=5, keep_checkpoints=2, eval_limit=6, ema_decay=0.5)
    result = run(config, out, drawn=lambda folder, step: drawn.append(step))
    return out, result, drawn


def test_run_folder(watched):
    out, result, drawn = watched
    names = {p.name for p in out.iterdir()}
    expected = {
        "config.json", "env.json", "command.txt", "log.txt", "metrics.jsonl", "metrics.csv", "summary.json",
        "checkpoints", "predictions", "examples.json", "labels.json", "vocab.txt",
    }  # fmt: skip
    assert expected <= names
    assert drawn == [8, 16, 20]
    assert (result.status, result.exit_code) == ("finished", 0)
    config = json.loads((out / "config.json").read_text())
    assert config["started_from"] == {"backbone": "random", "text encoder": "random"}


def test_summary(watched):
    out, result, _ = watched
    found = summary(out)
    assert found["status"] == "finished"
    assert set(found["metrics"]) == set(ALL)
    for task, metrics in found["metrics"].items():
        assert metrics["chance"] is not None
        assert metrics["count"] > 0, task
    assert found["metrics"] == json.loads(json.dumps(result.metrics))
    assert (found["step"], found["seed"], found["threads"]) == (20, 3, 1)
    assert sum(found["samples"].values()) == 40
    assert found["bad_images"] == {"read": found["bad_images"]["read"], "by_task": {}}
    assert 0 < found["train_seconds"] < found["seconds"]
    assert found["environment"]["versions"]["torch"]


def test_metrics_rows(watched):
    out, _, _ = watched
    training = rows(out)
    assert {r["step"] for r in rows(out, "eval")} == {r["step"] for r in rows(out, "eval_ema")} == {8, 16, 20}
    assert len(rows(out, "eval")) == 3 * 8
    assert sum(r["updates"] for r in training) == 20
    for row in training:
        assert set(row) >= {"kind", "step", "task", "loss", "terms", "lr", "grad_norm", "samples_per_s", "data_wait"}
        assert row["loss"] == pytest.approx(sum(row["terms"].values()), rel=1e-5)
    vg = next(r for r in training if r["task"] == "detection_visual_genome")
    assert len(vg["terms"]) == 2 * 4
    table = (out / "metrics.csv").read_text().splitlines()
    assert table[0] == "kind,step,task,name,value"
    assert all(line.count(",") == 4 for line in table)


def test_log_says_what_is_run_without_control_characters(watched):
    out, _, _ = watched
    text = log_of(out)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "effective batch 2 (2 x 1 accumulated), the paper's is 64" in text
    assert "a resumed run is the uninterrupted one bit for bit" in text
    assert "every step runs eagerly, without CUDA graphs: the run is on cpu" in text
    assert text.count("step 20/20") == 1


def test_checkpoints_kept(watched):
    out, _, _ = watched
    parent = out / "checkpoints"
    assert (parent / "last").resolve().name == "step_000020"
    best = summary(out)["best"]
    for link in ("best", "best_ema"):
        assert (parent / link).resolve().name == f"step_{best[link]['step']:06d}"
        found = [r for r in rows(out, "eval" if link == "best" else "eval_ema") if r["step"] == best[link]["step"]]
        values = [r["metrics"].get(TASKS[_key(r["task"])].metric) for r in found]
        assert best[link]["value"] == pytest.approx(sum(values) / len(values))
    steps = {int(p.name[5:]) for p in checkpoint.numbered(parent)}
    # The last two saves, and the best ones: an evaluation that improves saves too, so the one before 20 is 15 or 16.
    assert 20 in steps
    assert steps <= {15, 16, 20, best["best"]["step"], best["best_ema"]["step"]}
    assert steps & {15, 16}
    for folder in checkpoint.numbered(parent):
        checkpoint.verify(folder)


def _key(short):
    return next(t.name for t in TASKS.values() if t.short == short)


def test_averaged_weights_lag_behind(watched):
    out, result, _ = watched
    average = checkpoint.load_weights(out / "checkpoints" / "last" / checkpoint.EMA)
    own = result.model.state_dict()
    assert any(not torch.equal(average[n], own[n]) for n in own)
    name = "classifiers.vqa2.out.weight"
    assert (average[name] - own[name]).abs().max() < 0.1


def test_refused_updates_leave_the_average_alone(root, tmp_path, poisoned):
    """Were it moved on at the refused steps, it would come closer to weights that stand still."""
    config = small_config(root, "sst2", steps=2, ema_decay=0.5, log_every=1)
    run(config, tmp_path / "two")
    poisoned({3, 4})
    run(dataclasses.replace(config, steps=4), tmp_path / "two", resume="auto")
    folders = {f.name: f for f in checkpoint.numbered(tmp_path / "two" / "checkpoints")}
    two, four = (checkpoint.load_weights(folders[f"step_00000{n}"] / checkpoint.EMA) for n in (2, 4))
    assert all(torch.equal(two[name], four[name]) for name in two)


def test_the_best_by_one_task(root, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.7, 0.8])

    def fake(*_, **__):
        return {"sst2": {"accuracy": next(accuracies), "chance": 0.5, "count": 1}, "coco": {"detection_mean_ap": 1.0}}

    monkeypatch.setattr(evaluator, "evaluate", fake)
    config = small_config(root, "sst2", "coco", criterion="sst2", eval_every=5)
    run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["best"]["best"] == {"step": 10, "value": 0.9, "criterion": "sst2"}
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_000010"
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step_000020"


def test_a_criterion_that_is_not_trained_is_replaced_and_said_so(root, tmp_path):
    result = run(small_config(root, "sst2", steps=2, criterion="vqa2", eval_every=-1), tmp_path / "run")
    assert result.config.criterion == "mean"
    assert result.metrics == {}, "never evaluated"
    assert "criterion vqa2 is not trained" in log_of(tmp_path / "run")


def test_a_missing_validation_split_is_one_line(root, tmp_path):
    other = tmp_path / "world"
    shutil.copytree(root, other)
    (other / "snli_ve" / "snli_ve_dev.jsonl").unlink()
    config = small_config(other, "snli_ve", "sst2", eval_every=4, eval_limit=4, steps=8)
    result = run(config, tmp_path / "run")
    assert set(result.metrics) == {"sst2"}
    assert log_of(tmp_path / "run").count("will not be evaluated") == 1
    on_train = run(dataclasses.replace(config, eval_split="train"), tmp_path / "train")
    assert set(on_train.metrics) == {"snli_ve", "sst2"}


def test_a_failed_evaluation_does_not_end_training(root, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(evaluator, "evaluate", fail)
    config = small_config(root, "sst2", eval_every=5)
    with pytest.raises(RuntimeError, match="no such luck"):
        run(config, tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["step"], found["status"]) == (20, "failed")
    assert log_of(tmp_path / "run").count("failed: no such luck") == 4
    assert saved_step(tmp_path / "run") == 20


def test_losses_are_read_once_an_interval(root, tmp_path, monkeypatch):
    reads, real = [], RunLog.flush
    monkeypatch.setattr(RunLog, "flush", lambda self: (reads.append(len(self.pending)), real(self))[1])
    run(small_config(root, "sst2", log_every=7), tmp_path / "run")
    assert reads == [7, 7, 6]


# ----------------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the images, or the losses, of chosen steps or of a task NaN. Returns the steps it has poisoned."""

    def arm(steps=(), task=None):
        real, done = Step.__call__, []

        def poison(self, name, batches):
            step, model = self.state.step + 1, self.state.model
            if step in steps or name == task:
                done.append(step)
                for micro in batches:
                    if micro.image is not None:
                        micro.image = micro.image * math.nan
                    else:
                        model.losses = functools.partial(_once, model, model.losses)
            return real(self, name, batches)

        monkeypatch.setattr(Step, "__call__", poison)
        return done

    return arm


def _once(model, losses, *a, **k):
    model.losses = losses
    return {n: v * math.nan for n, v in losses(*a, **k).items()}


def test_bad_updates_are_reported_and_skipped(root, tmp_path, poisoned):
    """Two in a row, twice: no reason to end."""
    done = poisoned({4, 5, 7, 8})
    assert run(small_config(root), tmp_path / "run").status == "finished"
    assert done == [4, 5, 7, 8]
    text = log_of(tmp_path / "run")
    for step in done:
        assert f"not finite, nothing was changed: step {step}, " in text
        dumped = json.loads((tmp_path / "run" / "nonfinite" / f"step_00000{step}.json").read_text())
        assert dumped["request"]["micro"][0][0]["index"] >= 0
        assert str(dumped["sample_ids"][0]) in text
    assert summary(tmp_path / "run")["nonfinite_steps"] == sum(r["nonfinite"] for r in rows(tmp_path / "run")) == 4
    averaged = [r for r in rows(tmp_path / "run") if r["updates"] > r["nonfinite"]]
    assert all(v is not None for r in averaged for v in r["terms"].values())


def test_three_in_a_row_end_the_run(root, tmp_path, poisoned):
    poisoned({8, 9, 10, 11, 12})
    with pytest.raises(NonFinite, match=r"3 updates in a row were not finite, the last: step 10, \w+, samples .*"):
        run(small_config(root), tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"]) == ("nonfinite", 3)
    for folder in checkpoint.numbered(tmp_path / "run" / "checkpoints"):
        for name, value in checkpoint.load_weights(folder / checkpoint.WEIGHTS).items():
            assert value.isfinite().all(), name


def test_a_task_that_cannot_be_trained_ends_the_run(root, tmp_path, poisoned):
    """Also where updates of another task, which are fine, lie between, and where the run was stopped between."""
    poisoned(task="glue_qqp")
    config = small_config(root, "sst2", "qqp", steps=60, ratios={"glue_sst2": 0.8, "glue_qqp": 0.2}, log_every=1)
    many = r"3 updates of glue_qqp in a row were not finite, the last: step \d+, glue_qqp"
    with pytest.raises(NonFinite, match=many):
        run(config, tmp_path / "whole")
    found = summary(tmp_path / "whole")
    assert (found["status"], found["exit_code"], found["nonfinite_steps"]) == ("nonfinite", 3, 3)
    assert (tmp_path / "whole" / "checkpoints" / "last").exists()
    refused = [r for r in rows(tmp_path / "whole") if r["nonfinite"]]
    assert refused[-1]["step"] - refused[0]["step"] > 2, "armed: they did not follow each other"
    run(config, tmp_path / "parts", stop_at=found["step"] - 1)
    with pytest.raises(NonFinite, match=many):
        run(config, tmp_path / "parts", resume="auto")
    assert summary(tmp_path / "parts")["step"] == found["step"]


def test_a_run_does_not_finish_with_a_task_that_was_never_trained(root, tmp_path, poisoned):
    """Too few updates for three in a row."""
    poisoned(task="glue_qqp")
    config = small_config(root, "sst2", "qqp", steps=9, ratios={"glue_sst2": 0.8, "glue_qqp": 0.2})
    with pytest.raises(NonFinite, match=r"not one update of glue_qqp \([12]\) was finite"):
        run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["exit_code"] == 3
    assert saved_step(tmp_path / "run") == 9


def test_weights_that_an_update_broke_are_not_saved(root, tmp_path):
    """Loss and gradient were finite, the update was not: the last checkpoint stays the last good one."""
    config = small_config(root, "sst2", steps=4, save_every=2, optim={"warmup_steps": 0})
    run(config, tmp_path / "run", stop_at=2)
    wild = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e38, lr_backbone=1e38))
    with pytest.raises(BrokenWeights, match=r"tensors of the weights are not finite after step \d \(first: "):
        run(wild, tmp_path / "run", resume="auto", allow_changed=["optim"])
    assert summary(tmp_path / "run")["exit_code"] == 3
    parent = tmp_path / "run" / "checkpoints"
    assert (parent / "last").resolve().name == "step_000002"
    assert [f.name for f in checkpoint.numbered(parent)] == ["step_000002"]


def test_weights_that_were_not_finite_before_are_told(root, tmp_path):
    config = small_config(root, "sst2", "qqp", steps=1, ratios={"glue_sst2": 1.0, "glue_qqp": 0.0})
    model, _, _ = build(config, torch.device("cpu"))
    with torch.no_grad():
        model.classifiers["glue_qqp"].out.weight[0, 0] = math.nan
    checkpoint.save_weights(tmp_path / "weights", model, config)
    run(dataclasses.replace(config, init_from=str(tmp_path / "weights")), tmp_path / "run")
    text = log_of(tmp_path / "run")
    assert "1 tensors of the weights hold NaN or infinity: classifiers.glue_qqp.out.weight" in text


# ------------------------------------------------------------------------------------------------- it does train


def test_the_loss_goes_down(root, tmp_path):
    config = small_config(root, "vqa2", steps=80, batch_per_process=4, optim={"lr": 3e-3, "max_norm": 1.0})
    run(config, tmp_path / "run")
    losses = [r["loss"] for r in rows(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_more_than_one_process_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="more than one process is not supported yet"):
        run(small_config(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- real samples

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "realdata"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not here")
def test_all_eight_tasks_train_on_real_samples(tmp_path):
    config = small_config(REAL, *ALL, steps=40, eval_every=0, eval_limit=4, data={"engine": "auto"})
    result = run(config, tmp_path / "run")
    assert result.status == "finished"
    assert {r["task"] for r in rows(tmp_path / "run")} == set(TASKS)
    assert all(r["loss"] is not None for r in rows(tmp_path / "run"))
    assert set(result.metrics) >= {"coco", "qnli", "mnli", "qqp", "sst2"}
