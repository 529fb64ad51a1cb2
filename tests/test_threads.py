"""CPU threads: how they wait, how many there are, and what others take."""

import os
import subprocess
import sys

import pytest

from unit_fast import threads
from unit_fast.threads import Chosen, Others, Watch, choose, usable_cores, wait_briefly


@pytest.mark.parametrize(
    ("set_by_user", "done"),
    [({}, True), ({"OMP_NUM_THREADS": "2"}, True), *(({name: "1"}, False) for name in threads.WAITING)],
)
def test_how_threads_wait_is_the_users_where_it_is_set(set_by_user, done, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = dict(set_by_user)
    assert wait_briefly(environment) is done
    assert environment == set_by_user | ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"} if done else {})


def test_once_torch_is_loaded_the_environment_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    environment = {}
    assert not wait_briefly(environment)
    assert not environment


def test_openmp_hears_of_it_from_a_command_and_not_from_the_library():
    told = "import os, sys; sys.argv = ['unit-fast', '--version']; {}; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {k: v for k, v in os.environ.items() if k not in threads.WAITING}
    command = "from unit_fast.commands.main import main; main()"
    for line, expected in ((command, "2000"), ("import unit_fast", "None"), (command.replace("()", "([])"), "None")):
        code = ["-c", told.format(line)]
        found = subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.split()[-1] == expected, line


QUOTAS = [  # lines of /proc/self/cgroup, files below the mount, cores
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/a/b\n", {"cpu.max": "400000 100000\n", "a/cpu.max": "max 100000\n", "a/b/cpu.max": "200000 100000"}, 2.0),
    ("4:memory:/x\n3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ("0::/../..\n", {}, float("inf")),
    ("0::/\n", {"cpu.max": "what\n"}, float("inf")),
]


@pytest.mark.parametrize(("groups", "files", "cores"), QUOTAS)
def test_the_quota_of_a_control_group_counts(groups, files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    (tmp_path / "cgroup").write_text(groups)
    assert threads.group_quota(tmp_path / "cgroup", tmp_path / "mounted") == cores
    assert threads.group_quota(tmp_path / "absent", tmp_path / "mounted") == float("inf")


def test_no_more_cores_are_usable_than_affinity_and_quota_give(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 4, 7}, raising=False)
    for quota, cores in ((float("inf"), 4), (2.5, 2), (0.5, 1), (16.0, 4), (3.0, 3)):
        monkeypatch.setattr(threads, "group_quota", lambda *_, quota=quota: quota)
        assert usable_cores() == cores


CHOICES = [  # cores, asked, torch's default, OMP_NUM_THREADS, others take; number, what is said
    (2, 0, 2, "", 0.0, 2, None),
    (2, 0, 2, "", 0.3, 2, None),
    (2, 0, 2, "", 1.0, 1, "takes 1 thread;"),
    (2, 0, 2, "", 2.0, 1, "takes 1 thread;"),
    (8, 0, 8, "", 3.1, 5, "takes 5 threads;"),
    (8, 0, 4, "", 3.1, 4, None),
    (2, 0, 64, "", 0.0, 2, None),
    (2, 2, 2, "", 1.0, 2, "try --threads 1"),
    (2, 1, 2, "", 1.0, 1, None),
    (4, 0, 4, "4", 2.0, 4, "try --threads 2"),
    (4, 3, 4, "4", 2.0, 3, "try --threads 2"),
    (2, 0, 8, "8", 0.0, 8, None),
]


@pytest.mark.parametrize(("cores", "asked", "default", "variable", "taken", "count", "said"), CHOICES)
def test_the_number_is_the_users_or_that_of_the_free_cores(
    cores, asked, default, variable, taken, count, said, monkeypatch
):
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    found = choose(asked, default, taken=taken)
    assert found.count == count
    assert (found.line is None) if said is None else (said in found.line)


def test_a_resumed_run_keeps_its_number(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = choose(0, 2, keep=True, taken=1.0)
    assert found.count == 2
    assert "try --threads 1" in found.line
    assert choose(1, 2, taken=9.0) == Chosen(1, None)


def test_own_work_is_not_that_of_others(monkeypatch):
    times = iter([(0.0, 100.0, 5.0), (10.0, 115.0, 10.0), (20.0, 117.0, 12.0), None, (40.0, 140.0, 13.0)])
    monkeypatch.setattr(Others, "_times", staticmethod(lambda: next(times)))
    others = Others()
    assert others.taken() == pytest.approx(1.0)
    assert others.taken() == 0.0
    assert others.taken() == 0.0, "the system does not tell"
    assert others.taken() == 0.0, "nor what it was before"


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no Linux")
def test_the_system_tells_what_is_busy():
    before = Others._times()
    deadline = before[2] + 0.1
    while Others._times()[2] < deadline:
        pass
    after = Others._times()
    assert after[0] > before[0]
    assert after[1] - before[1] >= 0.03, "busy seconds of the usable cores"


def test_a_run_is_told_once(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    taken = iter([0.1, 1.2, 1.3])
    monkeypatch.setattr(Others, "taken", lambda self: next(taken))
    watch = Watch(2)
    assert watch.look() is None
    assert "--resume auto --threads 1" in watch.look()
    assert watch.look() is None
    assert Watch(1).look() is None
