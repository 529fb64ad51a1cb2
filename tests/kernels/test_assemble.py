"""Every kernel assembles for sm_80 and sm_90 within its budget, without a card; and planted faults are caught."""

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
from unit_fast_kernels.assembly import assemble as _assemble
from unit_fast_kernels.assembly import bounds
from unit_fast_kernels.assembly import budgets as _budgets
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.shared.cards import CARDS

from tests.planted_kernels import launch_matmul, launch_scale, needs_compiler

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------------------------------------------- every kernel


EXACT_PRODUCTS = ("attention",)
OTHER_REGIME = "unit_detection"


def representative(op: str, dtype: str, shape: str) -> bool:
    """What CI assembles: bf16 of every shape, the other dtypes of the op's first (attention has two regimes), but no
    exact float32 products, which take up to a minute each. The rest is marked long."""
    if dtype == "float32" and op in EXACT_PRODUCTS:
        return False
    return dtype == "bfloat16" or shape in (next(iter(_budgets.module(op).SHAPES)), OTHER_REGIME)


def assert_within_budget(rows):
    wrong, better = _budgets.check(rows, _budgets.load())
    if better:
        warnings.warn("better than its budget: " + "; ".join(better), stacklevel=2)
    assert not wrong, "\n".join(wrong)


@needs_compiler
@pytest.mark.parametrize("op", _budgets.ops())
def test_kernels_assemble_within_their_budgets(op):
    assert_within_budget(_budgets.rows(_budgets.plan([op], wanted=representative)))


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("op", _budgets.ops())
def test_all_dtypes_of_all_shapes_assemble_within_their_budgets(op):
    assert_within_budget(_budgets.rows(_budgets.plan([op])))


@pytest.fixture(scope="module")
def everything():
    """All launches of all ops, recorded and not assembled."""
    return _budgets.plan()


@needs_compiler
def test_the_table_has_exactly_what_is_launched(everything):
    def places(table, place=()):
        if len(place) == 4:
            return {place}
        return {found for key in table for found in places(table[key], (*place, key))}

    assert places(_budgets.load()) == {planned.place for planned in everything}


