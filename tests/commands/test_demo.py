"""``unit-fast demo``: how it trains and evaluates, and what it leaves, on a world of some samples."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from unit_fast import threads
from unit_fast.commands.main import main
from unit_fast.data.generated import world
from unit_fast.errors import UserError
from unit_fast.recipes import RECIPES
from unit_fast.recipes import demo as recipes
from unit_fast.run import train


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The quick demo has four steps of four samples and is evaluated after two."""
    before, made = torch.get_num_threads(), recipes.demo()
    made = dataclasses.replace(made, steps=4, eval_every=2, batch_per_process=4, log_every=1, eval_limit=6)
    monkeypatch.setitem(RECIPES, "demo_quick", RECIPES["demo_quick"]._replace(make=lambda: made))
    monkeypatch.setitem(recipes.DEMO_SCALE, "demo_quick", 0.004)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    yield
    torch.set_num_threads(before)


CASES = [  # arguments, OMP_NUM_THREADS, usable cores; threads of the configuration, loader processes
    ([], "", 2, 1, 1),
    ([], "", 1, 1, 0),
    (["--threads", "2"], "", 2, 2, 1),
    (["--threads", "1"], "2", 2, 1, 1),
    ([], "2", 2, 0, 1),
]


@pytest.mark.parametrize(("arguments", "variable", "cores", "count", "workers"), CASES)
def test_threads_are_the_users_and_else_one(arguments, variable, cores, count, workers, monkeypatch, tmp_path):
    seen = []

    def caught(config, *_, **__):
        seen.append((config.threads, config.data.workers, torch.get_num_threads()))
        raise UserError("caught")

    monkeypatch.setattr(train, "train", caught)
    monkeypatch.setattr(world, "generate", lambda *_, **__: None)
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert main(["demo", "--quick", "--out", str(tmp_path), *arguments]) == 2
    ((asked, processes, taken),) = seen
    assert (asked, processes) == (count, workers)
    assert taken == (count or torch.get_num_threads())


def test_threads_below_zero_are_refused(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path), "--threads", "-1"]) == 2
    assert "--threads -1: give at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_evaluates_on_its_way_and_leaves_a_report(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--quick", "--out", str(out), "--progress", "none", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = {(row["step"], row["task"]) for row in rows if row["kind"] == "eval"}
    assert {step for step, _ in evaluated} == {2, 4}
    assert len(evaluated) == 16, "eight tasks, twice"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["seed"], summary["threads"]) == ("finished", 3, 1)
    assert (out / "report.html").exists()
    assert f"run folder: {out}" in capsys.readouterr().out


def test_the_shipped_demo_is_evaluated_four_times_and_ends_with_the_fourth():
    for made in (recipes.demo(), recipes.demo_quick()):
        assert made.eval_every * 4 == made.steps
        assert made.threads == 1, "the bits of a run depend on the number; one is there everywhere"


def test_the_sentence_that_the_page_predicts_comes_out_right(tmp_path, monkeypatch):
    """On the steps that the demo gives its task, without what the other tasks teach the encoder."""
    import unit_fast

    monkeypatch.undo()
    page = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    ((sentence, label),) = re.findall(r'predict\("sst2", text="(.*?)"\)\nprint\(result\)  # (\w+)', page)
    made = recipes.demo()
    steps = round(made.steps * made.ratios["glue_sst2"])
    model = dataclasses.replace(made.model, tasks={"glue_sst2": made.model.tasks["glue_sst2"]})
    data = dataclasses.replace(made.data, root=str(tmp_path / "world"), workers=0)
    world.generate(tmp_path / "world", scale=0.1)
    config = dataclasses.replace(made, steps=steps, ratios={"glue_sst2": 1.0}, model=model, data=data, eval_every=-1)
    train.train(config, tmp_path / "run", progress="none")
    found = unit_fast.load(tmp_path / "run").predict("sst2", text=sentence).items
    assert found[0]["label"] == label
    assert found[0]["score"] > 0.8
