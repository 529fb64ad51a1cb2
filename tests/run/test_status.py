"""The line that says where a run is: its order, what fits, and that it moves with every update."""

import contextlib
import logging
import os
import pty
import re
import sys
import threading

import pytest
import torch

from tests.small_runs import log_of
from unit_fast.run import log as log_module
from unit_fast.run.log import Record, RunLog
from unit_fast.run.status import Pace, duration, fitted, loss_text
from unit_fast.run.step import Update

ALL3 = "step 1 | 5s left | 9"
COCO, SST2 = "detection_coco", "glue_sst2"


def feed(log: RunLog, step: int, task: str = COCO) -> None:
    record = Record(step=step, task=task, lr=1e-4, samples=64, wait_s=0.0)
    names = (f"train/{task}/loss_ce", f"train/{task}/loss_ce_0")
    log.log(record, Update(names, torch.tensor([1.0, 2.0]), torch.tensor(3.0), torch.tensor(0)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"), (0.4, "0s"), (59, "59s"), (60, "1m00s"), (423, "7m03s"), (3600, "1h00m"), (11_520, "3h12m"),
        (86_400, "1d00h"), (446_400, "5d04h"), (86_400 * 400, "400d00h"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("width", "text"),
    [(3, "ste"), (6, "step 1"), (15, "step 1"), (16, "step 1 | 5s left"), (19, "step 1 | 5s left"), (20, ALL3)],
)
def test_pieces_are_left_out_whole_from_the_end(width, text):
    assert fitted(["step 1", "5s left", "9"], width) == text


def test_losses_with_and_without_their_terms():
    terms = [{"train/x/loss_ce": 1.0, "train/x/loss_ce_0": 9.0}, {"train/x/loss_ce": 3.0, "train/x/loss_ce_0": 9.0}]
    assert loss_text(COCO, [10.0, 12.0]) == "coco 11"
    assert loss_text(COCO, [10.0, 12.0], terms) == "coco 11 (ce 2)"
    assert loss_text(SST2, []) == "sst2 nan"


def test_pace_is_of_the_newest_updates_and_what_is_left_of_all(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("unit_fast.run.status.time.monotonic", lambda: now[0])
    pace = Pace(1000)
    assert pace.pieces()[0] == "step 0/1000"
    for step in range(1, 61):
        now[0] += 10.0 if step <= 10 else 1.0  # the first ones are slow, and 50 are remembered
        pace.add(step, samples=8, wait_s=0.25)
    pieces = pace.pieces()
    assert pieces[:4] == ["step 60/1000", "39m10s left", "8 samples/s", "wait 25%"]  # 150 s for 60: 2.5 s each
    now[0] += 1000  # an evaluation: not training's time, but of what is left
    pace.restart()
    now[0] += 1.0
    pace.add(61, samples=8, wait_s=0.25)
    assert pace.pieces()[2:4] == ["8 samples/s", "wait 25%"]
    assert pace.pieces()[1] == duration(1151 / 61 * 939) + " left"


def test_a_resumed_run_starts_its_own_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("unit_fast.run.status.time.monotonic", lambda: now[0])
    pace = Pace(1000)
    for step in (501, 502):
        now[0] += 2.0
        pace.add(step, samples=1, wait_s=0.0)
    assert pace.pieces()[1] == f"{duration(2 * 498)} left"


def on_a_terminal(monkeypatch, tmp_path, columns: int, work, kind: str = "xterm") -> str:
    """What a terminal of so many columns gets while ``work(log)`` runs."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", kind)
    leader, follower = pty.openpty()
    said: list[bytes] = []
    reader = threading.Thread(target=_read, args=(leader, said))
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        log = RunLog(tmp_path, 500_000, "auto")
        work(log)
        log.close()
        terminal.flush()
    reader.join(60)
    os.close(leader)
    return b"".join(said).decode()


def _read(terminal: int, said: list[bytes]) -> None:
    """All of it, in whatever pieces it comes."""
    with contextlib.suppress(OSError):  # the other end was closed
        while piece := os.read(terminal, 65536):
            said.append(piece)


def lines(said: str) -> list[str]:
    """What stood on the line, one after the other."""
    return [x for x in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[a-zA-Z]", said) if x.startswith("step")]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_live_line_moves_with_every_update_and_holds_the_width(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(log_module, "REDRAW_S", 0.0)

    def work(log):
        for step in range(1, 6):
            feed(log, step, COCO if step % 2 else SST2)
            if step == 3:
                log.flush()

    shown = lines(on_a_terminal(monkeypatch, tmp_path, columns, work))
    assert list(dict.fromkeys(x.split("/")[0] for x in shown)) == [f"step {n}" for n in range(1, 6)]
    assert max(map(len, shown)) <= columns
    assert all("…" not in x for x in shown), "left out whole, not cut"
    assert ("GiB" in shown[-1], "coco" in shown[-1]) == (columns >= 80, columns >= 80)
    assert "left" in shown[-1]


def test_it_is_not_redrawn_more_often_than_it_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "REDRAW_S", 3600.0)
    said = on_a_terminal(monkeypatch, tmp_path, 80, lambda log: [feed(log, step) for step in range(1, 100)])
    assert lines(said) == []


def test_losses_are_not_read_between_two_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "REDRAW_S", 0.0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the device was read"))
    said = on_a_terminal(monkeypatch, tmp_path, 80, lambda log: [feed(log, step) for step in range(1, 4)])
    assert len(lines(said)) >= 3


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path, monkeypatch):
    def work(log):
        assert log.live is None
        feed(log, 1)
        log.flush()

    assert "step 1/500000 | " in on_a_terminal(monkeypatch, tmp_path, 80, work, "dumb")


def test_where_updates_are_slow_a_plain_line_comes_between(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, 10, "plain")
    feed(log, 1)
    monkeypatch.setattr(log_module, "SPEAK_S", 0.0)
    feed(log, 2)
    log.close()
    said = capsys.readouterr().out
    assert said.startswith("step 2/10 | ")
    assert "coco" not in said, "losses are read once an interval"


def test_operators_are_one_line_and_in_the_file_each(tmp_path, capsys):
    log = RunLog(tmp_path, 10, "plain")
    ops = logging.getLogger("unit_fast.ops")
    for name, how in (("attention", "cpu"), ("dropout", "cpu"), ("assignment", "reference")):
        ops.info("%s: %s (%s)", name, how, "why")
    feed(log, 1)
    log.flush()
    ops.warning("something is odd")
    log.close()
    said = capsys.readouterr().out
    assert said.startswith("operators: cpu for 2, reference for 1; which and why is in log.txt\nstep 1/10")
    assert "warning: something is odd" in said
    assert "attention: cpu (why)" in log_of(tmp_path)
