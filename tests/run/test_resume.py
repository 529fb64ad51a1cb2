"""Exact resumption: 20 updates = 10 + resume + 10, bit for bit on one thread."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from tests.small_runs import accept, log_of, rows, run, saved_step, small_config, state_hash, summary, with_data
from unit_fast.errors import UserError
from unit_fast.run.evaluator import Evaluator
from unit_fast.run.signals import Interrupted
from unit_fast.run.state import State
from unit_fast.weights import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(out):
    """Step, task and loss of every logged update: compared first, since it says where two runs part."""
    return [(r["step"], r["task"], r["loss"]) for r in rows(out)]


VARIANTS = {
    "skip": {"optim": {"unused": "skip"}},
    "graph": {"optim": {"unused": "graph"}},
    "update_all": {"optim": {"unused": "update_all"}},
    "ema": {"ema_decay": 0.9},
    "accumulate": {"accumulate": 2},
    "frozen": {"freeze": ("image",)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_is_ten_and_ten(root, tmp_path, variant):
    config = small_config(root, log_every=1, **VARIANTS[variant])
    run(config, tmp_path / "whole")
    assert run(config, tmp_path / "parts", stop_at=10).exit_code == 75
    assert run(config, tmp_path / "parts", resume="auto").exit_code == 0
    assert samples(tmp_path / "parts") == samples(tmp_path / "whole")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")


def test_dropout_and_seed_matter(root, tmp_path):
    """The negative control: what the hashes are of does change."""
    config = small_config(root)
    run(config, tmp_path / "a")
    run(dataclasses.replace(config, seed=4), tmp_path / "b")
    assert state_hash(tmp_path / "a")["model.safetensors"] != state_hash(tmp_path / "b")["model.safetensors"]
    run(config, tmp_path / "c", stop_at=10)
    torch.manual_seed(99)  # what a resumed run must not depend on
    path = tmp_path / "c" / "checkpoints" / "last"
    tensors = checkpoint.load_weights(path / checkpoint.STATE)
    tensors["rng/cpu"] = torch.get_rng_state()
    safetensors.torch.save_file(tensors, path / checkpoint.STATE)
    accept(path)
    run(config, tmp_path / "c", resume="auto")
    assert state_hash(tmp_path / "a")["model.safetensors"] != state_hash(tmp_path / "c")["model.safetensors"]


def test_cut_into_many_pieces(root, tmp_path):
    """In a fresh folder, at the first update, twice in a row, just after an evaluation, and at the last."""
    config = small_config(root, eval_every=6, eval_limit=4)
    run(config, tmp_path / "whole")
    for stop in (1, 5, 6, 7, 19, 20):
        run(config, tmp_path / "parts", resume="auto", stop_at=stop)
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")


def test_saving_and_evaluating_do_not_change_the_run(root, tmp_path):
    plain = small_config(root)
    watched = dataclasses.replace(plain, eval_every=3, eval_limit=3, save_every=2, log_every=1)
    run(plain, tmp_path / "plain")
    run(watched, tmp_path / "watched")
    mine, theirs = state_hash(tmp_path / "plain"), state_hash(tmp_path / "watched")
    mine.pop("state.json"), theirs.pop("state.json")  # has the best metric
    assert mine == theirs


def test_the_number_of_loader_processes_may_change(root, tmp_path):
    config = small_config(root)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_at=10)
    run(with_data(config, workers=2), tmp_path / "parts", resume="auto")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")


def test_work_after_the_checkpoint_is_done_again_and_logged_once(root, tmp_path):
    config = small_config(root, log_every=1, save_every=5)
    run(config, tmp_path / "run", stop_at=13)
    checkpoint.point(tmp_path / "run" / "checkpoints", "last", "step_000010")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000013")
    run(config, tmp_path / "run", resume="auto")
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, 21))
    csv = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len([x for x in csv if x.startswith("train,11,") and ",lr," in x]) == 1


@pytest.mark.parametrize("damage", ["cut short", "a folder", "not readable"])
def test_an_older_checkpoint_is_taken_where_the_newest_is_not_intact(root, tmp_path, monkeypatch, damage):
    config = small_config(root, "sst2", steps=6, save_every=2)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "run", stop_at=4)
    newest = tmp_path / "run" / "checkpoints" / "step_000004"
    if damage == "cut short":
        (newest / checkpoint.STATE).write_bytes((newest / checkpoint.STATE).read_bytes()[:-1])
    elif damage == "a folder":
        (newest / checkpoint.MANIFEST).unlink()
        (newest / checkpoint.MANIFEST).mkdir()
    else:
        real = checkpoint._sha256

        def sha256(path):
            if path.parent == newest:
                raise OSError(5, "Input/output error")
            return real(path)

        monkeypatch.setattr(checkpoint, "_sha256", sha256)
    assert run(config, tmp_path / "run", resume="auto").status == "finished"
    text = log_of(tmp_path / "run")
    assert "a checkpoint is left out" in text
    assert damage == "cut short" or "cannot be read" in text
    assert "going on after step 2" in text
    assert state_hash(tmp_path / "run") == state_hash(tmp_path / "whole")


def test_no_intact_checkpoint_is_an_error(root, tmp_path):
    config = small_config(root)
    run(config, tmp_path / "run", stop_at=2)
    path = tmp_path / "run" / "checkpoints" / "step_000002" / checkpoint.WEIGHTS
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        run(config, tmp_path / "run", resume="auto")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run(config, tmp_path / "other", resume=tmp_path / "run")


def test_another_run_goes_on_from_a_checkpoint(root, tmp_path):
    config = small_config(root)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "first", stop_at=10)
    run(config, tmp_path / "second", resume=tmp_path / "first")
    assert state_hash(tmp_path / "second") == state_hash(tmp_path / "whole")
    assert saved_step(tmp_path / "first") == 10


def test_another_config_is_refused_by_field(root, tmp_path):
    config = small_config(root)
    run(config, tmp_path / "run", stop_at=2)
    lower = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-5))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001, is 1e-05"):
        run(lower, tmp_path / "run", resume="auto")
    assert run(lower, tmp_path / "run", resume="auto", stop_at=3, allow_changed=["optim.lr"]).step == 3
    wider = small_config(root, model={"decoder": dataclasses.replace(config.model.decoder, width=32)})
    with pytest.raises(UserError, match=r"model\.decoder\.width"):
        run(wider, tmp_path / "run", resume="auto")


def test_fewer_steps_than_done(root, tmp_path):
    run(small_config(root), tmp_path / "run", stop_at=10)
    with pytest.raises(UserError, match="at step 10, beyond --steps 5"):
        run(small_config(root, steps=5), tmp_path / "run", resume="auto")


def test_every_part_of_the_state_is_needed(root, tmp_path):
    config = small_config(root)
    run(config, tmp_path / "run", stop_at=10)
    path = tmp_path / "run" / "checkpoints" / "last" / checkpoint.STATE_JSON
    whole = json.loads(path.read_text())
    for name in whole:
        if name in ("processes", "data", "stale"):  # older checkpoints have neither digests of the data nor the last
            continue
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
        accept(path.parent)
        with pytest.raises(UserError, match=r"state\.(json|safetensors)"):
            run(config, tmp_path / "run", resume="auto")


# ------------------------------------------------------------------------------------------- each row once


def cells(out):
    """(kind, step, task, name) of every line of the table."""
    return [tuple(line.split(",")[:4]) for line in (out / "metrics.csv").read_text().splitlines()[1:]]


def test_a_run_that_ended_before_its_first_checkpoint_is_logged_once(root, tmp_path, monkeypatch):
    config = small_config(root, "sst2", steps=8, log_every=1, eval_every=6, eval_limit=2)
    real = State.count

    def stop_hard(self, request):
        """As a second Ctrl-C does, without saving."""
        real(self, request)
        if self.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "count", stop_hard)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3], "armed: steps were logged and nothing saved"
    run(config, tmp_path / "run", resume="auto")
    run(config, tmp_path / "whole")
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")
    assert cells(tmp_path / "run") == cells(tmp_path / "whole")
    assert "nothing was saved before: starting anew" in log_of(tmp_path / "run")
    assert state_hash(tmp_path / "run") == state_hash(tmp_path / "whole")


def test_a_finished_run_goes_on_to_nothing(root, tmp_path):
    config = small_config(root, "sst2", log_every=5, eval_every=10, eval_limit=2, ema_decay=0.9)
    done = run(config, tmp_path / "run")
    before = [(tmp_path / "run" / name).read_text() for name in ("metrics.jsonl", "metrics.csv")]
    again = run(config, tmp_path / "run", resume="auto")
    assert (again.status, again.step, again.metrics) == ("finished", 20, done.metrics)
    assert [(tmp_path / "run" / name).read_text() for name in ("metrics.jsonl", "metrics.csv")] == before
    found = summary(tmp_path / "run")
    assert found["ema_metrics"]
    assert found["metrics_step"] == 20


def test_a_finished_run_is_evaluated_anew_where_other_samples_are_asked_for(root, tmp_path):
    config = small_config(root, "sst2", eval_every=20, eval_limit=2)
    run(config, tmp_path / "run")
    again = run(dataclasses.replace(config, eval_limit=3), tmp_path / "run", resume="auto")
    assert again.metrics["sst2"]["count"] == 3
    assert [r["metrics"]["count"] for r in rows(tmp_path / "run", "eval")] == [3]
    assert "the best is chosen anew" in log_of(tmp_path / "run")


@pytest.mark.parametrize("broken_off", ["eval", "eval_ema"])
def test_an_evaluation_that_was_broken_off_is_made_up_for(root, tmp_path, monkeypatch, broken_off):
    """Metrics, and the best checkpoint, are those of the run that nobody stopped."""
    config = small_config(root, "sst2", "qqp", steps=10, eval_every=5, eval_limit=3, save_every=10, ema_decay=0.9)
    run(config, tmp_path / "whole")
    real = Evaluator._evaluate

    def stop(self, state, model, kind, *more):
        if state.step == 5 and kind == broken_off:
            self.signals.requested = "SIGTERM"
            raise Interrupted
        return real(self, state, model, kind, *more)

    monkeypatch.setattr(Evaluator, "_evaluate", stop)
    assert run(config, tmp_path / "parts").exit_code == 75
    assert "evaluation broken off" in log_of(tmp_path / "parts")
    # Once more, at once: nothing of the next step may be done before.
    assert run(config, tmp_path / "parts", resume="auto").step == 5
    monkeypatch.setattr(Evaluator, "_evaluate", real)
    run(config, tmp_path / "parts", resume="auto")
    assert "the evaluation after step 5 was not finished: it is made up for" in log_of(tmp_path / "parts")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")
    assert cells(tmp_path / "parts") == cells(tmp_path / "whole")


def test_rows_that_cannot_be_read_do_not_hold_up_a_resume(root, tmp_path):
    config = small_config(root, "sst2", log_every=1, steps=6)
    run(config, tmp_path / "run", stop_at=4)
    huge = b'{"kind": "train", "step": ' + b"9" * 400 + b"}"
    damage = [
        b"\xff\xfe", b'{"step": "x", "kind": "train"}', b'{"step": [1]}', b'{"step": null}', b"[1]", b"7",
        b"[" * 100_000, b'{"kind": "train", "step": 1e999}', b'{"kind": 3, "step": 1}', huge,
    ]  # fmt: skip
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(damage) + b"\n")
    with (tmp_path / "run" / "metrics.csv").open("ab") as file:
        file.write("kind,²,x\n\xff\n".encode("latin-1") + b"\xff,\xff\n")
    assert run(config, tmp_path / "run", resume="auto").status == "finished"
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "lines that were cut short or damaged are left out" in log_of(tmp_path / "run")


# --------------------------------------------------------------------------------------- what may change


def test_a_run_may_go_on_without_graphs_and_says_what_differs(root, tmp_path):
    config = small_config(root, "sst2", steps=4)
    run(config, tmp_path / "run", stop_at=2)
    other = dataclasses.replace(config, graph="off", buckets=dataclasses.replace(config.buckets, widths=2))
    assert run(other, tmp_path / "run", resume="auto").status == "finished"
    text = log_of(tmp_path / "run")
    assert "graph auto -> off" in text
    assert "dropout and the last bits, may differ" in text


def test_the_best_by_another_criterion_is_chosen_anew(root, tmp_path):
    """Values of two metrics do not compare."""
    config = small_config(root, "sst2", "qqp", eval_every=5, eval_limit=4, criterion="glue_sst2")
    run(config, tmp_path / "run", stop_at=10)
    first = checkpoint.load_state(tmp_path / "run" / "checkpoints" / "last")["best"]["best"]
    assert first["criterion"] == "glue_sst2"
    run(dataclasses.replace(config, criterion="glue_qqp"), tmp_path / "run", resume="auto")
    best = checkpoint.load_state(tmp_path / "run" / "checkpoints" / "last")["best"]["best"]
    evaluated = {r["step"]: r["metrics"]["accuracy"] for r in rows(tmp_path / "run", "eval") if r["task"] == "qqp"}
    assert best["criterion"] == "glue_qqp"
    assert best["value"] == max(value for step, value in evaluated.items() if step > 10)


def test_a_checkpoint_from_before_refusals_were_counted_by_task(root, tmp_path):
    config = small_config(root, "sst2", steps=4)
    run(config, tmp_path / "run", stop_at=2)
    path = tmp_path / "run" / "checkpoints" / "last" / checkpoint.STATE_JSON
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"strikes": 1, "nonfinite_steps": 1}))
    accept(path.parent)
    assert run(config, tmp_path / "run", resume="auto").status == "finished"
    assert summary(tmp_path / "run")["nonfinite_steps"] == 1
