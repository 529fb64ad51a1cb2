"""What a run survives: signals, kills, disks that refuse, a second run in its folder. Children are real processes."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.small_runs import log_of, rows, run, saved_step, small_config, state_hash, summary, with_data
from unit_fast import faults
from unit_fast.config import to_json
from unit_fast.data.loader import Loader
from unit_fast.errors import UserError
from unit_fast.run import step as step_module
from unit_fast.run import train as train_module
from unit_fast.run.folder import RunFolder
from unit_fast.run.signals import Stop
from unit_fast.weights import checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    faults.disarm()


def child(config, out: Path, prepare: str = "", resume="auto") -> subprocess.Popen:
    """A process that trains; ``prepare`` is Python that runs before, in which ``mark(name)`` makes the file ``name``
    beside ``out``. Its exit code is the run's."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}.config.json"
    path.write_text(to_json(config))
    code = textwrap.dedent(f"""
        import os, signal, sys, time
        import torch
        torch.set_num_threads(1)
        from unit_fast import faults
        from unit_fast.config import load_config
        from unit_fast.run.state import State
        from unit_fast.run.train import train
        def mark(name):
            open(os.path.join({str(out.parent)!r}, name), "w").close()
        """) + textwrap.dedent(prepare) + textwrap.dedent(f"""
        try:
            sys.exit(train(load_config({str(path)!r}), {str(out)!r}, {resume!r}, progress="plain").exit_code)
        except KeyboardInterrupt:
            sys.exit(130)
        """)  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def wait_for(path: Path, process: subprocess.Popen):
    end = time.monotonic() + LIMIT_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the child ended early: {process.communicate()[0]}")
        time.sleep(0.02)


SLOW = """
    real = State.count
    def count(self, request):
        real(self, request)
        if self.step == 7:
            mark("seven")
            time.sleep(0.5)
        elif self.step > 7:
            time.sleep(0.2)
    State.count = count
"""
"""Marks step 7 and goes on slowly, so that a signal falls into the run."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts, by its configuration."""
    made: dict[str, Path] = {}

    def of(config) -> Path:
        key = to_json(config)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "whole"
            run(config, made[key])
        return made[key]

    return of


def send_to_group(process: subprocess.Popen, number: int):
    """As a terminal's Ctrl-C: loader processes get it too."""
    os.killpg(process.pid, number)


@pytest.mark.parametrize(
    ("number", "workers", "send", "prepare"),
    [
        (signal.SIGTERM, 0, subprocess.Popen.send_signal, ""),
        (signal.SIGINT, 1, subprocess.Popen.send_signal, ""),
        (signal.SIGINT, 2, send_to_group, "os.setsid()\n"),
        # Whoever runs the tests may hold hang-ups off, which children inherit.
        (signal.SIGHUP, 0, subprocess.Popen.send_signal, "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"),
    ],
    ids=["SIGTERM", "SIGINT", "SIGINT to the whole group", "a closed terminal"],
)
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(root, tmp_path, whole, number, workers, send, prepare):
    config = small_config(root, steps=40, data={"workers": workers})
    out = tmp_path / "run"
    process = child(config, out, prepare + textwrap.dedent(SLOW))
    wait_for(tmp_path / "seven", process)
    sent = time.monotonic()
    send(process, number)
    code, said = finish(process)
    assert code == 75, said
    assert time.monotonic() - sent < 20
    assert f"unit-fast train --resume auto --out {out}" in said
    found = summary(out)
    assert (found["status"], found["exit_code"]) == ("interrupted", 75)
    assert signal.Signals(number).name in found["message"]
    assert 7 <= saved_step(out) < 40, "armed"
    run(config, out, "auto")
    assert state_hash(out) == state_hash(whole(small_config(root, steps=40)))


