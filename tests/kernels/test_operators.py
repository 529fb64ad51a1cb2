"""What all operators must show, each on the cases of its test file: ``tests/kernels/test_<its module or folder>.py``.

Under ``TRITON_INTERPRET=1`` the kernels run. Without, the references that are registered for the CPU stand for them,
and the CPU's own implementations are checked too.
"""

import importlib

import pytest
import torch
from unit_fast_kernels.shared.philox import keep_elements
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import CASES, Call, check
from tests.kernels.common import (
    SEED,
    Canaries,
    Registered,
    assert_equal,
    assert_fake_is_real,
    guarded,
    permuted,
    within_sigmas,
)
from unit_fast import ops

ELSEWHERE = {"adamw": "it returns nothing but changes lists of tensors in place: test_adamw shows the same of it"}
HALF = ("fused",) if INTERPRETING else ("cpu", "fused")

for _op, _declared in ops.OPERATORS.items():
    if _op not in ELSEWHERE:
        importlib.import_module(f"tests.kernels.test_{_declared.reference.__module__.split('.')[1]}")


def _implementations(cases):
    return [name for name in HALF if name in cases.operator.implementations]


def every_combination(cases):
    for implementation in _implementations(cases):
        dtypes = cases.takes if implementation == "fused" else (torch.float64, torch.float32, torch.bfloat16)
        for way in cases.ways_of(implementation):
            for size in cases.sizes:
                for setting in cases.settings:
                    for dtype in dtypes:
                        if implementation == "cpu" and dtype != torch.float64 and not cases.coarse(size):
                            continue
                        if not cases.skip(way, size, setting, dtype):
                            yield implementation, way, size, setting, dtype


def every_path(cases):
    """Every way with the first of the main settings, the first way with the others."""
    for implementation in _implementations(cases):
        for number, way in enumerate(cases.ways_of(implementation)):
            for setting in cases.mains()[: None if number == 0 else 1]:
                yield implementation, way, setting


def watched_sizes(cases):
    return [
        (implementation, way, setting, size)
        for implementation, way, setting in every_path(cases)
        for size in cases.memory
        if not (INTERPRETING and cases.skip(way, size, setting, torch.float32))  # too slow there
    ]


def settings(cases):
    return [(setting,) for setting in cases.mains()]


def refusals(cases):
    for mode, rows in (("auto", cases.refusals), ("fused", cases.unfit)):
        for changes, text in rows:
            yield mode, changes, text


def models(cases):
    return [(s, setting, dtype) for s in cases.card for setting in cases.settings for dtype in cases.takes]


def droppers(cases):
    for implementation in _implementations(cases) if cases.dropped else ():
        for way in list(cases.ways_of(implementation))[: 1 if implementation == "fused" else None]:
            yield implementation, way


def for_each(names, rows_of):
    """The test is for every operator, with every row that ``rows_of`` gives for its cases."""
    rows = []
    for op, cases in CASES.items():
        for row in rows_of(cases):
            said = [str(x).removeprefix("torch.") for x in row if isinstance(x, str | torch.dtype)]
            rows.append(pytest.param(cases, *row, id="-".join([op, *said])))
    return pytest.mark.parametrize(("cases", *names.split()), rows)


def test_every_operator_has_cases():
    assert CASES.keys() | ELSEWHERE.keys() == ops.OPERATORS.keys()
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
        if dtype != torch.float64:
            check(cases, problem, implementation, dtype)
            return
        functions = (cases.operator.implementations[name] for name in (implementation, "reference"))
        for a, b in zip(*(Call(cases, problem, dtype)(function) for function in functions), strict=True):
            torch.testing.assert_close(a, b, **cases.close)


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
    for argument, before in (plain.arguments | {"upstream": plain.upstream}).items():
        if isinstance(before, torch.Tensor):
            after = call.upstream if argument == "upstream" else call.arguments[argument]
            assert_equal([after.detach()], [before.detach()])


