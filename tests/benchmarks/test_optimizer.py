"""The optimiser's benchmark runs, refuses a wrong update, and is a step of the suite."""

import json

import pytest
import torch

from benchmarks import bench_optimizer, gpu_suite


def quick(path, *arguments) -> int:
    return bench_optimizer.main(["--quick", "--threads", "1", "--rounds", "1", "--json", str(path), *arguments])


def test_runs(tmp_path, one_thread, capsys):
    path = tmp_path / "rows.jsonl"
    assert quick(path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["authors", "foreach", "torch fused", "reference", "ours"]
    if not torch.cuda.is_available():
        assert [(row["case"], row["provider"]) for row in rows] == [
            (case, name) for case in ("vision_half", "all_used") for name in names
        ]
    printed = capsys.readouterr().out
    assert "vision_half: ours / authors = " in printed
    assert "all_used: ours / authors = " in printed


@pytest.mark.parametrize("fault", ["twice", "nothing", "gradient"])
def test_a_wrong_update_is_refused(tmp_path, monkeypatch, one_thread, fault):
    right = bench_optimizer.ours("auto")

    def wrong(optimizer, world):
        if fault == "gradient":
            for p in world.params:
                if p.grad is not None:
                    p.grad.add_(0.1)
        if fault != "nothing":
            right(optimizer, world)
        if fault == "twice":
            right(optimizer, world)

    monkeypatch.setattr(bench_optimizer, "ours", lambda mode: wrong)
    assert quick(tmp_path / "rows.jsonl", "--case", "vision_half", "--provider", "authors") == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_world_is_the_models(one_thread):
    half, whole = (bench_optimizer.World("demo_quick", detection, "cpu") for detection in (True, False))
    assert len(half.params) == len(whole.params)
    assert 0 < half.used.sum() < len(half.params) == whole.used.sum()
    assert [p.grad is not None for p in half.params] == half.flags
    whole.params[0].grad.zero_()
    whole.restore(2.0)
    assert torch.equal(whole.params[0].grad, 2 * whole.raw[0])


def test_the_suite_runs_it(tmp_path):
    assert "bench_optimizer" in [step.name for step in gpu_suite.steps(tmp_path, quick=True, cuda=False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a card says")
def test_tuning_needs_a_card(capsys):
    assert bench_optimizer.main(["--tune"]) == 2
    assert "--tune needs a CUDA device" in capsys.readouterr().err
