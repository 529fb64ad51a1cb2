"""The door to the kernels: which implementation runs, that it is said once, what exists."""

import logging

import pytest
import torch

from tests.kernels.common import SEED
from unit_fast import ops
from unit_fast.errors import UserError


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.delenv("UNIT_FAST_KERNELS", raising=False)
    monkeypatch.setattr(ops, "_logged", set())
    caplog.set_level(logging.INFO, logger="unit_fast.ops")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "unit_fast.ops"]


def test_implementation_is_said_once_for_each_reason(log):
    x = torch.ones(3)
    for _ in range(2):
        ops.dropout(x, 0.1, SEED)
        with ops.kernels("reference"):
            ops.dropout(x, 0.1, SEED)
    assert log() == ["dropout: cpu (tensors on cpu)", "dropout: reference (the mode is reference)"]


def test_mode_comes_from_the_innermost_block_then_the_environment(log, monkeypatch):
    assert ops.mode() == "auto"
    monkeypatch.setenv("UNIT_FAST_KERNELS", "reference")
    assert ops.mode() == "reference"
    with ops.kernels("auto"):
        assert ops.mode() == "auto"
        with ops.kernels("reference"):
            assert ops.mode() == "reference"
        assert ops.mode() == "auto"
    assert ops.mode() == "reference"


def test_unknown_mode_names_the_nearest(log, monkeypatch):
    with pytest.raises(UserError, match="'referense' is not a mode; nearest: reference"), ops.kernels("referense"):
        pass
    monkeypatch.setenv("UNIT_FAST_KERNELS", "fast")
    with pytest.raises(UserError, match="UNIT_FAST_KERNELS: 'fast' is not a mode"):
        ops.dropout(torch.ones(3), 0.1, SEED)


def test_mode_decides_what_is_called(log, monkeypatch):
    called = []
    known = {name: lambda *_, name=name: called.append(name) for name in ("reference", "cpu")}
    monkeypatch.setattr(ops.OPERATORS["dropout"], "implementations", known)
    ops.dropout(torch.ones(3), 0.1, SEED)
    ops.dropout(torch.ones(3, device="meta"), 0.1, SEED)
    with ops.kernels("reference"):
        ops.dropout(torch.ones(3), 0.1, SEED)
    assert called == ["cpu", "reference", "reference"]


def test_implementations_list_what_exists_and_what_is_taken(log):
    rows = {row.op: row for row in ops.implementations()}
    assert rows["attention"] == ("attention", ("reference", "cpu", "fused"), "cpu", "tensors on cpu")
    assert rows["assignment"] == ("assignment", ("reference", "fused"), "reference", "no other for cpu")
    assert all(callable(getattr(ops, op)) for op in rows)
    assert {row.op: row.taken for row in ops.implementations("cuda")}["attention"] == "fused"
    with ops.kernels("reference"):
        assert all(row.taken == "reference" for row in ops.implementations())
