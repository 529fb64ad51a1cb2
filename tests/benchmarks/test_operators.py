"""The benchmarks of operators run, and refuse what differs; their problems are what they say."""

import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from scipy.optimize import linear_sum_assignment

from benchmarks import (
    bench_attention,
    bench_attribute_loss,
    bench_bias_act_dropout,
    bench_cross_attention,
    bench_dropout,
    bench_frozen_bn_act,
    bench_match,
    bench_optimizer,
    bench_residual_norm,
    bench_set_loss,
    bench_step,
)
from tests.benchmarks.common import quick, rows_of
from unit_fast import ops

CUDA = torch.cuda.is_available()


def solver(cost):
    """What torch_linear_assignment.batch_linear_assignment promises: [B,W,T] -> the task of each worker."""
    assert cost.is_contiguous()
    found = torch.full(cost.shape[:2], -1)
    for one, tasks in zip(cost, found):
        rows, columns = linear_sum_assignment(one)
        tasks[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


@pytest.fixture
def solver_is_installed(monkeypatch):
    module = SimpleNamespace(batch_linear_assignment=solver)
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", module)
    monkeypatch.setattr(bench_match, "installed", list)


SIMPLE = ["eager", "ours", *(["compiled"] if CUDA else [])]
OPTIMISERS = ["authors", "foreach", "torch fused", "reference", "ours"]
MATCHERS = ["detr", "scipy_batched", "torch_linear_assignment", "ours"]
ROWS = {
    bench_dropout: {"bert_base_embeddings": SIMPLE},
    bench_bias_act_dropout: {"encoder_bias": SIMPLE, "bert_base": SIMPLE},
    bench_frozen_bn_act: {"inner": SIMPLE, "block_scaled": SIMPLE},
    bench_residual_norm: {"encoder_pos": SIMPLE, "bert_base": SIMPLE},
    bench_attribute_loss: {"unit_vg": SIMPLE},
    bench_set_loss: {
        **dict.fromkeys(("unit_coco", "crowded"), ["eager", "ours", *(["batched", "compiled"] if CUDA else [])]),
        "unit_coco_step": ["eager", "ours"],
    },
    bench_match: dict.fromkeys(("coco", "solve_4x20x6"), MATCHERS),
    bench_optimizer: dict.fromkeys(("vision_half", "all_used"), OPTIMISERS),
}
"""Benchmark -> providers of each case of a quick run, without what may be installed on a card."""
PHASES = {
    bench_set_loss: {
        "unit_coco": ["losses", "backward"], "crowded": ["losses", "backward"],
        "unit_coco_step": ["matching", "losses", "backward"],
    },
    bench_match: {"coco": ["cost", "solve"], "solve_4x20x6": []},
    bench_optimizer: dict.fromkeys(("vision_half", "all_used"), ["clip and update"]),
}  # fmt: skip


@pytest.mark.parametrize("benchmark", ROWS, ids=lambda benchmark: benchmark.__name__.rpartition(".")[2])
def test_runs(tmp_path, capsys, one_thread, solver_is_installed, benchmark):
    path = tmp_path / "rows.jsonl"
    assert quick(benchmark.main, path) == 0
    rows = rows_of(path)
    if not CUDA or benchmark not in (bench_residual_norm, bench_optimizer):  # a card adds the peers that are installed
        assert [(row["case"], row["provider"]) for row in rows] == [
            (case, name) for case, names in ROWS[benchmark].items() for name in names
        ]
    for row in rows:
        assert row["benchmark"] == benchmark.__name__.rpartition(".")[2]
        assert list(row["phases_ms"]) == PHASES.get(benchmark, {}).get(row["case"], ["forward", "backward"])
    printed = capsys.readouterr().out
    for other in {bench_set_loss: ["eager"], bench_optimizer: ["authors"]}.get(benchmark, ()):
        for case in ROWS[benchmark]:
            times = {row["provider"]: row["time_ms"] for row in rows if row["case"] == case}
            assert f"{case}: ours is {times[other] / times['ours']:.2f} times as fast as {other}" in printed
        assert "aim" not in printed  # the aim is that of the whole shape


@pytest.mark.parametrize("benchmark", [bench_attention, bench_cross_attention], ids=["attention", "cross_attention"])
def test_attention_runs(tmp_path, one_thread, benchmark):
    path = tmp_path / "rows.jsonl"
    case = "bert" if benchmark is bench_attention else "vqa_eval"
    assert quick(benchmark.main, path, "--case", case, "--provider", "eager") == 0
    assert [(row["case"], row["provider"]) for row in rows_of(path)] == [(case, "eager"), (case, "ours")]


@pytest.mark.skipif(CUDA, reason="what a machine without a card says")
@pytest.mark.parametrize("benchmark", [*ROWS, bench_attention, bench_cross_attention])
def test_tuning_needs_a_card(capsys, benchmark):
    assert benchmark.main(["--tune"]) == 2
    assert "--tune needs a CUDA device" in capsys.readouterr().err


def test_only_benchmarks_of_operators_tune(capsys):
    with pytest.raises(SystemExit):
        bench_step.main(["--tune"])
    assert "unrecognized arguments: --tune" in capsys.readouterr().err


def refused(benchmark, path, capsys, *arguments) -> bool:
    """Whether a run ends without figures because ours differs."""
    status = quick(benchmark.main, path, *arguments)
    return status == 1 and not path.exists() and "ours DIFFERS" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize("case", ["coco", "solve_4x20x6"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda query: query.flip(-1),  # the right queries of other targets
        lambda query: query.masked_fill(query == query.amax(-1, keepdim=True), -1),  # one pair less
        lambda query: query.amin(-1, keepdim=True).expand_as(query),  # one query several times
    ],
)
def test_wrong_pairs_are_refused(tmp_path, monkeypatch, capsys, one_thread, case, spoil):
    right = bench_match.Ours.query
    monkeypatch.setattr(bench_match.Ours, "query", lambda self, marks: spoil(right(self, marks)))
    assert refused(bench_match, tmp_path / "rows.jsonl", capsys, "--case", case)


def test_problems_of_matching_are_what_they_say():
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


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("case", "name", "spoil"),
    [
        ("unit_coco", "set_loss", lambda out: (out[0] * 1.001, *out[1:])),
        ("crowded", "set_loss", lambda out: (*out[:2], out[2].flip(0) + 0.01)),
        # The value stays, the gradient goes: what a wrong backward looks like.
        ("unit_coco_step", "set_loss", lambda out: (out[0].detach() + 0.5 * (out[0] - out[0].detach()), *out[1:])),
        ("unit_coco_step", "assignment", lambda out: (out[0].roll(1, -1), out[1])),
        ("unit_vg", "attribute_loss", lambda out: out * 1.001),
    ],
)
def test_losses_that_differ_are_refused(tmp_path, capsys, monkeypatch, one_thread, case, name, spoil):
    right = getattr(ops, name)

    def spoilt(*arguments, **keywords):
        out = right(*arguments, **keywords)
        first = (*arguments, *keywords.values())[0]
        return out if first.dtype == torch.float64 else spoil(out)  # the gate's reference stays as it is

    monkeypatch.setattr(ops, name, spoilt)
    benchmark = bench_attribute_loss if name == "attribute_loss" else bench_set_loss
    assert refused(benchmark, tmp_path / "rows.jsonl", capsys, "--case", case)