@for_each("implementation way setting", every_path)
def test_does_not_depend_on_strides(cases, implementation, way, setting):
    function, problem = cases.operator.implementations[implementation], cases.problem("odd", setting)
    with cases.ways_of(implementation)[way]("odd"):
        results = [Call(cases, problem, torch.float32, wrap)(function) for wrap in (lambda x: x, permuted)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@for_each("implementation way setting", every_path)
def test_two_runs_are_equal(cases, implementation, way, setting):
    size = "odd" if cases.skip(way, "tail", setting, torch.bfloat16) else "tail"
    function, problem = cases.operator.implementations[implementation], cases.problem(size, setting)
    with cases.ways_of(implementation)[way](size):
        assert_equal(*(Call(cases, problem, torch.bfloat16)(function) for _ in range(2)))


@for_each("implementation way", droppers)
def test_share_replay_and_seeds_of_dropout(cases, implementation, way):
    function = cases.operator.implementations[implementation]
    with cases.ways_of(implementation)[way](None):
        first, again, other = (cases.dropped(function, seed) for seed in (SEED, SEED, SEED + torch.tensor([0, 1])))
    assert within_sigmas(int(first.sum()), first.numel(), 0.1)
    assert torch.equal(first, again)
    assert within_sigmas(int((first & other).sum()), first.numel(), 0.01)
    if implementation == "fused":
        assert torch.equal(first, ~keep_elements(first.shape, 0.1, SEED))


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "wrap"), [(torch.float32, torch.clone), (torch.bfloat16, permuted)], ids=["compact", "permuted"]
)
@for_each("setting", settings)
def test_registration(cases, setting, dtype, wrap):
    """opcheck takes NaN for a difference of two runs: what padding holds is replaced."""
    call = Call(cases, cases.problem("odd", setting), dtype, lambda x: wrap(x.nan_to_num()))
    first = next(iter(cases.ways_of("fused").values()))
    with first("odd"), Registered() as registered:
        call(cases.operator.fused)
    assert len(registered.calls) >= 1 + bool(call.leaves)
    for function, arguments in registered.calls:
        torch.library.opcheck(function, arguments)
        assert_fake_is_real(function, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@for_each("setting", settings)
def test_compiles_whole(cases, setting, dynamic):
    """As a function of the tensors, the rest of the arguments being constants."""
    torch._dynamo.reset()
    calls = [Call(cases, cases.problem(size, setting), torch.float32) for size in cases.dynamic[: 1 + dynamic]]
    constants = list(cases.operator.validate(**calls[0].arguments))
    places = [i for i, x in enumerate(constants) if isinstance(x, torch.Tensor)]
    constants = [None if i in places else x for i, x in enumerate(constants)]

    def function(*tensors):
        arguments = list(constants)
        for i, tensor in zip(places, tensors, strict=True):
            arguments[i] = tensor
        return cases.operator.fused(*arguments)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for call in calls:
        assert_equal(call(lambda *a: compiled(*(a[i] for i in places))), call(cases.operator.fused))


# --- What does not fit ------------------------------------------------------------------------------------------------


@for_each("mode changes text", refusals)
def test_refusals(cases, mode, changes, text):
    text = f"^{cases.op}: {'the mode is fused, but ' if mode == 'fused' else ''}{text}"
    with ops.kernels(mode), pytest.raises(ValueError, match=text):
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
            text = f"^{cases.op}: the mode is fused, but tensors are on cpu: move them to CUDA, or start Python with TR"
            with pytest.raises(ValueError, match=text):
                getattr(ops, cases.op)(**arguments)


# --- On a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@for_each("size setting dtype", models)
def test_sizes_of_models_on_a_card(cases, size, setting, dtype):
    problem = cases.make(cases.card[size], **cases.settings[setting]).to("cuda")
    found = check(cases, problem, "fused", dtype)
    assert_equal(Call(cases, problem, dtype)(cases.operator.fused), found)