def test_a_second_ctrl_c_quits_at_once(root, tmp_path):
    out = tmp_path / "run"
    saving = """
    faults.arm("save.before.model.safetensors", lambda: (mark("saving"), time.sleep(60)))
    """
    process = child(small_config(root, steps=40), out, SLOW + saving)
    wait_for(tmp_path / "seven", process)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "saving", process)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    code, said = finish(process)
    assert code == 130, said
    assert time.monotonic() - begun < 20
    assert summary(out)["status"] == "killed"
    assert run(small_config(root, steps=40), out, "auto").status == "finished"


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(root, tmp_path):
    prepare = """
    from unit_fast.evaluation import task_run as module
    real = module.TaskRun._groups
    def groups(self):
        mark("evaluating")
        for item in real(self):
            time.sleep(0.5)
            yield item
        time.sleep(0)
    module.TaskRun._groups = groups
    """
    process = child(small_config(root, "sst2", eval_every=5, steps=20), tmp_path / "run", prepare)
    wait_for(tmp_path / "evaluating", process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "evaluation broken off" in said
    assert saved_step(tmp_path / "run") == 5


# ------------------------------------------------------------------------------------------------------- kill -9

KILL_POINTS = [
    "save.before.model.safetensors", "save.before.state.safetensors", "save.before.manifest", "save.before.rename",
    "save.after.rename", "point.last", "prune.before.delete",
]  # fmt: skip


@pytest.mark.parametrize(
    "point", [p if p in KILL_POINTS[::3] else pytest.param(p, marks=pytest.mark.long) for p in KILL_POINTS]
)
def test_kill_in_a_save(root, tmp_path, whole, point):
    """At each named point of a later save: what is there loads, and the run ends with the same bits."""
    config, out = small_config(root, save_every=4, keep_checkpoints=2), tmp_path / "run"
    prepare = f"""
    passed = []
    def kill():
        passed.append(1)
        if len(passed) == {1 if point.startswith("prune") else 2}:
            os.kill(os.getpid(), signal.SIGKILL)
    faults.arm({point!r}, kill)
    """
    code, said = finish(child(config, out, prepare))
    assert code == -signal.SIGKILL, said
    kept = checkpoint.numbered(out / "checkpoints")
    assert kept
    for folder in kept:
        checkpoint.verify(folder)
    assert run(config, out, "auto").step == 20
    assert state_hash(out) == state_hash(whole(config))
    assert not [p for p in (out / "checkpoints").iterdir() if ".tmp-" in p.name or ".old-" in p.name]
    assert sum(r["updates"] for r in rows(out)) == 20, "each update is logged once"


@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "save_every", "kills"),
    [(20, 4, (3, 9)), (200, 10, sorted(random.Random(1).sample(range(11, 200), 10)))],
    ids=["twice", "ten times"],
)
def test_kill_in_steps(root, tmp_path, whole, steps, save_every, kills):
    config = small_config(root, steps=steps, save_every=save_every, keep_checkpoints=2)
    out = tmp_path / "run"
    for step in kills:
        prepare = f"""
        real = State.count
        def count(self, request):
            real(self, request)
            if self.step == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
        State.count = count
        """
        code, said = finish(child(config, out, prepare))
        assert code == -signal.SIGKILL, said
    run(config, out, "auto")
    assert state_hash(out) == state_hash(whole(config))


# ------------------------------------------------------------------------------------------------------ the disk


def test_a_save_that_fails_does_not_end_training(root, tmp_path, monkeypatch):
    real, calls = shutil.disk_usage, []

    def usage(path):
        calls.append(1)
        return real(path)._replace(free=0) if len(calls) == 2 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert run(small_config(root, save_every=5), tmp_path / "run").status == "finished"
    assert len(calls) == 4, "armed"
    assert "0 MiB free" in log_of(tmp_path / "run")
    assert {p.name for p in checkpoint.numbered(tmp_path / "run" / "checkpoints")} == {
        "step_000005", "step_000015", "step_000020",
    }  # fmt: skip


def test_the_last_save_must_succeed(root, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=0))
    with pytest.raises(checkpoint.SaveError, match="free"):
        run(small_config(root, steps=2), tmp_path / "run")


