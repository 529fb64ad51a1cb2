"""The benchmark runner refuses wrong providers, takes turns, and stamps its rows; the step benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _gate, _kernels, _machine, _run, bench_step, tables
from benchmarks.step import problems, providers

ROOT = Path(__file__).resolve().parents[2]


class Square(_run.Provider):
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


def benchmark(tmp_path, calls, *, error=0.0, phases=(), tolerance=1e-6, summary=None):
    case = _run.Case(
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
    return lambda args: _run.Benchmark(
        name="bench_square", module="tests.none", title="squares", method=["x times x"], excluded="nothing",
        cases=[case], summary=summary,
    )  # fmt: skip


def run(tmp_path, calls, *arguments, **changes) -> tuple[int, Path]:
    path = tmp_path / "rows.jsonl"
    threads = torch.get_num_threads()
    try:
        status = _run.main(
            benchmark(tmp_path, calls, **changes), ["--threads", str(threads), "--json", str(path), *arguments]
        )
    finally:
        torch.set_num_threads(threads)
    return status, path


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
    rows = [json.loads(line) for line in path.read_text().splitlines()]
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
    assert len(path.read_text().splitlines()) == 6  # appended


def test_results_hold_the_latest_row_of_each_provider(tmp_path):
    path = tmp_path / "results.jsonl"
    same = dict.fromkeys(("shape", "dtype", "device", "cpu", "cores", "gpu", "threads"), 1)
    rows = [{**same, "case": c, "provider": p, "time_ms": 1} for c in "ab" for p in ("ours", "peer")]
    _run.replace(rows, path)
    _run.replace([{**rows[0], "time_ms": 2}, {**rows[1], "threads": 2, "time_ms": 3}], path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
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
        return [check.key for check in _gate.compare(one, found, tolerances, norm) if not check.ok]

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
    code = "from benchmarks._machine import peak_resident; print(peak_resident())"
    ballast = torch.ones(250_000_000)  # 1 GB in this process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < ballast.numel() * 4


def test_percent_of_peak():
    case = _run.Case(
        name="n", shape="s", dtype="bfloat16", device="cuda", providers={}, reference="", tolerances={}, flops=312e9,
        bytes=1.0,
    )  # fmt: skip
    assert _machine.percent_of_peak(case, 2.0, "NVIDIA A100-SXM4-80GB") == pytest.approx(50.0)
    assert _machine.percent_of_peak(case, 2.0, "some other card") is None


# ------------------------------------------------------------------------------------------------- the step benchmark


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quick(path, *arguments) -> int:
    options = ["--quick", "--device", "cpu", "--threads", "1", "--rounds", "1", "--json", str(path)]
    return bench_step.main([*options, *arguments])


def test_step_benchmark_runs(tmp_path, capsys, one_thread):
    path = tmp_path / "rows.jsonl"
    assert quick(path, "--case", "qnli", "--case", "coco") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider) for case in ("coco", "qnli") for provider in ("eager", "library", "ours")
    ]
    for row in rows:
        assert list(row["phases_ms"]) == ["forward", "losses", "backward", "optimiser"]
        assert all(value > 0 for value in row["phases_ms"].values())
    assert "ours / eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["decoder.layers.1.linear2.weight", "text_encoder.layers.0.value.weight", "classifiers.glue_qnli.out.bias"]
)
def test_step_benchmark_refuses_another_model(tmp_path, capsys, monkeypatch, one_thread, name):
    """One tensor that is not the baseline's, by a twentieth, and there are no figures."""
    build = providers.Ours.__init__

    def spoilt(self, *arguments, **settings):
        build(self, *arguments, **settings)
        with torch.no_grad():
            dict(self.model.named_parameters())[name].mul_(1.05)

    monkeypatch.setattr(providers.Ours, "__init__", spoilt)
    path = tmp_path / "rows.jsonl"
    assert quick(path, "--case", "qnli", "--provider", "eager") == 1
    assert not path.exists()
    assert "ours DIFFERS" in capsys.readouterr().out


def test_gate_runs_the_path_that_is_timed():
    """With the gate's probability dropout is active in the model, and drops nothing."""
    shape, config = problems.QUICK["qnli"], problems.mmf_config(True)
    ours = providers.Ours(shape, config, problems.mmf_state(True))
    first, second = ours.outputs(), ours.outputs()
    assert all(torch.equal(first[key], second[key]) for key in first)
    decoder = ours.model.decoder
    assert decoder.layers[0].p == 0.1  # put back
    before = problems.set_dropout(ours.model, problems.DROPS_NOTHING)
    assert decoder.layers[0].p > 0
    assert len(before) > 5
    assert torch.equal(ours.model(ours.batch).scores, ours.model(ours.batch).scores)
    problems.set_dropout(ours.model, 0.1)
    assert not torch.equal(ours.model(ours.batch).scores, ours.model(ours.batch).scores)


