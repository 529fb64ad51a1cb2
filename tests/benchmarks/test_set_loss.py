"""The benchmarks of the set loss and of the attribute loss run, and refuse other losses, gradients and pairings."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import bench_attribute_loss, bench_set_loss


def quick(module, path, *arguments) -> int:
    return module.main(["--quick", "--threads", "1", "--rounds", "1", "--json", str(path), *arguments])


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_set_loss_runs(tmp_path, capsys, one_thread, device):
    path = tmp_path / "rows.jsonl"
    assert quick(bench_set_loss, path) == 0
    rows = rows_of(path)
    alone = ["eager", "ours", *(["batched", "compiled"] if device == "cuda" else [])]
    assert [(row["case"], row["provider"]) for row in rows] == [
        *((case, name) for case in ("unit_coco", "crowded") for name in alone),
        *(("unit_coco_step", name) for name in ("eager", "ours")),
    ]
    for row in rows:
        phases = ["matching"] if row["case"].endswith("_step") else []
        assert list(row["phases_ms"]) == [*phases, "losses", "backward"]
    printed = capsys.readouterr().out
    assert "unit_coco_step: ours / eager" in printed
    assert "aim" not in printed  # the aim is that of the whole shape


@pytest.mark.parametrize(
    ("case", "name", "spoil"),
    [
        ("unit_coco", "set_loss", lambda out: (out[0] * 1.001, *out[1:])),
        ("crowded", "set_loss", lambda out: (*out[:2], out[2].flip(0) + 0.01)),
        # The value stays, the gradient goes: what a wrong backward looks like.
        ("unit_coco_step", "set_loss", lambda out: (out[0].detach() + 0.5 * (out[0] - out[0].detach()), *out[1:])),
        ("unit_coco_step", "assignment", lambda out: (out[0].roll(1, -1), out[1])),
    ],
)
def test_what_differs_is_refused(tmp_path, capsys, monkeypatch, one_thread, case, name, spoil):
    right = getattr(bench_set_loss.ops, name)

    def spoilt(*arguments, **keywords):
        out = right(*arguments, **keywords)
        first = (*arguments, *keywords.values())[0]
        return out if first.dtype == torch.float64 else spoil(out)  # the gate's reference stays as it is

    monkeypatch.setattr(bench_set_loss.ops, name, spoilt)
    path = tmp_path / "rows.jsonl"
    assert quick(bench_set_loss, path, "--case", case) == 1
    assert not path.exists()
    assert "ours DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(("ours_ms", "word"), [(3.4, "met"), (3.6, "missed")])
def test_the_aim_is_told(capsys, ours_ms, word):
    shape = bench_set_loss.shape_of(bench_set_loss.STEP_SHAPES["unit_coco_step"])
    rows = [
        {"case": "unit_coco_step", "provider": name, "time_ms": ms, "device": "cpu", "shape": shape}
        for name, ms in (("eager", 10.0), ("ours", ours_ms))
    ]
    bench_set_loss.ratios(rows, Console())
    assert f"ours / eager {ours_ms / 10:.3f} (aim 0.35: {word})" in capsys.readouterr().out


def test_attribute_loss_runs(tmp_path, one_thread, device):
    path = tmp_path / "rows.jsonl"
    assert quick(bench_attribute_loss, path) == 0
    names = ["eager", "ours", *(["compiled"] if device == "cuda" else [])]
    assert [row["provider"] for row in rows_of(path)] == names


def test_attribute_loss_that_differs_is_refused(tmp_path, monkeypatch, one_thread):
    right = bench_attribute_loss.ops.attribute_loss
    monkeypatch.setattr(bench_attribute_loss.ops, "attribute_loss", lambda *a, **k: right(*a, **k) * 1.001)
    assert quick(bench_attribute_loss, tmp_path / "rows.jsonl") == 1