@pytest.mark.parametrize("what", ["a file in the way", "a file above", "read-only"])
def test_an_out_folder_that_cannot_be_written_fails_at_the_start(root, tmp_path, what):
    out = tmp_path / "run"
    if what == "a file in the way":
        out.write_text("")
    elif what == "a file above":
        (tmp_path / "x").write_text("")
        out = tmp_path / "x" / "run"
    elif not Path("/proc").is_dir():
        pytest.skip("no file system here that refuses everybody")
    else:
        out = Path("/proc/unit_fast_run")
    with pytest.raises(UserError, match="--out .*: not a folder that can be written"):
        run(small_config(root), out)


# --------------------------------------------------------------------------------------------- one run a folder


def test_a_second_run_in_the_same_folder_is_refused_with_the_holder(root, tmp_path):
    held = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*, started .*--out"):
        run(small_config(root), tmp_path / "run")
    held.release()
    assert run(small_config(root, steps=1), tmp_path / "run").step == 1


def test_a_forked_process_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    fork = multiprocessing.get_context("fork")
    running = fork.Event()
    process = fork.Process(target=lambda: (running.set(), time.sleep(60)))
    process.start()
    try:
        assert running.wait(30)  # fork returns to us before the child has run what it runs after a fork
        folder.lock.close()  # as a kill does it: closed, not unlocked
        RunFolder(tmp_path / "run").release()
    finally:
        process.kill()
        process.join()


def test_a_run_is_not_overwritten(root, tmp_path):
    config = small_config(root, steps=2)
    run(config, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already.*--resume auto"):
        run(config, tmp_path / "run")


def test_a_start_that_failed_leaves_the_folder_free(root, tmp_path):
    config = small_config(root, steps=2)
    with pytest.raises(UserError):
        run(dataclasses.replace(config, init_from="nowhere"), tmp_path / "run")
    assert "not started: --init-from nowhere" in log_of(tmp_path / "run")
    assert run(config, tmp_path / "run").step == 2


# ------------------------------------------------------------------------------------------------- broken images


def test_a_corrupt_image_is_replaced_counted_and_fails_the_run_above_the_share(root, tmp_path):
    other = tmp_path / "world"
    shutil.copytree(root, other)
    folder = other / "coco" / "images" / "train2017"
    victim = sorted(folder.iterdir())[0]
    victim.unlink()  # it may be linked to the other folders
    victim.write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    config = small_config(other, "coco", steps=30, data={"max_bad_share": 0.5})
    run(config, tmp_path / "run")
    bad = summary(tmp_path / "run")["bad_images"]
    assert bad["by_task"]["detection_coco"] >= 1, "armed"
    assert bad["read"] == 60 + bad["by_task"]["detection_coco"]
    assert log_of(tmp_path / "run").count(victim.name) == 1
    strict = with_data(config, max_bad_share=0.0)
    with pytest.raises(UserError, match=rf"1 of \d+ images read .*{victim.name}"):
        run(strict, tmp_path / "strict")
    assert summary(tmp_path / "strict")["status"] == "failed"


def test_a_killed_loader_process_ends_the_run_with_its_data_set(root, tmp_path):
    prepare = """
    from unit_fast.data.loader import Loader
    real = Loader.__next__
    def next_(self):
        if self.steps_read.total() == 5:
            os.kill(self.steps._workers[0].pid, signal.SIGKILL)
            time.sleep(0.5)
        return real(self)
    Loader.__next__ = next_
    """
    process = child(small_config(root, "sst2", steps=2000, data={"workers": 1}), tmp_path / "run", prepare)
    code, said = finish(process)
    assert code != 0
    assert "a loader process died; being read: glue_sst2" in said
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"


# ------------------------------------------------------------------------------------------------- the console


CONSOLES = {"reader_gone": "", "full": ">/dev/full", "closed": "<&- >&- 2>&-"}


@pytest.mark.parametrize("console", ["reader_gone", pytest.param("full", marks=pytest.mark.long), "closed"])
def test_a_run_goes_on_without_its_console(root, tmp_path, console):
    """Through the command line, whose last lines and exit code count too."""
    config = small_config(root, "sst2", steps=12, log_every=1)
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-m", "unit_fast", "train", "--config-file", str(tmp_path / "config.json")]
    command += ["--out", str(tmp_path / "run"), "--progress", "plain"]
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {CONSOLES[console]}', "x", *command],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if console == "reader_gone":
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    code, _ = finish(process)
    assert code == 0
    assert summary(tmp_path / "run")["status"] == "finished"
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, 13))
    text = log_of(tmp_path / "run")
    if console in ("reader_gone", "full"):
        assert text.count("the console cannot be written") == 1
    assert (tmp_path / "run" / "report.html").is_file()


