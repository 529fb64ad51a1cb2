"""What all operators must show, each on the cases of its test file: ``tests/kernels/test_<its module or folder>.py``.

Under ``TRITON_INTERPRET=1`` the kernels run. Without, the references that are registered for the CPU stand for them,
and the CPU's own implementations are checked too.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from unit_fast_kernels.shared.operator import OPERATORS
from unit_fast_kernels.shared.triton import INTERPRETING

import tests.kernels.shim
from tests.kernels.cases import CASES, Call, bound
from tests.kernels.common import (
    SEED,
    Canaries,
    assert_as_good_as_eager,
    assert_equal,
    assert_fake_is_real,
    guarded,
    permuted,
    within_sigmas,
)
from unit_fast import ops

ELSEWHERE = {"adamw": "it returns nothing but changes lists of tensors in place: test_adamw shows the same of it"}
HALF = ("fused",) if INTERPRETING else ("cpu", "fused")

for _op, _declared in OPERATORS.items():
    if _op not in ("dropout",): continue
    if _op not in ELSEWHERE:
        importlib.import_module(f"tests.kernels.test_{_declared.reference.__module__.split('.')[1]}")


def _implementations(cases):
    return [name for name in HALF if name in cases.operator.implementations]


def every_combination(cases):
    for implementation in _implementations(cases):
        low = cases.takes if implementation == "fused" else (torch.float64, torch.float32, torch.bfloat16)
        for way in cases.ways_of(implementation):
            for size in cases.sizes:
                for setting in cases.settings:
                    for dtype in low:
                        if not cases.skip(way, size, setting, dtype):
                            yield implementation, way, size, setting, dtype


def every_path(cases):
    return [(i, way, setting) for i in _implementations(cases) for way in cases.ways_of(i) for setting in cases.mains()]


def watched_sizes(cases):
    return [(*path, size) for path in every_path(cases) for size in cases.memory]


def settings(cases):
    return [(setting,) for setting in cases.mains()]


def refusals(cases):
    return [(changes, text, False) for changes, text in cases.refusals] + [(*row, True) for row in cases.unfit]


def models(cases):
    return [(s, setting, dtype) for s in cases.card for setting in cases.settings for dtype in cases.takes]


def implementations(cases):
    return [(i, way) for i in _implementations(cases) if cases.dropped for way in cases.ways_of(i)]


def for_each(names, rows_of):
    """The test is for every operator, with every row that ``rows_of`` gives for its cases."""
    rows = []
    for op, cases in CASES.items():
        for number, row in enumerate(rows_of(cases)):
            said = [str(x).removeprefix("torch.") for x in row if isinstance(x, str | torch.dtype)]
            rows.append(pytest.param(cases, *row, id="-".join([op, *(said if len(said) == len(row) else [str(number)])])))
    return pytest.mark.parametrize(("cases", *names.split()), rows)


def test_every_operator_has_cases():
    assert CASES.keys() | ELSEWHERE.keys() == OPERATORS.keys()
    for op, cases in CASES.items():
        assert {"row", "odd", "tail"} <= cases.sizes.keys(), op
        assert any(size.startswith(("empty", "no_", "nothing")) for size in cases.sizes), op
        assert cases.refusals, op
        assert cases.unfit, op


# --- Values and gradients ---------------------------------------------------------------------------------------------


@for_each("implementation way size setting dtype", every_combination)
def test_is_as_good_as_eager(cases, implementation, way, size, setting, dtype):
    problem = cases.problem(size, setting)
    with cases.ways_of(implementation)[way](size):
        if dtype == torch.float64:
            results = (Call(cases, problem, dtype)(cases.operator.implementations[i]) for i in (implementation, "reference"))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, **cases.close)
            return
        ours, eager, exact = bound(cases, problem, implementation, dtype)
    given = cases.gives or dtype
    assert_as_good_as_eager(ours, eager, exact, given, *[dtype] * (len(ours) - 1))
    if implementation == "fused":
        cases.also(Call(cases, problem, dtype).arguments, ours)


@for_each("implementation way setting size", watched_sizes)
def test_reads_inside_and_writes_everything_and_nothing_else(cases, implementation, way, setting, size, monkeypatch):
    function, problem = cases.operator.implementations[implementation], cases.problem(size, setting)
    with cases.ways_of(implementation)[way](size):
        plain = Call(cases, problem, torch.float32)
        expected = plain(function)
        call = Call(cases, problem, torch.float32, guarded)
        with monkeypatch.context() as patch:
            canaries = Canaries(patch)
            found = call(function)
            assert canaries.unharmed() or implementation != "fused" or not INTERPRETING
    assert_equal(found, expected)
    for argument, before in plain.arguments.items():
        if isinstance(before, torch.Tensor):
            assert_equal([call.arguments[argument].detach()], [before.detach()])


@for_each("implementation way setting", every_path)
def test_does_not_depend_on_strides(cases, implementation, way, setting):
    function, problem = cases.operator.implementations[implementation], cases.problem("odd", setting)
    with cases.ways_of(implementation)[way]("odd"):
        results = [Call(cases, problem, torch.float32, wrap)(function) for wrap in (lambda x: x, permuted)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@for_each("implementation way setting", every_path)
def test_two_runs_are_equal(cases, implementation, way, setting):
    function, problem = cases.operator.implementations[implementation], cases.problem("tail", setting)
    with cases.ways_of(implementation)[way]("tail"):
        assert_equal(*(Call(cases, problem, torch.bfloat16)(function) for _ in range(2)))


@for_each("implementation way", implementations)
def test_share_replay_and_seeds_of_dropout(cases, implementation, way):
    function = cases.operator.implementations[implementation]
    with cases.ways_of(implementation)[way](None):
        first, again, other = (cases.dropped(function, seed) for seed in (SEED, SEED, SEED + torch.tensor([0, 1])))
    assert within_sigmas(int(first.sum()), first.numel(), 0.1)
    assert torch.equal(first, again)
    assert within_sigmas(int((first & other).sum()), first.numel(), 0.01)


# --- Registration -----------------------------------------------------------------------------------------------------


class Registered(TorchDispatchMode):
    """Notes which of our registered operators are called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "unit_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "wrap"), [(torch.float32, torch.clone), (torch.bfloat16, permuted)], ids=["compact", "permuted"]
)
@for_each("setting", settings)
def test_registration(cases, setting, dtype, wrap):
    """opcheck takes NaN for a difference of two runs: what padding holds is replaced."""
    call = Call(cases, cases.problem("odd", setting), dtype, lambda x: wrap(x.nan_to_num()))
    with Registered() as registered:
        call(cases.operator.fused)
    assert len(registered.calls) >= 1 + bool(call.leaves)
    for function, arguments in registered.calls:
        torch.library.opcheck(function, arguments)
        assert_fake_is_real(function, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@for_each("setting", settings)
def test_compiles_whole(cases, setting, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(cases.operator.fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in cases.dynamic if dynamic else cases.dynamic[:1]:
        call = Call(cases, cases.problem(size, setting), torch.float32)
        assert_equal(call(compiled), call(cases.operator.fused))


# --- What does not fit ------------------------------------------------------------------------------------------------


@for_each("changes text unfit", refusals)
def test_refusals(cases, changes, text, unfit):
    text = f"^{cases.op}: {'the mode is fused, but ' if unfit else ''}{text}"
    with ops.kernels("fused" if unfit else "auto"), pytest.raises(ValueError, match=text):
        getattr(ops, cases.op)(**cases.valid() | changes)


@for_each("", lambda cases: [()])
def test_fused_mode_calls_the_kernels_or_says_why_not(cases):
    arguments = cases.valid()
    with ops.kernels("fused"):
        if INTERPRETING:
            found, expected = (
                cases.out(f)
                for f in (
                    getattr(ops, cases.op)(**arguments),
                    cases.operator.fused(*cases.operator.validate(**arguments)),
                )
            )
            assert torch.equal(found, expected)
        else:
            with pytest.raises(ValueError, match=f"^{cases.op}: the mode is fused, but tensors are on cpu: move them to"):
                getattr(ops, cases.op)(**arguments)


# --- On a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@for_each("size setting dtype", models)
def test_sizes_of_models_on_a_card(cases, size, setting, dtype):
    problem = cases.make(cases.card[size], **cases.settings[setting]).to("cuda")
    ours, eager, exact = bound(cases, problem, "fused", dtype)
    assert_as_good_as_eager(ours, eager, exact, cases.gives or dtype, *[dtype] * (len(ours) - 1))
    assert_equal(Call(cases, problem, dtype)(cases.operator.fused), ours)
