"""The matching benchmark runs, refuses wrong pairs, and its peers get the problems that they take."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks import bench_match, gpu_suite


def quick(path, *arguments) -> int:
    return bench_match.main(["--quick", "--threads", "1", "--json", str(path), *arguments])


def solver(cost):
    """What torch_linear_assignment.batch_linear_assignment promises: [B,W,T] -> the task of each worker."""
    assert cost.is_contiguous()
    found = torch.full(cost.shape[:2], -1)
    for one, tasks in zip(cost, found):
        rows, columns = linear_sum_assignment(one)
        tasks[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


@pytest.fixture
def peer(monkeypatch):
    module = SimpleNamespace(batch_linear_assignment=solver)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", module)
    monkeypatch.setattr(bench_match._pointwise, "installed", list)


def test_runs(tmp_path, one_thread, peer):
    path = tmp_path / "rows.jsonl"
    assert quick(path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["detr", "scipy_batched", "torch_linear_assignment", "ours"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, name) for case in ("coco", "solve_4x20x6") for name in names
    ]
    assert all(set(row["phases_ms"]) == {"cost", "solve"} for row in rows if row["case"] == "coco")


@pytest.mark.parametrize("case", ["coco", "solve_4x20x6"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda query: query.flip(-1),  # the right queries of other targets
        lambda query: query.masked_fill(query == query.amax(-1, keepdim=True), -1),  # one pair less
        lambda query: query.amin(-1, keepdim=True).expand_as(query),  # one query several times
    ],
)
def test_wrong_pairs_are_refused(tmp_path, monkeypatch, one_thread, case, spoil):
    right = bench_match.Ours.query
    monkeypatch.setattr(bench_match.Ours, "query", lambda self, marks: spoil(right(self, marks)))
    assert quick(tmp_path / "rows.jsonl", "--case", case) == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_problems_are_what_they_say():
    for shapes in (bench_match.SHAPES, bench_match.CPU_SHAPES):
        for _, images, _, _, targets, mean in shapes.values():
            counts = bench_match.counts_of(images, targets, mean)
            assert counts.shape == (images,)
            assert int(counts.min()) >= 0
            assert int(counts.max()) <= targets
            assert float(counts.double().mean()) == pytest.approx(mean, abs=0.5)
    made = bench_match.predictions((2, 3, 30, 9, 5, 2), "cpu")
    query = bench_match.Ours(made).query(lambda phase: None)
    probability = made["logits"].softmax(-1)
    for image, count in enumerate(made["counts"].tolist()):
        for target in range(count):
            paired = probability[0, image, query[0, image, target]]
            assert paired[made["labels"][image, target]] > 0.5


def test_the_suite_runs_it(tmp_path):
    names = [step.name for step in gpu_suite.steps(tmp_path, quick=True, cuda=False)]
    assert "bench_match" in names


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a card says")
def test_tuning_needs_a_card(capsys):
    assert bench_match.main(["--tune"]) == 2
    assert "--tune needs a CUDA device" in capsys.readouterr().err
