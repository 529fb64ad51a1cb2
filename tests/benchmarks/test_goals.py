"""The project's goals: every one has a verdict, judged on replays, and never on what is not there."""

import pytest

from benchmarks import gpu_suite
from benchmarks.runner import goals

H200 = {"device": "cuda", "gpu": "NVIDIA H200"}


def row(benchmark, case, provider="ours", **figures):
    return {**H200, "benchmark": f"bench_{benchmark}", "case": case, "provider": provider, **figures}


def step(case, **figures):
    return row("step", case, status="ok", **figures)


def good(at=1.0):
    """Rows with which every goal of an H200 is met (``at`` 1) or missed (``at`` 2: twice as slow, or half as much)."""
    both = {"forward": 1e-3, "backward": 1e-3}
    flops = 4 * 2 * 8 * 4201 * 4201 * 32
    attention = {"forward": flops / 300e12 * 1e3, "backward": 2.5 * flops / 250e12 * 1e3}
    rows = [
        step("coco_b8", samples_per_s=230 / at),
        step(
            "coco_b2", samples_per_s=180 / at, waits=at - 1, copies_to_host=at - 1, copies_to_device=at - 1,
            kernels=390.0 if at == 1 else 1600.0, busy_share=0.98 / at,
        ),
        row("attention", "unit_encoder", captured_phases_ms={k: v * at for k, v in attention.items()}),
        row("match", "unit_coco", captured_ms=0.05 * at, time_ms=0.1 * at, waits=at - 1,
            kernels_by_name={"_match_cost_kernel": 1.0, "_assignment_kernel": at, "Memset (Device)": 3.0}),
        row("match", "unit_coco", "torch_linear_assignment", time_ms=1.4),
        row("set_loss", "unit_coco", kernels_by_name={"_set_loss_fwd_kernel": 1.0, "_set_loss_bwd_kernel": at}),
        row("optimizer", "all_used", captured_ms=1.2, percent_of_peak=92 / at),
        row("frozen_bn_act", "resnet50_layer1_block", kernels_by_name={"_frozen_bn_act_fwd_kernel": 2 * at}),
        row("data", "detection_train", images_per_s=400 / at**2),
        row("data", "detection_train", "torchvision_v2", images_per_s=150),
    ]  # fmt: skip
    fast = {k: v * (1 if at == 1 else 1e4) for k, v in both.items()}
    rows += [row("cross_attention", c, captured_phases_ms=fast) for c in ("unit_detection_b8", "unit_vqa_b8")]
    for case in goals.NORMS:
        rows.append(row("residual_norm", case, captured_ms=2e-3 * at, captured_phases_ms=fast))
        rows.append(row("residual_norm", case, "eager", captured_ms=6e-3))
    return rows


@pytest.mark.parametrize(("at", "verdict"), [(1, "met"), (2, "missed")])
def test_every_goal_is_judged(at, verdict):
    judged = goals.judge(good(at))
    assert len(judged) == len(goals.GOALS)
    assert {goal["goal"]: goal["verdict"] for goal in judged} == {goal.what: verdict for goal in goals.GOALS}
    assert all(goal["found"] is not None and goal["why"] is None for goal in judged)


def test_nothing_is_guessed():
    judged = goals.judge([])
    assert {goal["verdict"] for goal in judged} == {"not measured"}
    assert all(goal["why"] and goal["found"] is None for goal in judged)


def found(rows, what):
    return next(goal for goal in goals.judge(rows) if goal["goal"].endswith(what))


def test_why_a_goal_is_not_measured():
    out = found([step("coco_b8") | {"status": "out of memory"}], "bfloat16, batch 8")
    assert out["why"] == "bench_step, coco_b8, ours: out of memory"
    host = row("attention", "unit_encoder", captured_phases_ms=None, captured_why_not="it waits", time_ms=1.0)
    assert "was not captured: it waits" in found([host], "self-attention, forward")["why"]
    host = row("optimizer", "all_used", captured_ms=None, percent_of_peak=95.0)
    assert found([host], "201 M parameters")["why"] == "bench_optimizer, all_used, ours has no captured_ms"
    other = [{**r, "gpu": "NVIDIA H100 80GB HBM3"} for r in good()]
    out = found(other, "bfloat16, batch 8")
    assert (out["found"], out["verdict"]) == (230, "not measured")
    assert out["why"] == "the goal is for a100, h200; the rows are of h100"
    assert found(other, "matching: launches")["verdict"] == "met"  # for any card
    cpu = [{**r, "device": "cpu", "gpu": None} for r in good()]
    assert {goal["verdict"] for goal in goals.judge(cpu)} == {"not measured"}


def test_cards_are_not_mixed():
    with pytest.raises(ValueError, match="several cards: NVIDIA H100, NVIDIA H200"):
        goals.judge([*good(), {**good()[0], "gpu": "NVIDIA H100", "case": "coco_b1"}])


def test_the_latest_row_counts():
    assert found([step("coco_b2", kernels=900.0), step("coco_b2", kernels=650.0)], "batch 2: kernels")["found"] == 650


def test_a_goal_in_a_line():
    lines = [gpu_suite.line(goal) for goal in goals.judge(good())]
    assert "         met: COCO DC5 800x1344, bfloat16, batch 8: >= 220 images/s; 230" in lines
    lines = [gpu_suite.line(goal) for goal in goals.judge([])]
    wanted = ">= 80 (a100) or 220 (h200) images/s; no row of bench_step, coco_b8, ours"
    assert f"not measured: COCO DC5 800x1344, bfloat16, batch 8: {wanted}" in lines