@pytest.mark.parametrize(("ours_ms", "word"), [(3.4, "met"), (3.6, "missed")])
def test_the_aim_is_told(capsys, ours_ms, word):
    shape = bench_set_loss.shape_of(bench_set_loss.STEP_SHAPES["unit_coco_step"])
    rows = [
        {"case": "unit_coco_step", "provider": name, "time_ms": ms, "device": "cpu", "shape": shape}
        for name, ms in (("eager", 10.0), ("ours", ours_ms))
    ]
    bench_set_loss.ratios(rows, Console())
    assert f"ours is {10 / ours_ms:.2f} times as fast as eager (aim 2.86: {word})" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("fault", ["twice", "nothing", "gradient"])
def test_a_wrong_update_is_refused(tmp_path, monkeypatch, capsys, one_thread, fault):
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
    arguments = ("--case", "vision_half", "--provider", "authors")
    assert refused(bench_optimizer, tmp_path / "rows.jsonl", capsys, *arguments)


def test_the_world_is_the_models(one_thread):
    half, whole = (bench_optimizer.World("demo_quick", detection, "cpu") for detection in (True, False))
    assert len(half.params) == len(whole.params)
    assert 0 < half.used.sum() < len(half.params) == whole.used.sum()
    assert [p.grad is not None for p in half.params] == half.flags
    whole.params[0].grad.zero_()
    whole.restore(2.0)
    assert torch.equal(whole.params[0].grad, 2 * whole.raw[0])
