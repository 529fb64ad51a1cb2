"""The model, its losses and gradients, and the optimiser against the authors' own (see ``tests/parity.py``)."""

from pathlib import Path

import pytest
import torch

from tests import parity
from tests.fixtures.parity import check

KIT = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
SMALL = check.cases(parity.FIXTURES)
FULL = [s for s in check.cases(KIT) if s.name.startswith("full_")] if KIT.is_dir() else []


def _id(stem):
    return stem.name


@pytest.mark.parametrize("stem", SMALL, ids=_id)
def test_small_case_in_float64(stem):
    report = parity.run_case(stem)
    assert report.ok, str(report)


@pytest.mark.parametrize("stem", SMALL[::4], ids=_id)
def test_small_case_in_float32(stem):
    report = parity.run_case(stem, torch.float32)
    assert report.ok, str(report)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("stem", FULL, ids=_id)
def test_full_size_case(stem, dtype):
    report = parity.run_case(stem, dtype)
    assert report.ok, str(report)


@pytest.mark.parametrize("variant", ["plain", "skip"])
def test_optimizer_trajectory(variant):
    report = parity.run_optimizer(parity.FIXTURES, variant)
    assert report.ok, str(report)


def test_runner_fails_on_a_changed_result(monkeypatch, capsys):
    """Negative control: a wrong loss weight must be found and must fail the command."""
    stem = next(s for s in SMALL if s.name == "small_separate__coco")

    def wrong(state, config, **changes):
        return from_mmf(state, {**config, "bbox_loss_coef": 4.9}, **changes)

    from_mmf = parity.from_mmf
    monkeypatch.setattr(parity, "from_mmf", wrong)
    assert parity.main([str(parity.FIXTURES), "--case", stem.name]) == 1
    assert capsys.readouterr().out.startswith("FAIL  small_separate__coco")


def test_runner_names_an_empty_folder(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    assert "no cases" in capsys.readouterr().err
