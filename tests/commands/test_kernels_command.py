"""``unit-fast kernels``: the table of what every kernel takes, without a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unit_fast_kernels.assembly import bounds
from unit_fast_kernels.assembly import budgets as _budgets
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.shared.cards import CARDS

from tests.planted_kernels import needs_compiler
from unit_fast.commands import main as cli
from unit_fast.report import kernels

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = ("--op", "residual_norm", "--arch", "sm_90", "--dtype", "bfloat16")
PROMISED = {
    "op", "arch", "dtype", "shape", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "occupancy", "bytes",
    "flops", "bound_us",
}  # fmt: skip


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["kernels", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@needs_compiler
def test_json(capsys):
    code, out, err = call(capsys, *CHOSEN, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    module = _budgets.module("residual_norm")
    assert {row["shape"] for row in rows} == set(module.SHAPES)
    assert {row["kernel"] for row in rows} >= {"_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel"}
    for row in rows:
        assert set(row) > PROMISED
        assert (row["op"], row["arch"], row["dtype"]) == ("residual_norm", "sm_90", "bfloat16")
        assert 16 <= row["registers"] <= 255
        assert (row["spill_bytes"], row["stack_bytes"]) == (0, 0)
        assert 0 < row["occupancy"] <= 1
        work = "_bwd" if row["operator"].endswith("bwd") else ""
        size = module.SHAPES[row["shape"]]
        assert row["size"] == list(size)
        assert row["bytes"] == getattr(module, "bytes_moved" + work)(size, _budgets.DTYPES["bfloat16"])
        assert row["flops"] == getattr(module, "flops" + work)(size)
        assert list(row["bound_us"]) == row["cards"]
        for card, us in row["bound_us"].items():
            assert us == pytest.approx(1e6 * row["bytes"] / CARDS[card].bandwidth, abs=1e-3)  # memory-bound
        assert row["per_score"] is None


@needs_compiler
def test_the_table_says_the_same(capsys):
    _, out, _ = call(capsys, *CHOSEN, "--json")
    rows = json.loads(out)
    code, out, err = call(capsys, *CHOSEN)
    assert (code, err) == (0, "")
    assert "residual_norm, sm_90; us: H100 / H200" in out
    assert f"{len(rows)} kernels, all within kernels/budgets.json" in out
    lines = [line.split() for line in out.splitlines() if " bf16 " in line]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        shown = (row["shape"], row["warps"], row["registers"], row["spill_bytes"])
        assert line[2:6] == [str(value) for value in shown]


@needs_compiler
def test_instructions_per_score_are_shown_where_there_are_scores(capsys):
    code, out, _ = call(capsys, "--op", "cross_attention,attention", "--arch", "sm_80", "--dtype", "bfloat16", "--json")
    assert code == 0
    rows = [row for row in json.loads(out) if row["per_score"]]
    assert {row["kernel"] for row in rows} == {
        "_attention_fwd_kernel", "_attention_bwd_q_kernel", "_attention_bwd_kv_kernel", "_cross_attention_fwd_kernel",
        "_cross_attention_bwd_kernel",
    }  # fmt: skip
    for row in rows:
        assert list(row["per_score"]) == list(bounds.PIPES)
        assert sum(row["per_score"].values()) == pytest.approx(row["instructions_per_score"], abs=0.01)
        assert 0 < row["issue_us"]["a100"] < row["pipes_us"]["a100"]
        assert row["per_score"]["tensor"] > 0.5
    _, out, _ = call(capsys, "--op", "attention", "--arch", "sm_80", "--dtype", "bfloat16")
    assert "attention, sm_80: instructions per score" in out
    assert f"{rows[0]['instructions_per_score']:.2f}" in out


@needs_compiler
def test_a_budget_that_is_exceeded(capsys, monkeypatch):
    monkeypatch.setattr(_budgets, "load", dict)
    code, out, _ = call(capsys, *CHOSEN)
    assert code == 1
    assert "over budget: residual_norm/_residual_norm_fwd_kernel sm_90 bfloat16" in out
    assert "all within" not in out
    code, out, _ = call(capsys, *CHOSEN, "--json")
    assert code == 1
    assert json.loads(out)


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "residual_nrom"), "--op: unknown 'residual_nrom'; nearest: residual_norm"),
        (("--op", ","), "--op: names nothing; known: "),
        (("--arch", "sm_80,sm_91"), "--arch: unknown 'sm_91'; nearest: sm_90, sm_80"),
        (("--dtype", "bf16"), "--dtype: unknown 'bf16'; nearest: bfloat16"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, said):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"unit-fast: {said}")
    assert err.count("\n") == 1


def test_a_kernel_that_does_not_compile_is_one_line(capsys, monkeypatch):
    def broken(*arguments):
        raise _record.AssemblyError("k for sm_80 (num_warps=4) does not compile:\n  CompilationError:\n at 3:4")

    monkeypatch.setattr(kernels, "require", lambda: None)
    monkeypatch.setattr(_budgets, "plan", broken)
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err == "unit-fast: k for sm_80 (num_warps=4) does not compile: CompilationError: at 3:4\n"


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("import sys; sys.modules['triton'] = None", "Triton is not installed: pip install triton (Linux only)"),
        ("import os; os.environ['TRITON_INTERPRET'] = '1'", "TRITON_INTERPRET is set: kernels are interpreted"),
    ],
)
def test_where_kernels_cannot_be_assembled(setup, said):
    code = f"{setup}\nimport sys\nfrom unit_fast.commands import main\nsys.exit(main.main(['kernels']))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"unit-fast: {said}")
    assert done.stderr.count("\n") == 1
