"""The benchmark runner refuses wrong providers, takes turns, and stamps its rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.runner import gate, machine, results
from benchmarks.runner.cases import Benchmark, Case, Provider
from benchmarks.runner.main import main
from benchmarks.runner.profile import STEP, Event, Profile
from benchmarks.runner.rows import OnCard, rows_of
from tests.benchmarks import common

ABOUT = "Squares."


class Square(Provider):
    """x * x with an error; notes its name in ``calls`` at every step."""

    def __init__(self, name, calls, error=0.0, phases=()):
        self.name, self.calls, self.error, self.phases = name, calls, error, phases
        self.x = torch.linspace(-1, 1, 1000)

    def step(self, marks):
        self.calls.append(self.name)
        self.x * self.x
        for phase in self.phases:
            marks(phase)

    def outputs(self):
        return {"y": self.x * self.x * (1 + self.error)}


def benchmark(calls, *, error=0.0, phases=(), tolerance=1e-6, summary=None):
    case = Case(
        name="thousand",
        shape="1000",
        providers={
            "peer": lambda: Square("peer", calls, phases=phases),
            "ours": lambda: Square("ours", calls, error, phases),
            "third": lambda: Square("third", calls, phases=phases),
        },
        reference="exact",
        references={"exact": lambda: Square("exact", calls)},
        tolerances={"": tolerance},
    )
    return lambda args: Benchmark(
        name="bench_square", title="squares", method=["x times x"], excluded="nothing", cases=[case], summary=summary,
    )  # fmt: skip


def run(tmp_path, calls, *arguments, **changes) -> tuple[int, Path]:
    path = tmp_path / "rows.jsonl"
    threads = str(torch.get_num_threads())
    return main(benchmark(calls, **changes), ABOUT, ["--threads", threads, "--json", str(path), *arguments]), path


def test_wrong_provider_is_refused_without_figures(tmp_path, capsys):
    calls, summaries = [], []
    status, path = run(tmp_path, calls, error=1e-4, summary=lambda rows, console: summaries.append(rows))
    printed = capsys.readouterr().out
    assert status == 1
    assert "ours DIFFERS" in printed
    assert "no figures" in printed
    assert "total" not in printed  # no table
    assert not path.exists()
    assert not summaries
    assert not calls  # nothing was even timed


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_tolerance_decides(tmp_path, tolerance):
    assert run(tmp_path, [], "--rounds", "1", error=1e-4, tolerance=tolerance)[0] == (0 if tolerance > 1e-4 else 1)


def test_rows(tmp_path, capsys):
    status, path = run(tmp_path, [], "--rounds", "3", phases=("first", "second"))
    assert status == 0
    rows = common.rows_of(path)
    assert [row["provider"] for row in rows] == ["peer", "ours", "third"]
    wanted = {
        "benchmark", "case", "shape", "dtype", "device", "provider", "time_ms", "p20_ms", "p80_ms", "rounds",
        "phases_ms", "speedup_vs_best", "captured_ms", "captured_phases_ms", "captured_speedup_vs_best",
        "captured_why_not", "launches", "kernels", "waits", "copies_to_host", "copies_to_device", "kernels_by_name",
        "peak_memory_gib", "percent_of_peak", "machine", "cpu", "cores", "gpu", "driver", "cuda", "threads", "versions",
        "commit", "sources", "date",
    }  # fmt: skip
    for row in rows:
        assert set(row) == wanted
        assert list(row["phases_ms"]) == ["first", "second"]
        assert row["p20_ms"] <= row["time_ms"] <= row["p80_ms"]
        assert row["rounds"] == 3
        assert row["versions"]["torch"] == torch.__version__.split("+")[0]
        assert row["threads"] == torch.get_num_threads()
    for row in rows:  # the best of the others over this one
        others = min(r["time_ms"] for r in rows if r is not row)
        assert row["speedup_vs_best"] == pytest.approx(others / row["time_ms"], rel=0.05, abs=1e-3)
    assert "ours" in capsys.readouterr().out
    run(tmp_path, [], "--rounds", "1")
    assert len(common.rows_of(path)) == 6  # appended


def test_results_hold_the_latest_row_of_each_provider(tmp_path):
    path = tmp_path / "results.jsonl"
    same = dict.fromkeys(("shape", "dtype", "device", "cpu", "cores", "gpu", "threads"), 1)
    rows = [{**same, "case": c, "provider": p, "time_ms": 1} for c in "ab" for p in ("ours", "peer")]
    results.replace(rows, path)
    results.replace([{**rows[0], "time_ms": 2}, {**rows[1], "threads": 2, "time_ms": 3}], path)
    found = common.rows_of(path)
    assert sorted((r["case"], r["provider"], r["threads"], r["time_ms"]) for r in found) == [
        ("a", "ours", 1, 2), ("a", "peer", 1, 1), ("a", "peer", 2, 3), ("b", "ours", 1, 1), ("b", "peer", 1, 1),
    ]  # fmt: skip


def test_providers_take_turns(tmp_path):
    calls = []
    run(tmp_path, calls, "--rounds", "4", "--warmup", "2")
    assert calls[:6] == ["peer"] * 2 + ["ours"] * 2 + ["third"] * 2
    assert calls[6:] == [
        "peer", "ours", "third",
        "ours", "third", "peer",
        "third", "peer", "ours",
        "peer", "ours", "third",
    ]  # fmt: skip


def test_provider_option_keeps_ours(tmp_path):
    calls = []
    run(tmp_path, calls, "--rounds", "1", "--warmup", "0", "--provider", "third")
    assert calls == ["ours", "third"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--case", "million"], "thousand"), (["--provider", "theirs"], "peer, ours, third"), (["--rounds", "0"], "1")],
)
def test_wrong_option(tmp_path, capsys, arguments, word):
    assert run(tmp_path, [], *arguments)[0] == 2
    assert word in capsys.readouterr().err


def test_compare_finds_every_kind_of_difference():
    one = {"y": torch.ones(3), "z": torch.tensor([1.0, 2.0])}
    tolerances = {"": 1e-6, "z": 0.1}

    def bad(found, norm="max"):
        return [check.key for check in gate.compare(one, found, tolerances, norm) if not check.ok]

    assert bad(one) == []
    assert bad({**one, "z": torch.tensor([1.0, 2.1])}) == []
    assert bad({**one, "z": torch.tensor([1.0, 2.3])}) == ["z"]
    assert bad({**one, "z": torch.tensor([1.0, 2.3])}, "l2") == ["z"]
    assert bad({"y": one["y"]}) == ["z"]
    assert bad({**one, "more": torch.ones(1)}) == ["more"]
    assert bad({**one, "y": torch.ones(4)}) == ["y"]
    assert bad({**one, "y": torch.tensor([1.0, float("nan"), 1.0])}) == ["y"]


def test_peak_memory_is_the_childs_own():
    """A big parent must not show in the figure of its child, as it does in ``ru_maxrss`` on Linux."""
    code = "from benchmarks.runner.memory import peak_resident; print(peak_resident())"
    ballast = torch.ones(250_000_000)  # 1 GB in this process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=machine.ROOT, check=True)
    assert int(done.stdout) < ballast.numel() * 4


def test_percent_of_peak():
    case = Case(
        name="n", shape="s", dtype="bfloat16", device="cuda", providers={}, reference="", tolerances={}, flops=312e9,
        bytes=1.0,
    )  # fmt: skip
    assert machine.percent_of_peak(case, 2.0, "NVIDIA A100-SXM4-80GB") == pytest.approx(50.0)
    assert machine.percent_of_peak(case, 2.0, "some other card") is None


def test_rows_of_a_card_tell_replays_from_the_host():
    stamp = {"gpu": "NVIDIA H200"}
    case = Case(
        name="n", shape="s", dtype="bfloat16", device="cuda", providers={}, reference="", tolerances={}, bytes=4.8e9
    )
    times = {name: [{"forward": ms, "total": ms}] for name, ms in (("ours", 4.0), ("peer", 2.0), ("loop", 9.0))}
    replays = {name: [{"forward": ms, "total": ms}] for name, ms in (("ours", 2.0), ("peer", 1.5))}
    events = [Event(STEP, False, 0, 9), Event("k", True, 1, 2)]
    seen = OnCard(replays, {"loop": "it waits"}, {"ours": Profile.of(events, 1)})
    ours, peer, loop = rows_of(case, times, {}, stamp, "bench_x", seen)
    assert (ours["time_ms"], ours["captured_ms"], ours["speedup_vs_best"]) == (4.0, 2.0, 0.5)
    assert (ours["captured_phases_ms"], ours["captured_speedup_vs_best"]) == ({"forward": 2.0}, 0.75)
    assert ours["percent_of_peak"] == pytest.approx(50.0)  # of the replay
    assert (ours["kernels"], ours["kernels_by_name"]) == (1.0, {"k": 1.0})
    assert peer["kernels_by_name"] is None
    assert (loop["captured_ms"], loop["captured_phases_ms"], loop["captured_why_not"]) == (None, None, "it waits")
    assert loop["captured_speedup_vs_best"] is None
    assert loop["percent_of_peak"] == pytest.approx(100 / 9, rel=1e-3)


def test_the_digest_of_the_sources_sees_a_change(tmp_path):
    for folder in ("unit_fast", "kernels/tuned", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "unit_fast" / "a.py").write_text("x = 1")
    digest = machine.sources.__wrapped__
    before = digest(tmp_path)
    (tmp_path / "benchmarks" / "results" / "a.jsonl").write_text("{}")  # results are no sources
    assert digest(tmp_path) == before
    (tmp_path / "kernels" / "tuned" / "h200.json").write_text("{}")
    assert digest(tmp_path) != before
    assert len(machine.environment()["sources"]) == 12


def test_results_of_a_card_have_a_file_of_their_own():
    assert results.path_of("bench_step", None).name == "bench_step.jsonl"
    assert results.path_of("bench_step", "NVIDIA H200").name == "bench_step_h200.jsonl"
    assert results.path_of("bench_step", "NVIDIA A100-SXM4-80GB").name == "bench_step_a100.jsonl"
    assert results.path_of("bench_step", "Some Card 9 (x)").name == "bench_step_some_card_9_x.jsonl"