def test_batches_are_what_they_say():
    for shape in problems.CASES.values():
        task, image, tokens, objects, *_ = shape
        if task == "detection_coco" and image[1] > 400:
            continue
        batch = problems.make_batch(*shape[:4])
        inputs, targets = problems.eager_inputs(batch)
        if tokens:
            assert batch.attention_mask.sum(1).tolist() == list(tokens)
            assert batch.input_ids.shape[1] == max(tokens)
            assert inputs["ids"].shape[1] == problems.TASKS[task][4]
            assert torch.equal(inputs["input_mask"].sum(1), batch.attention_mask.sum(1))
        if objects:
            assert [len(t["labels"]) for t in targets] == list(objects)
            low = batch.boxes[..., :2] - batch.boxes[..., 2:] / 2
            high = batch.boxes[..., :2] + batch.boxes[..., 2:] / 2
            assert bool(((low >= -1e-6) & (high <= 1 + 1e-6)).all())


def test_memory_child(one_thread):
    command = [sys.executable, "-m", "benchmarks.bench_step", "--quick", "--threads", "1"]
    command += ["--memory-child", "qnli", "ours"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert 0.1 < figures["host_gib"] < 4
    assert figures["device_gib"] is None


def test_readme_tables_are_those_of_the_results(tmp_path, capsys):
    assert tables.main(["--check"]) == 0
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results: bench_step -->\nold\n<!-- end of results -->\nb\n")
    assert tables.main(["--check", "--file", str(readme)]) == 1
    assert "python -m benchmarks.tables" in capsys.readouterr().err
    assert tables.main(["--file", str(readme)]) == 0
    made = readme.read_text()
    assert made.startswith("a\n<!-- results: bench_step -->\n| machine | problem |")
    assert made.endswith(".\n<!-- end of results -->\nb\n")
    rows = tables.load("bench_step")
    ours, eager = (next(r for r in rows if (r["case"], r["provider"]) == ("coco", p)) for p in ("ours", "eager"))
    assert f"| {ours['time_ms'] / eager['time_ms']:.2f} |" in made
    with pytest.raises(FileNotFoundError, match="run: python -m benchmarks.bench_nothing"):
        tables.load("bench_nothing")
    with pytest.raises(FileNotFoundError, match="run: python -m benchmarks.bench_set_loss$"):
        tables.load("bench_set_loss_h999")
    readme.write_text("<!-- results: bench_nothing -->\n<!-- end of results -->\n")
    assert tables.main(["--file", str(readme)]) == 2
    assert "bench_nothing.jsonl is missing" in capsys.readouterr().err


def test_tables_of_a_cards_operators_have_both_times():
    stamp = {"device": "cuda", "gpu": "NVIDIA H200", "cpu": "Xeon", "threads": 2, "versions": {"torch": "2"}}
    stamp |= {"commit": "abc", "date": "2026-11-27", "case": "c", "shape": "s", "dtype": "bfloat16", "driver": "580"}
    rows = [
        {**stamp, "provider": name, "captured_ms": captured, "time_ms": host, "p20_ms": host - 0.1,
         "p80_ms": host + 0.1, "percent_of_peak": share}
        for name, captured, host, share in (("ours", 0.02, 0.4, 85.0), ("eager", 0.06, 0.2, 30.0), ("loop", None, 9, 1))
    ]  # fmt: skip
    made = tables.table(rows).splitlines()
    assert made[2] == "| NVIDIA H200 | s, bfloat16 | eager | 0.06 | 0.33 | 0.2 (0.1 to 0.3) | 2.00 | 30 |"
    assert made[3] == "| NVIDIA H200 | s, bfloat16 | loop | not captured |  | 9 (8.9 to 9.1) | 0.04 | 1 |"
    assert made[4] == "| NVIDIA H200 | s, bfloat16 | ours | 0.02 |  | 0.4 (0.3 to 0.5) |  | 85 |"


def test_rows_of_a_card_tell_replays_from_the_host():
    stamp = {"gpu": "NVIDIA H200"}
    case = _run.Case(
        name="n", shape="s", dtype="bfloat16", device="cuda", providers={}, reference="", tolerances={}, bytes=4.8e9
    )
    times = {name: [{"forward": ms, "total": ms}] for name, ms in (("ours", 4.0), ("peer", 2.0), ("loop", 9.0))}
    replays = {name: [{"forward": ms, "total": ms}] for name, ms in (("ours", 2.0), ("peer", 1.5))}
    events = [_kernels.Event(_kernels.STEP, False, 0, 9), _kernels.Event("k", True, 1, 2)]
    seen = _run.OnCard(replays, {"loop": "it waits"}, {"ours": _kernels.Profile.of(events, 1)})
    ours, peer, loop = _run.rows_of(case, times, {}, stamp, "bench_x", seen)
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
    digest = _machine.sources.__wrapped__
    before = digest(tmp_path)
    (tmp_path / "benchmarks" / "results" / "a.jsonl").write_text("{}")  # results are no sources
    assert digest(tmp_path) == before
    (tmp_path / "kernels" / "tuned" / "h200.json").write_text("{}")
    assert digest(tmp_path) != before
    assert len(_machine.environment()["sources"]) == 12
