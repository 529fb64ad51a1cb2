"""The benchmark of captured steps runs, and its gate sees a captured step that is not the eager one."""

import json

import pytest

from benchmarks import bench_step_graph


def test_it_runs_small_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--threads", "1", "--rounds", "1", "--case", "qnli", "--json", str(path)]
    assert bench_step_graph.main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["case"], r["provider"], r["device"]) for r in rows] == [("qnli", p, "cpu") for p in ("eager", "ours")]
    assert "nothing was captured" in capsys.readouterr().out


def test_its_gate_sees_a_step_that_differs(monkeypatch, capsys):
    monkeypatch.setattr(bench_step_graph, "MAX_NORM", 1e-9)
    step = bench_step_graph.Step

    class Other(step):
        def __init__(self, case, config, device, graph):
            super().__init__(case, config, device, graph)
            if graph:
                self.optimizer.max_norm = 0.1

    monkeypatch.setattr(bench_step_graph, "Step", Other)
    assert bench_step_graph.main(["--quick", "--threads", "1", "--case", "qnli", "--no-results"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert "no figures" in out


def test_without_a_card_it_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bench_step_graph.main(["--no-results"])
    assert end.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