@needs_compiler
def test_every_kernel_and_operator_takes_part(everything):
    """No kernel is left out because no shape launches it."""
    kernels, operators = set(), set()
    for path in (ROOT / "kernels").rglob("*.py"):
        parts = path.relative_to(ROOT / "kernels").with_suffix("").parts
        module = _budgets.module(".".join(part for part in parts if part != "__init__"))
        kernels |= {name for name in vars(module) if name.endswith("_kernel") and hasattr(module, "jit")}
        operators |= set(re.findall(r"register\(\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert {planned.launch.name for planned in everything} == kernels
    assert {planned.operator for planned in everything} == operators
    assert {planned.arch for planned in everything} == set(_assemble.ARCHITECTURES)


# ----------------------------------------------------------------------------------------------- what must be caught


class PlantedOp:
    """Stands for a kernel module whose one kernel computes 64 x 64 scores in a turn of its loop."""

    SHAPES = {"any": (4096,)}

    def __init__(self, scores=True):
        if scores:
            self.score_tile = lambda kernel, constants: constants["M"] * constants["N"]

    @staticmethod
    def scores(shape):
        return shape[0] * 1000

    @staticmethod
    def bytes_moved(shape, dtype):
        return shape[0] * dtype.itemsize * 1000

    @staticmethod
    def flops(shape):
        return shape[0] * 64000


@pytest.fixture(scope="module")
def planted_rows():
    """Row by name: products without a fault, on both architectures; one that spills; one with too many stages."""
    launches = {
        "fine": ("sm_80", lambda: launch_matmul(64, 64, 32, 2)),
        "hopper": ("sm_90", lambda: launch_matmul(64, 64, 32, 2)),
        "spills": ("sm_80", lambda: launch_matmul(128, 256, 64, 2)),
        "shared": ("sm_80", lambda: launch_matmul(128, 128, 128, 4, warps=8)),
    }
    rows = {}
    for name, (arch, function) in launches.items():
        (launch,) = _record.record(function, "a100")
        planned = _budgets.Planned(
            op="planted", operator="planted", arch=arch, cards=_assemble.ARCHITECTURES[arch], dtype="bfloat16",
            shape="any", launch=launch,
        )  # fmt: skip
        rows[name] = _budgets.Row(planned=planned, assembled=_assemble.assemble(launch, arch))
    return rows


@pytest.fixture
def planted(planted_rows, monkeypatch):
    monkeypatch.setattr(_budgets, "module", lambda op: PlantedOp())
    return planted_rows


def budget_of(row, **changes):
    (name, arch, dtype, shape), figures = row.planned.place, row.figures()
    return {name: {arch: {dtype: {shape: figures | changes}}}}


@needs_compiler
def test_within_its_budget(planted):
    assert _budgets.check([planted["fine"]], budget_of(planted["fine"])) == ([], [])
    assert planted["fine"].figures()["spill_bytes"] == 0


@needs_compiler
def test_a_spilling_kernel_is_caught_whatever_its_budget_says(planted):
    row = planted["spills"]
    assert row.figures()["spill_bytes"] > 0
    wrong, _ = _budgets.check([row], budget_of(row, reason="we like it so"))
    assert any("spill_bytes" in line and "none may be" in line for line in wrong), wrong
    assert any("stack_bytes" in line for line in wrong), wrong


@needs_compiler
def test_a_spilling_float32_kernel_needs_a_reason_and_a_bound(planted):
    row = planted["spills"]
    exact = _budgets.Row(planned=_budgets.Planned(**{**vars(row.planned), "dtype": "float32"}), assembled=row.assembled)
    wrong, _ = _budgets.check([exact], budget_of(exact))
    assert any("give a reason" in line for line in wrong), wrong
    assert _budgets.check([exact], budget_of(exact, reason="exact products")) == ([], [])
    spilled = row.figures()["spill_bytes"]
    wrong, _ = _budgets.check([exact], budget_of(exact, reason="exact products", spill_bytes=spilled - 4))
    assert len(wrong) == 1
    assert f"spill_bytes {spilled}, the budget is {spilled - 4}" in wrong[0]


@needs_compiler
def test_too_much_shared_memory_is_caught(planted):
    row = planted["shared"]
    wrong, _ = _budgets.check([row], budget_of(row))
    assert len(wrong) == 1
    assert "bytes of shared memory; a block has 166912" in wrong[0]
    assert row.assembled.occupancy == 0


@needs_compiler
@pytest.mark.parametrize(
    ("figure", "step"),
    [("registers", 1), ("shared_bytes", 16), ("occupancy", -1 / 64), ("instructions_per_score", 0.01)],
)
def test_worse_than_its_budget_fails_and_better_is_told(planted, figure, step):
    row = planted["fine"]
    value = row.figures()[figure]
    wrong, better = _budgets.check([row], budget_of(row, **{figure: value - step}))
    assert (len(wrong), better) == (1, [])
    assert figure in wrong[0]
    wrong, better = _budgets.check([row], budget_of(row, **{figure: value + step}))
    assert (wrong, len(better)) == ([], 1)
    assert figure in better[0]


@needs_compiler
def test_a_kernel_without_a_budget_is_caught(planted):
    wrong, _ = _budgets.check([planted["fine"]], {})
    assert len(wrong) == 1
    assert "no budget" in wrong[0]
    missing = budget_of(planted["fine"])
    del missing["planted/matmul"]["sm_80"]["bfloat16"]["any"]["registers"]
    wrong, _ = _budgets.check([planted["fine"]], missing)
    assert len(wrong) == 1
    assert "the budget is None" in wrong[0]


@needs_compiler
def test_the_table_is_written_and_keeps_its_reasons(planted, tmp_path):
    path = tmp_path / "budgets.json"
    old = budget_of(planted["fine"], registers=999, reason="why") | {"other/kernel": {"sm_80": {}}}
    path.write_text(json.dumps(old))
    _budgets.write([planted["fine"], planted["hopper"]], path, only=["planted"])
    table = _budgets.load(path)
    assert table["other/kernel"] == {"sm_80": {}}
    assert table["planted/matmul"]["sm_80"]["bfloat16"]["any"] == planted["fine"].figures() | {"reason": "why"}
    assert table["planted/matmul"]["sm_90"]["bfloat16"]["any"] == planted["hopper"].figures()
    assert list(tmp_path.iterdir()) == [path]
    _budgets.write([planted["hopper"]], path)
    assert list(_budgets.load(path)) == ["planted/matmul"]
    assert list(_budgets.load(path)["planted/matmul"]) == ["sm_90"]


@needs_compiler
def test_the_worst_of_several_launches_counts(planted):
    fine, shared = planted["fine"], planted["shared"]
    ((_, figures),) = _budgets.worst([fine, shared]).items()
    assert figures["shared_bytes"] == shared.assembled.shared_bytes > fine.assembled.shared_bytes
    assert figures["occupancy"] == min(fine.assembled.occupancy, shared.assembled.occupancy)


@needs_compiler
@pytest.mark.parametrize(("name", "opcode", "count"), [("fine", "HMMA", 16), ("hopper", "HGMMA", 2)])
def test_the_hot_loop_of_a_real_binary(planted, name, opcode, count):
    """64 x 64 x 32 products in a turn: by 4 warps in 16 x 8 x 16, or in two 64 x 64 x 16 of the warp group."""
    row = planted[name]
    tensor = {k: n for k, n in row.loop.items() if bounds.pipe_of(k) == "tensor"}
    assert all(k.startswith(opcode + ".") for k in tensor)
    assert sum(tensor.values()) == count
    assert row.scores_per_thread == 32
    assert row.instructions_per_score == pytest.approx(sum(row.loop.values()) / 32, abs=0.005)
    assert sum(row.per_score.values()) == pytest.approx(row.instructions_per_score, abs=0.005)


@needs_compiler
def test_bounds_of_a_row(planted, monkeypatch):
    fine = planted["fine"]
    card = CARDS["a100"]
    assert fine.bytes == 4096 * 2000
    assert fine.bound_us("a100") == pytest.approx(4096 * 2000 / 2.039e6)
    issue = 4096e3 / 32 / 32 * sum(fine.loop.values()) / card.cycles_per_us
    assert fine.issue_us("a100") == pytest.approx(issue)
    assert fine.pipes_us("a100") > 0
    # Without scores: a kernel without loops issues all its instructions once a warp ...
    without = PlantedOp(scores=False)
    monkeypatch.setattr(_budgets, "module", lambda op: without)
    (launch,) = _record.record(launch_scale, "a100")
    straight = _budgets.Row(
        planned=_budgets.Planned(**{**vars(fine.planned), "launch": launch}),
        assembled=_assemble.assemble(launch, "sm_80"),
    )
    count = sum(straight.assembled.instructions.values()) * 4 * 4
    assert straight.issue_us("a100") == pytest.approx(count / card.cycles_per_us)
    # ... and one with a loop needs to be told how often that turns.
    plain = _budgets.Row(planned=fine.planned, assembled=fine.assembled)
    assert (plain.issue_us("a100"), plain.pipes_us("a100"), plain.per_score) == (None, None, None)
    without.loop_turns = lambda kernel, constants, shape: 100
    told = _budgets.Row(planned=fine.planned, assembled=fine.assembled)
    whole, loop = sum(fine.assembled.instructions.values()), sum(fine.loop.values())
    assert told.warp_instructions == 4 * (99 * loop + whole)


# ---------------------------------------------------------------------------------------------------------------- lint

TICKET = ("is_last", "tl.atomic_add(counter_ptr, 1, sem='acq_rel', scope='gpu')")
"""The one atomic there may be, and where: it counts programs, so that no result depends on its order."""
HOST_READS = {"item", "cpu", "tolist", "numpy", "nonzero", "unique", "synchronize"}


def faults(source: str) -> list[str]:
    """What a kernel or launcher may not do, by line: masked loads without ``other``, atomics, reads by the host."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        launches = any(isinstance(call.func, ast.Subscript) for call in calls)
        if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
            for call in calls:
                name, keywords = ast.unparse(call.func), {k.arg for k in call.keywords}
                masked = "mask" in keywords or len(call.args) > 1
                if name == "tl.load" and masked and "other" not in keywords and len(call.args) < 3:
                    found.append(f"{call.lineno}: {function.name}: masked load without other=")
                if name.startswith("tl.atomic_") and (function.name, ast.unparse(call)) != TICKET:
                    found.append(f"{call.lineno}: {function.name}: {name}")
        elif launches or function.name.endswith(("_launch", "_fused", "why_not")):
            for call in calls:
                name = ast.unparse(call.func)
                if name.startswith("torch.cuda.") or name.rpartition(".")[2] in HOST_READS:
                    found.append(f"{call.lineno}: {function.name}: {name}")
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_kernels_and_launchers_keep_the_rules(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("tl.load(p, mask=m, other=0.0)", None),
        ("tl.load(p, m, 0.0)", None),
        ("tl.load(p)", None),
        ("tl.load(p, mask=m)", "masked load without other="),
        ("tl.load(p, m)", "masked load without other="),
        ("tl.atomic_add(p, 1)", "tl.atomic_add"),
    ],
)
def test_a_planted_kernel_fault(body, fault):
    for decorator in ("jit", "triton.jit", "jit(debug=True)"):
        found = faults(f"@{decorator}\ndef k(p, m):\n    x = {body}\n")
        assert found == ([] if fault is None else [f"3: k: {fault}"])


def test_the_only_atomic_is_the_ticket():
    name, call = TICKET
    assert faults(f"@jit\ndef {name}(counter_ptr):\n    x = {call}\n") == []
    for function, other in (("k", call), (name, call.replace("acq_rel", "relaxed")), (name, "tl.atomic_add(p, y)")):
        assert faults(f"@jit\ndef {function}(counter_ptr):\n    x = {other}\n") == [f"3: {function}: tl.atomic_add"]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py")]
    assert sum(source.count("tl.atomic_") for source in sources) == 1


@pytest.mark.parametrize(
    "call", ["x.item()", "x.max().item()", "x.cpu()", "x.tolist()", "x.numpy()", "torch.cuda.synchronize()"]
)
def test_a_planted_host_read(call):
    for name, launch in (("a", "k[(1,)](x)"), ("_fwd_launch", "k(x)"), ("op_fused", "k(x)")):
        assert faults(f"def {name}(x):\n    {call}\n    {launch}\n") == [f"2: {name}: {call.rpartition('(')[0]}"]
    assert faults(f"def a_reference(x):\n    {call}\n") == []