def test_nohup_still_holds_a_hangup_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------- an end that is not the model's fault


def test_a_run_whose_data_has_gone_saves_what_it_has(root, tmp_path, monkeypatch):
    """Nothing but the step that failed is done again, and every step is logged once."""
    config = small_config(root, "sst2", steps=8, log_every=3)
    real = Loader.__next__

    def gone(self):
        if self.steps_read.total() == 5:
            raise UserError("glue/SST-2/train.tsv: no such file")
        return real(self)

    monkeypatch.setattr(Loader, "__next__", gone)
    with pytest.raises(UserError, match="no such file"):
        run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "failed"
    assert saved_step(tmp_path / "run") == 5
    monkeypatch.setattr(Loader, "__next__", real)
    run(config, tmp_path / "run", "auto")
    run(config, tmp_path / "whole")
    assert state_hash(tmp_path / "run") == state_hash(tmp_path / "whole")
    assert sum(r["updates"] for r in rows(tmp_path / "run")) == 8


def test_an_error_inside_an_update_saves_nothing_of_it(root, tmp_path, monkeypatch):
    """Its random numbers are drawn: going on from there would be another run."""
    real, updates = step_module.train_step, iter(range(8))

    def wrong(*arguments, **named):
        update = real(*arguments, **named)
        if next(updates) == 5:
            raise UserError("in mid-update")
        return update

    monkeypatch.setattr(step_module, "train_step", wrong)
    with pytest.raises(UserError, match="in mid-update"):
        run(small_config(root, "sst2", steps=8), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "log.txt", "config.json", "env.json", "command.txt"])
def test_a_file_of_the_run_that_cannot_be_written_is_one_line(root, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}: cannot be written"):
        run(small_config(root, "sst2", steps=1), tmp_path / "run")


def test_what_a_full_disk_refuses_is_written_later(root, tmp_path, monkeypatch, capsys):
    """Rows and lines wait, in order and whole, and the run goes on."""
    config = small_config(root, "sst2", steps=8, log_every=1)
    run(config, tmp_path / "whole")

    class Full:
        def __init__(self, file, state):
            self.file, self.state = file, state

        def write(self, data):
            if 3 <= self.state.step < 6:
                raise OSError(28, "No space left on device")
            return self.file.write(data[: len(data) // 2 + 1])  # a write may take a part

        def close(self):
            self.file.close()

    real = train_module.loop

    def filling(parts, stop):
        for file in (parts.log.text, parts.log.rows, parts.log.csv_file):
            file.file = Full(file.file, parts.state)
        real(parts, stop)

    monkeypatch.setattr(train_module, "loop", filling)
    assert train_module.train(config, tmp_path / "run", progress="plain").status == "finished"
    names = ("loss", "step", "task", "grad_norm")
    assert [[r[n] for n in names] for r in rows(tmp_path / "run")] == [
        [r[n] for n in names] for r in rows(tmp_path / "whole")
    ]
    assert "step 4/8" in log_of(tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: cannot be written (No space left on device): it waits in memory") == 1
    assert said.count("metrics.jsonl: is written again") == 1
