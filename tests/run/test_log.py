"""Console and metrics files: plain lines elsewhere, one live line on a terminal, files without control characters."""

import logging
import math
import os
import pty
import sys

import pytest
import torch

from tests.small_runs import log_of, rows
from unit_fast.run.log import Record, RunLog, finite
from unit_fast.run.step import Update

COCO = "detection_coco"


def feed(log, step, loss=1.0, nonfinite=0, task=COCO):
    record = Record(step=step, task=task, lr=1e-4, samples=2, wait_s=0.0, sample_ids=[step])
    names = (f"train/{task}/loss_ce", f"train/{task}/loss_ce_0")
    log.log(record, Update(names, torch.tensor([loss, 2.0]), torch.tensor(3.0), torch.tensor(nonfinite)))


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, 100, "plain")
    yield log
    log.close()


def test_one_row_a_task_with_means(log, tmp_path, capsys):
    feed(log, 1, 1.0)
    feed(log, 2, 3.0)
    feed(log, 3, 5.0, task="glue_sst2")
    records = log.flush()
    assert [(r.step, r.loss) for r in records] == [(1, 3.0), (2, 5.0), (3, 7.0)]
    first, second = rows(tmp_path)
    assert (first["task"], first["step"], first["loss"], first["updates"]) == (COCO, 2, 4.0, 2)
    assert first["terms"] == {"train/detection_coco/loss_ce": 2.0, "train/detection_coco/loss_ce_0": 2.0}
    assert (second["task"], second["loss"], second["grad_norm"]) == ("glue_sst2", 7.0, 3.0)
    assert log.flush() == []
    said = capsys.readouterr().out
    assert said.startswith("step 3/100 | ")
    assert said.endswith("GiB | sst2 7 (ce 5) | coco 4 | lr 1.0e-04\n")


def test_nan_is_counted_and_does_not_hide_the_rest(log, tmp_path):
    feed(log, 1, 1.0)
    feed(log, 2, math.nan, nonfinite=1)
    records = log.flush()
    assert [r.nonfinite for r in records] == [False, True]
    (row,) = rows(tmp_path)
    assert (row["loss"], row["nonfinite"], row["updates"]) == (3.0, 1, 2)


def test_files_hold_valid_json_where_nothing_was_finite(log, tmp_path):
    feed(log, 1, math.inf, nonfinite=1)
    log.flush()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert rows(tmp_path)[0]["loss"] is None
    assert "NaN" not in text
    assert "Infinity" not in text
    assert finite({"a": [math.nan, 1.0]}) == {"a": [None, 1.0]}


def test_text_from_data_is_harmless(log, tmp_path, capsys):
    log.line("bad \x1b[2J image\nsecond line")
    logging.getLogger("unit_fast.x").warning("also %s", "\x1b]0;title\x07")
    for text in (capsys.readouterr().out, log_of(tmp_path)):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert text.count("\n") == 2


def test_the_packages_messages_arrive_and_logging_is_given_back(tmp_path, capsys):
    package = logging.getLogger("unit_fast")
    before = (package.level, package.propagate, list(package.handlers))
    log = RunLog(tmp_path, 10, "none")
    logging.getLogger("unit_fast.evaluate").info("coco val")
    log.close()
    assert "coco val" in log_of(tmp_path)
    assert capsys.readouterr().out == ""
    assert (package.level, package.propagate, list(package.handlers)) == before


def test_rows_of_lost_work_are_forgotten(log, tmp_path):
    for step in range(1, 7):
        feed(log, step)
        log.flush()
    log.rows.write('{"kind": "train", "step": 7, "ta')  # cut short by a kill
    log.forget_after(4)
    feed(log, 5)
    log.flush()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5]
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert table[0] == "kind,step,task,name,value"
    assert max(int(line.split(",")[1]) for line in table[1:]) == 5


def test_a_terminal_gets_a_live_line_and_the_file_plain_text(tmp_path, monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        log = RunLog(tmp_path, 10, "auto")
        assert log.live is not None
        feed(log, 1)
        log.flush()
        log.note("evaluating after step 1")
        log.line("a line")
        log.close()
        terminal.flush()
        said = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "\x1b[" in said, "armed: the terminal did get control characters"
    text = log_of(tmp_path)
    assert "step 1/10" in text
    assert all(c.isprintable() or c == "\n" for c in text)
