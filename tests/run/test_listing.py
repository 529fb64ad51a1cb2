"""The list of runs, from their files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unit_fast.commands import main as cli
from unit_fast.errors import UserError
from unit_fast.run.listing import list_runs
from unit_fast.run.lock import LOCK, holder


def train_row(step: int) -> str:
    return json.dumps({"kind": "train", "step": step, "task": "glue_sst2", "loss": 1.0}) + "\n"


def eval_row(step: int, value, task="sst2", kind="eval") -> str:
    return json.dumps({"kind": kind, "step": step, "task": task, "metrics": {"accuracy": value, "count": 4}}) + "\n"


def make(folder: Path, rows: str = "", summary: dict | None = None, age_s: float = 100.0, **config) -> Path:
    """A run folder whose files are so old."""
    (folder / "checkpoints" / "step_000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_000004" / "config.json").write_text("{}")
    (folder / "checkpoints" / "last").symlink_to("step_000004")
    (folder / "config.json").write_text(json.dumps({"recipe": "small", "steps": 8} | config))
    (folder / "command.txt").write_text("unit-fast train\n")
    (folder / "metrics.jsonl").write_text(rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    when = time.time() - age_s
    for path in folder.iterdir():
        os.utime(path, (when, when))
    return folder


STATES = {
    "finished": (train_row(8) + eval_row(8, 0.5), {"status": "finished", "step": 8}, 8),
    "interrupted": (train_row(4), {"status": "interrupted", "step": 5}, 5),
    "failed": (train_row(4), {"status": "failed", "step": 4}, 4),
    "killed": (train_row(4) + train_row(6) + '{"kind": "train", "st', None, 6),
    "begun": ("", None, 0),
}


@pytest.mark.parametrize("state", STATES)
def test_states(tmp_path, state):
    rows, summary, step = STATES[state]
    make(tmp_path / "a", rows, summary)
    (found,) = list_runs(tmp_path)
    assert (found.state, found.step, found.steps, found.recipe) == (state, step, 8, "small")
    assert found.checkpoints == ["last -> step_000004", "step_000004"]
    assert 90 < found.age_s < 200


def test_a_resumed_run_that_was_killed_is_not_what_its_old_summary_says(tmp_path):
    folder = make(tmp_path / "a", train_row(4), {"status": "interrupted", "step": 4})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(train_row(7))
    (found,) = list_runs(tmp_path)
    assert (found.state, found.step) == ("killed", 7)


def test_metrics_are_those_of_the_newest_evaluation(tmp_path):
    rows = eval_row(2, 0.1) + eval_row(2, 0.2, "qnli") + train_row(4) + eval_row(4, 0.3)
    rows += eval_row(4, 0.9, kind="eval_ema") + eval_row(4, None, "qnli") + '{"kind": "eval", "step": 5, "ta'
    best = {"best": {"step": 2, "value": 0.15, "criterion": "mean"}}
    make(tmp_path / "a", rows, {"status": "finished", "step": 4, "best": best})
    (found,) = list_runs(tmp_path)
    assert (found.metrics, found.metrics_step) == ({"sst2": 0.3}, 4)
    assert found.best == {"step": 2, "value": 0.15, "criterion": "mean"}


def test_a_run_going_on_is_seen_and_not_disturbed(tmp_path):
    folder = make(tmp_path / "a", train_row(4), {"status": "interrupted", "step": 4})
    code = (
        "import sys, time; from unit_fast.run.folder import RunFolder; f = RunFolder(sys.argv[1]); "
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        (found,) = list_runs(tmp_path)
        assert found.state == "running"
        assert holder(folder).startswith(f"process {process.pid} on ")
    finally:
        process.communicate("")
    assert holder(folder) is None
    (found,) = list_runs(tmp_path)
    assert found.state == "interrupted"


def test_where_runs_are_found(tmp_path):
    make(tmp_path / "new", age_s=10)
    make(tmp_path / "group" / "old", age_s=1000)
    make(tmp_path / ".hidden" / "x")
    make(tmp_path / "a" / "b" / "c" / "d" / "too_deep")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("{}")  # somebody else's
    names = [Path(run.folder).name for run in list_runs(tmp_path)]
    assert names == ["new", "old"], "newest first, checkpoints are no runs"
    assert [run.folder for run in list_runs(tmp_path / "new")] == [str(tmp_path / "new")]
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "nowhere")


def test_damaged_files_are_no_reason_to_end(tmp_path):
    folder = make(tmp_path / "a", "not json\n\xff\n[1]\n" + eval_row(2, 0.5).replace("sst2", "nothing"))
    (folder / "summary.json").write_text("[")
    (folder / "config.json").write_text('{"steps": "many"}')
    (folder / LOCK).mkdir()
    (found,) = list_runs(tmp_path)
    assert (found.step, found.steps, found.metrics) == (0, None, {})


def test_by_command(tmp_path, capsys):
    make(tmp_path / "a", train_row(8) + eval_row(8, 0.5), {"status": "finished", "step": 8})
    make(tmp_path / "b\x1b[2J", train_row(3), age_s=7300)
    assert cli.main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["run", "state", "step", "age", "checkpoints", "metrics"]
    assert "finished  8/8   2m   1 (last)     sst2 0.500 (step 8)" in said
    assert "killed    3/8   2h" in said
    assert "\x1b" not in said
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], first["metrics"], second["state"]) == ("finished", {"sst2": 0.5}, "killed")
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'empty'}: no runs\n"


def test_it_does_not_wait_for_torch(tmp_path):
    code = "import sys, unit_fast.commands.main as c; sys.exit(c.main(['runs', '.']) or ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
