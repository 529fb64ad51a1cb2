"""Evaluation before the first step, and the end of a run that finds nothing better; with resuming."""

import dataclasses
import os
import shutil
import signal

import pytest

from tests.small_runs import log_of, rows, run, saved_step, small_config, state_hash, summary
from unit_fast.errors import UserError
from unit_fast.run import evaluator
from unit_fast.run.rows import rows_at
from unit_fast.run.signals import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scores(monkeypatch):
    """Evaluations find these values one after the other; an exception is raised instead. Returns the steps."""

    def are(*values):
        values, steps = iter(values), []

        def fake(model, config, **_):
            value = next(values)
            steps.append(value)
            if value is Interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
            if isinstance(value, type):
                raise value
            return {"sst2": {"accuracy": value, "chance": 0.5, "count": 1}}

        monkeypatch.setattr(evaluator, "evaluate", fake)
        return steps

    return are


def config(root, **changes):
    settings = {"steps": 20, "eval_every": 2, "early_stop": 2, "criterion": "sst2"} | changes
    return small_config(root, "sst2", **settings)


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(root, tmp_path, scores):
    done = scores(0.5, 0.7, 0.6, 0.8, 0.8, 0.7)
    result = run(config(root), tmp_path / "run")
    assert done == [0.5, 0.7, 0.6, 0.8, 0.8, 0.7], "no more than these, and none twice"
    assert (result.status, result.exit_code, result.step) == ("finished", 0, 12)
    found = summary(tmp_path / "run")
    said = "ended after step 12 of 20: 2 evaluations without a better sst2 than 0.8000 at step 8 (early_stop 2)"
    assert found["message"] == said
    assert said in log_of(tmp_path / "run")
    assert saved_step(tmp_path / "run") == 12
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_000008"


def test_a_run_that_ended_so_ends_again_until_it_may_go_on(root, tmp_path, scores):
    scores(0.5, 0.4, 0.3)
    run(config(root), tmp_path / "run")
    done = scores()
    assert run(config(root), tmp_path / "run", "auto").step == 6
    assert done == [], "nothing was trained or evaluated"
    scores(0.2, 0.6, 0.5, 0.4, 0.3, 0.2)
    assert run(config(root, early_stop=4), tmp_path / "run", "auto").step == 18
    scores(0.1)
    assert run(config(root, early_stop=0), tmp_path / "run", "auto").step == 20


def test_a_resumed_run_remembers_how_long_nothing_was_better(root, tmp_path, scores):
    scores(0.5, 0.4, 0.6, 0.5, 0.4)
    run(config(root), tmp_path / "whole")
    scores(0.5, 0.4)
    run(config(root), tmp_path / "parts", stop_at=5)
    scores(0.6, 0.5)
    run(config(root), tmp_path / "parts", "auto", stop_at=9)
    scores(0.4)
    assert run(config(root), tmp_path / "parts", "auto").step == 10
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")


def test_an_evaluation_that_was_broken_off_counts_when_it_is_made_up_for(root, tmp_path, scores):
    scores(0.5, 0.4, Interrupted)
    assert run(config(root), tmp_path / "run").status == "interrupted"
    done = scores(0.3)
    assert run(config(root), tmp_path / "run", "auto").step == 6
    assert done == [0.3]


def test_evaluations_that_fail_do_not_count(root, tmp_path, scores):
    scores(0.5, RuntimeError, RuntimeError, 0.4, RuntimeError, 0.3)
    assert run(config(root), tmp_path / "run").step == 12


def test_another_criterion_starts_to_count_anew(root, tmp_path, scores):
    scores(0.5, 0.4)
    run(config(root), tmp_path / "run", stop_at=5)
    scores(0.3, 0.3, 0.3)  # the first is the best by the new criterion
    assert run(config(root, criterion="mean"), tmp_path / "run", "auto").step == 10


def test_the_first_evaluation_is_of_the_initial_weights_and_may_be_the_best(root, tmp_path, scores):
    done = scores(0.9, 0.5, 0.4)
    assert run(config(root, eval_first=True), tmp_path / "run").step == 4
    assert done == [0.9, 0.5, 0.4]
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 2, 4]
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step_000000"


def test_the_first_evaluation_changes_nothing_and_is_not_made_twice(root, tmp_path):
    plain = config(root, steps=6, eval_every=0, early_stop=0, eval_limit=2)
    first = dataclasses.replace(plain, eval_first=True)
    run(plain, tmp_path / "plain")
    run(first, tmp_path / "first", stop_at=3)
    run(first, tmp_path / "first", "auto")
    kept = [{n: v for n, v in state_hash(tmp_path / name).items() if n != "state.json"} for name in ("plain", "first")]
    assert kept[0] == kept[1]
    assert [row["step"] for row in rows(tmp_path / "first", "eval")] == [0, 6]


@pytest.mark.parametrize("when", ["broken_off", "nothing_saved"])
def test_a_first_evaluation_that_is_not_there_is_made_up_for(root, tmp_path, scores, when):
    wanted = config(root, eval_first=True, steps=2, eval_every=0, early_stop=0)
    if when == "broken_off":
        scores(Interrupted)
        assert run(wanted, tmp_path / "run").status == "interrupted"
    else:  # killed in its first updates: rows are there, no checkpoint
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "task": "sst2", "metrics": {}}\n')
    done = scores(0.5, 0.6)
    run(wanted, tmp_path / "run", "auto")
    assert done == [0.5, 0.6]
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [0, 2]
    assert rows_at(tmp_path / "run", 0)["eval"]["sst2"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"eval_every": 0}, "early_stop: is 2; give 0, or an eval_every of at least 1"),
        ({"early_stop": -1}, "early_stop: is -1; give at least 0"),
        (
            {"early_stop": 0, "eval_first": True, "eval_every": -1},
            "eval_first: is True; give False, or an eval_every of at least 0",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(root, tmp_path, changes, text):
    with pytest.raises(UserError, match=text):
        run(config(root, **changes), tmp_path / "run")


def test_a_criterion_that_cannot_be_evaluated_is_refused(tmp_path, root):
    shutil.copytree(root, tmp_path / "world")
    (tmp_path / "world" / "glue" / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(UserError, match="early_stop: criterion sst2 has no val split"):
        run(config(tmp_path / "world"), tmp_path / "run")
    with pytest.raises(UserError, match="early_stop: criterion mean has no val split"):
        run(config(tmp_path / "world", criterion="mean"), tmp_path / "run", "auto")
