"""The operator behind MaskedAdamW: its kernels against float64 and the reference, addresses, memory, fakes, launches.

Under ``TRITON_INTERPRET=1`` the kernels run; else the reference that is registered for the CPU stands for them."""

import dataclasses
import math

import pytest
import torch
from unit_fast_kernels import adamw as module
from unit_fast_kernels.adamw import CHUNK, Tables, adamw_fused, why_not
from unit_fast_kernels.adamw import tables as tables_module
from unit_fast_kernels.adamw.cpu import adamw_cpu
from unit_fast_kernels.adamw.step import POLICIES, RULES, Step, adamw_reference
from unit_fast_kernels.assembly import assemble as _assemble
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.shared import capture as _capture
from unit_fast_kernels.shared.triton import INTERPRETING

from benchmarks.runner import tune
from tests.kernels.common import Canaries, assert_fake_is_real, guarded
from tests.planted_kernels import needs_compiler

SHAPES = {
    "one": (),
    "odd": (7, 5, 3),
    "block": (1024,),
    "tail": (2, 1025),
    "chunk": (CHUNK,),
    "chunks": (2, CHUNK + 3),
    "empty": (0, 3),
    "unused": (1500,),
    "zero": (40,),
    "missing": (33, 2),
}
"""By why they are there; the last three: not used, with a gradient of zeros, used without a gradient."""
N = len(SHAPES)
EPS = torch.finfo(torch.float32).eps


def make(dtype=torch.float32, seed=0, device="cpu", **changes) -> Step:
    """A step with history: moments, counts that differ, two groups."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(positive=False):
        numbers = (torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES.values())
        return [(x.abs() if positive else x).float().to(dtype=dtype, device=device) for x in numbers]

    params, grads, m, v = drawn(), drawn(), drawn(), drawn(positive=True)
    m, v = [0.1 * x for x in m], [0.01 * x for x in v]
    grads[8] = torch.zeros_like(grads[8])
    grads[9] = None
    used = torch.ones(N, dtype=torch.uint8, device=device)
    used[7] = 0
    counts = torch.tensor([0, 3, 7, 1, 1000, 2, 5, 4, 0, 6], dtype=torch.int32, device=device)
    settings = {
        "params": params, "grads": grads, "moments": lambda i: (m[i], v[i]), "counts": counts, "used": used,
        "groups": [0] * 5 + [1] * 5, "lr": torch.tensor([1e-2, 3e-3], dtype=torch.float64, device=device),
        "hyper": [(0.9, 0.999, 1e-8, 1e-2), (0.8, 0.99, 1e-6, 0.1)], "max_norm": 0.1,
    }  # fmt: skip
    return Step(**(settings | changes))


def state(step: Step) -> dict[str, list]:
    moments = [step.moments(i) for i in range(N)]
    found = {"p": step.params, "m": [m for m, _ in moments], "v": [v for _, v in moments], "grad": step.grads}
    if step.copies:
        found["copy"] = step.copies
    return {k: [None if t is None else t.clone() for t in row] for k, row in found.items()}


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def fused(step: Step):
    assert why_not(step) is None
    return adamw_fused(step, lambda: Tables([p.numel() for p in step.params], step.groups, step.counts.device))


def assert_close(found: Step, expected: Step, exact: Step) -> None:
    """Every tensor of ``found`` is at most twice as far from float64 as the reference in float32, plus a band of four
    units in the last place of the tensor's largest value."""
    for name, row in state(found).items():
        for i, (a, b, c) in enumerate(zip(row, state(expected)[name], state(exact)[name], strict=True)):
            if a is None or a.numel() == 0:
                continue
            band = 4 * torch.finfo(a.dtype).eps * c.abs().max()
            error, allowed = (a.double() - c).abs().max(), (b.double() - c).abs().max()
            assert error <= 2 * allowed + band, f"{name} of {list(SHAPES)[i]}: {error}, reference {allowed}, {band}"
    assert torch.equal(found.counts, exact.counts)


def followers(step: Step) -> dict:
    """Copies of every second parameter."""
    return {"copies": [p.bfloat16() if i % 2 else None for i, p in enumerate(step.params)]}


# --- Against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
def test_follows_float64_like_the_reference(rule, policy, in_place):
    settings = {"rule": rule, "unused": policy, "in_place": in_place}
    steps = [make(dtype, **settings) for dtype in (torch.float32, torch.float32, torch.float64)]
    steps = [dataclasses.replace(step, **followers(step)) for step in steps]
    steps[2] = dataclasses.replace(steps[2], copies=[c if c is None else c.double() for c in steps[2].copies])
    stats = [f(step) for f, step in zip((fused, adamw_reference, adamw_reference), steps)]
    norm = stats[2][0].item()
    for found, nonfinite in stats:
        assert found.item() == pytest.approx(norm, rel=4 * EPS)
        assert (nonfinite.item(), nonfinite.dtype, nonfinite.shape) == (0, torch.int32, ())
    if not in_place:  # then it is not said what they hold
        steps = [dataclasses.replace(step, grads=[None] * N) for step in steps]
    assert_close(*steps)
    started = make().counts
    moved = (steps[0].counts - started).tolist()
    zero_moves = int(policy != "skip")
    assert moved == [1, 1, 1, 1, 1, 1, zero_moves, int(policy == "update_all"), zero_moves, zero_moves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_of_lower_precision(dtype, in_place):
    """Unscaled, which is exact here, and rounded to their dtype before they are used."""
    steps = [
        make(d, unused="graph", in_place=in_place, max_norm=None, grad_scale=torch.tensor(128.0))
        for d in (torch.float32, torch.float32, torch.float64)
    ]
    low = [None if g is None else g.to(dtype) for g in steps[0].grads]
    for f, step in zip((fused, adamw_reference, adamw_reference), steps):
        step.grads = [None if g is None else g.clone() for g in low]
        f(step)
    if in_place:
        for i, (a, b) in enumerate(zip(steps[0].grads, low)):
            assert a is None or torch.equal(a, b if i == 7 else b / 128)
    assert_close(*(dataclasses.replace(step, grads=[None] * N) for step in steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clipped_gradients_of_lower_precision(dtype):
    a, b = make(), make()
    for f, step in ((fused, a), (adamw_reference, b)):
        step.grads = [None if g is None else g.to(dtype) for g in step.grads]
        f(step)
    for x, y in zip(a.grads, b.grads):  # the factors may differ in the last place of float32
        if x is not None:
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("scaled", [None, 1024.0, 3.0])
@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
def test_scaled_gradients_count_unscaled(scaled, max_norm):
    scale = None if scaled is None else torch.tensor([scaled])
    plain, step = make(torch.float64, max_norm=max_norm), make(max_norm=max_norm, grad_scale=scale)
    other = make(max_norm=max_norm, grad_scale=scale)
    if scaled is not None:
        for s in (step, other):
            for g in s.grads:
                if g is not None:
                    g.mul_(scaled)
    norm, _ = fused(step)
    adamw_reference(other)
    assert norm.item() == pytest.approx(adamw_reference(plain)[0].item(), rel=1e-6)
    used = [g is not None and i != 7 for i, g in enumerate(step.grads)]  # those of what is not used stay as they are
    for s in (step, other, plain):
        s.grads = [g if u else None for g, u in zip(s.grads, used)]
    assert_close(step, other, plain)


@pytest.mark.parametrize("run", [fused, adamw_reference, adamw_cpu])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "found"])
def test_what_is_not_finite_changes_nothing(run, policy, bad):
    step = make(unused=policy)
    step = dataclasses.replace(step, **followers(step))
    if bad == "found":
        step.found_inf = torch.ones(1)
    else:
        step.grads[4][CHUNK - 1] = bad
    before, counts = state(step), step.counts.clone()
    norm, nonfinite = run(step)
    assert nonfinite.item() == 1
    assert norm.isfinite() == (bad == "found")
    for name, row in state(step).items():
        for a, b in zip(row, before[name]):
            assert (a is None and b is None) or torch.equal(bits(a), bits(b)), name
    assert torch.equal(step.counts, counts)


@pytest.mark.parametrize("run", [fused, adamw_reference, adamw_cpu])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf(run, found):
    step = make(found_inf=torch.tensor(found))
    counts = step.counts.clone()
    assert run(step)[1].item() == int(found)
    assert torch.equal(step.counts, counts) == bool(found)


@pytest.mark.parametrize("run", [fused, adamw_reference, adamw_cpu])
def test_what_is_not_used_keeps_every_bit(run):
    step = make(unused="graph")
    step = dataclasses.replace(step, **followers(step))
    step.grads[7].fill_(math.nan)  # nor does its gradient count
    before = state(step)
    assert run(step)[1].item() == 0
    for name, row in state(step).items():
        assert row[7] is None or torch.equal(bits(row[7]), bits(before[name][7])), name
    assert step.counts[7].item() == 4


@pytest.mark.parametrize("run", [fused, adamw_reference, adamw_cpu])
def test_skip_looks_at_the_gradient_after_clipping(run):
    """Where the product with the clip factor is zero in float32 the tensor stays, and its gradient is zero after."""
    step = make(max_norm=1e-6)
    for g, size in zip((step.grads[1], step.grads[2], step.grads[3]), (1e18, 1e-22, 1e-44)):
        g.zero_().view(-1)[-1] = size
    before = step.counts.clone()
    run(step)
    assert (step.counts - before).tolist()[1:4] == [1, 0, 0]
    assert step.grads[3].abs().max() == 0


def test_the_reference_is_adamw_as_torch_has_it():
    p, m, v = torch.randn(9, dtype=torch.float64), *torch.zeros(2, 9, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    counts = torch.zeros(1, dtype=torch.int32)
    for _ in range(3):
        theirs.grad = torch.randn_like(p)
        step = Step(
            params=[p], grads=[theirs.grad.clone()], moments=lambda i: (m, v), counts=counts, used=None, groups=[0],
            lr=[0.03], hyper=[(0.8, 0.95, 1e-6, 0.1)], rule="torch", unused="graph",
        )  # fmt: skip
        adamw_reference(step)
        optimizer.step()
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_without_a_mask_those_with_a_gradient_are_used():
    a, b = make(used=None, unused="graph"), make(unused="graph")
    b.used = torch.tensor([g is not None for g in b.grads])  # bool
    for step in (a, b):
        fused(step)
    assert torch.equal(a.counts, b.counts)
    assert all(torch.equal(x, y) for x, y in zip(a.params, b.params))


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_reads_inside_and_writes_everything(monkeypatch):
    """Every tensor between bands of NaN, and new memory full of it: the same bits, and the bands untouched."""
    plain = make(unused="graph")
    plain = dataclasses.replace(plain, **followers(plain))
    step = make(unused="graph")
    step = dataclasses.replace(step, **followers(step))
    moments = [tuple(map(guarded, step.moments(i))) for i in range(N)]
    rows = {name: [guarded(t) for t in getattr(step, name)] for name in ("params", "grads", "copies")}
    step = dataclasses.replace(step, moments=lambda i: moments[i], **rows)
    norm = fused(plain)[0]
    Canaries(monkeypatch)
    assert torch.equal(fused(step)[0], norm)
    for name, row in state(step).items():
        assert all((a is None) or torch.equal(a, b) for a, b in zip(row, state(plain)[name])), name
    for t in [*(t for row in rows.values() for t in row), *(t for pair in moments for t in pair)]:
        if t is not None:
            whole = t.as_strided((t.numel() + 2 * 4096,), (1,), t.storage_offset() - 4096)
            assert whole[:4096].isnan().all()
            assert whole[t.numel() + 4096 :].isnan().all()


@pytest.mark.parametrize("which", ["params", "grads", "moments"])
def test_tensors_at_odd_addresses(which):
    """Not on 16 bytes: the same bits, by narrower accesses."""
    plain, step = make(unused="graph"), make(unused="graph")

    def shifted(t):
        return None if t is None else torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    if which == "moments":
        moments = [tuple(map(shifted, step.moments(i))) for i in range(N)]
        step.moments = lambda i: moments[i]
    else:
        setattr(step, which, [shifted(t) for t in getattr(step, which)])
    for s in (plain, step):
        fused(s)
    assert torch.equal(plain.counts, step.counts)
    for name, row in state(step).items():
        for a, b in zip(row, state(plain)[name]):
            if a is not None:  # sums of squares are taken in another order
                torch.testing.assert_close(a, b, rtol=8 * EPS, atol=1e-9)


def test_gradients_laid_out_unlike_their_parameters():
    generator = torch.Generator().manual_seed(0)
    p, g, m, v = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(4))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        moments = (m.clone(memory_format=layout), v.abs().clone(memory_format=layout))
        step = make(
            params=[p.clone(memory_format=layout)], grads=[g.clone()], moments=lambda i, moments=moments: moments,
            counts=torch.ones(1, dtype=torch.int32), used=None, groups=[0],
        )  # fmt: skip
        fused(step)
        found.append((step.params[0], step.grads[0], *moments))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b.contiguous(), rtol=8 * EPS, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.params.__setitem__(0, s.params[0].double()), "a parameter is torch.float64: keep it in float32"),
        (lambda s: s.params.__setitem__(1, torch.zeros(5, 7, 3).mT), "is not contiguous in memory"),
        (lambda s: s.grads.__setitem__(1, s.grads[1].bfloat16()), "gradients are torch.bfloat16, torch.float32"),
        (lambda s: setattr(s, "grads", [g if g is None else g.double() for g in s.grads]), "torch.float64: give them"),
        (lambda s: setattr(s, "copies", list(s.params)), "a parameter's copy is not torch.bfloat16"),
        (
            lambda s: setattr(s, "copies", [p.bfloat16().mT if p.dim() == 3 else None for p in s.params]),
            "laid out as it",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_told(change, why):
    step = make()
    change(step)
    assert why in why_not(step)


# --- Registration, launches -------------------------------------------------------------------------------------------


def _arguments(**changes):
    step = make(**changes)
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    return module._arguments(step, step.grads, tables)


@pytest.mark.skipif(INTERPRETING, reason="the checks copy the arguments, whose addresses are in a table")
@pytest.mark.parametrize("policy", POLICIES)
def test_registration(policy):
    step = make(unused=policy)
    step = dataclasses.replace(step, **followers(step))
    step.used, step.grad_scale, step.found_inf = step.used.clone(), torch.ones(()), torch.zeros(())
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    arguments = module._arguments(step, step.grads, tables)
    torch.library.opcheck(module._operator, arguments)


def test_the_fake_is_as_the_operator():
    assert_fake_is_real(module._operator, *_arguments())


class Record:
    """Stands for a kernel: notes its grid."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launched.append((self.name, grid))


def test_three_launches_whatever_the_number_of_tensors(monkeypatch):
    launched = []
    names = ("_adamw_norms_kernel", "_adamw_decide_kernel", "_adamw_update_kernel")
    for name in names:
        monkeypatch.setattr(module, name, Record(name, launched))
    step = make()
    chunks = sum(-(-p.numel() // CHUNK) for p in step.params)
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    module._launch(*module._arguments(step, step.grads, tables))
    assert launched == list(zip(names, [(chunks,), (N,), (chunks,)]))


def test_every_candidate_of_the_tuning_is_looked_up(monkeypatch):
    for name in ("_adamw_norms_kernel", "_adamw_decide_kernel", "_adamw_update_kernel"):
        monkeypatch.setattr(module, name, Record(name, []))
    shapes = {name: shape for name, shape in module.SHAPES.items() if name.startswith("bert_layer")}
    monkeypatch.setattr(module, "SHAPES", shapes)
    buckets = tune.buckets(module, torch.bfloat16, torch.device("cpu"))
    assert [(b.op, b.name, len(b.cases)) for b in buckets] == [(op, "any", len(shapes)) for op in module.DEFAULTS]
    assert [b.candidates[0] for b in buckets] == list(module.DEFAULTS.values())
    assert all(len(b.candidates) > 4 for b in buckets)


def test_tables_are_copied_when_something_has_changed(monkeypatch):
    copied = []
    original = tables_module.upload
    monkeypatch.setattr(tables_module, "upload", lambda values, *rest: copied.append(values) or original(values, *rest))
    step = make()
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    module._arguments(step, step.grads, tables)
    del copied[:]
    module._arguments(step, step.grads, tables)
    assert copied == []
    step.grads[0] = step.grads[0].clone()
    module._arguments(step, step.grads, tables)
    assert [values[1][0] for values in copied] == [step.grads[0].data_ptr()]


def test_a_captured_step_writes_its_own_addresses(monkeypatch):
    """Also where they are those of the eager step before: that one's table is replaced when they change."""
    step = make()
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    names = [argument.name for argument in module._operator._schema.arguments]
    at, hyper = names.index("addresses"), names.index("hyper")
    eager = module._arguments(step, step.grads, tables)
    others = [None if g is None else g.clone() for g in step.grads]
    with monkeypatch.context() as patch:
        patch.setattr(_capture, "capturing", lambda device: True)
        first, second = (module._arguments(step, grads, tables) for grads in (step.grads, others))
    for arguments, grads in ((eager, step.grads), (first, step.grads), (second, others)):
        assert arguments[at].tolist() == tables_module.addresses_of(
            [step.params, grads, *zip(*map(step.moments, range(len(step.params)))), [None] * len(step.params)]
        )
    assert len({arguments[at].data_ptr() for arguments in (eager, first, second)}) == 3
    assert any(held is first[hyper] for held in tables._held)


@pytest.mark.parametrize("prepared", [True, False])
def test_within_a_capture_nothing_is_copied_from_the_host(prepared, monkeypatch):
    step = make()
    tables = Tables([p.numel() for p in step.params], step.groups, "cpu")
    if prepared:
        module.prepare(step, tables)
    monkeypatch.setattr(_capture, "capturing", lambda device: True)
    if prepared:
        module._arguments(step, step.grads, tables)
        step.hyper = [(0.5, *h[1:]) for h in step.hyper]
    with pytest.raises(RuntimeError, match="AdamW's hyper would be copied to the device within the capture"):
        module._arguments(step, step.grads, tables)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_runs_are_equal(policy):
    steps = [make(unused=policy) for _ in range(2)]
    stats = [fused(step) for step in steps]
    assert torch.equal(stats[0][0], stats[1][0])
    for name, row in state(steps[0]).items():
        assert all(a is None or torch.equal(a, b) for a, b in zip(row, state(steps[1])[name])), name


# --- Assembly ---------------------------------------------------------------------------------------------------------


def _launched(**changes):
    def passes():
        step = make(device="cuda:0", **changes)
        tables = Tables([p.numel() for p in step.params], step.groups, torch.device("cuda:0"))
        module._launch(*module._arguments(step, step.grads, tables))

    return {launch.name: launch for launch in _record.record(passes, "a100")}


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("in_place", [True, False])
def test_whole_blocks_are_accessed_in_16_bytes(arch, in_place):
    """In the loop over whole blocks every access of elements is 16 bytes wide; the masked loop has narrow ones."""
    launches = _launched(in_place=in_place)
    norms = _assemble.assemble(launches["_adamw_norms_kernel"], arch)
    update = _assemble.assemble(launches["_adamw_update_kernel"], arch)
    wide = min(update.loops, key=lambda loop: sum(loop.values()))
    accesses = {k: n for k, n in wide.items() if k.startswith(("LDG", "STG", "LD.", "ST."))}
    assert accesses == {"LDG.E.128": 4, "STG.E.128": 4 if in_place else 3}
    assert any({k for k in loop if k.startswith("LDG")} == {"LDG.E.128"} for loop in norms.loops)
    assert update.spill_bytes == norms.spill_bytes == 0


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [{"used": None}, {"max_norm": None}, {"unused": "graph", "rule": "torch"}, {"unused": "update_all"}, {"one": True}],
    ids=str,
)
def test_every_form_compiles_without_spills(changes):
    """What the shapes of the budgets do not launch: without a mask or clipping, scaled, of one tensor."""
    if changes.pop("one", False):

        def passes():
            step = Step(
                params=[torch.zeros(5, device="cuda:0")], grads=[torch.zeros(5, device="cuda:0")],
                moments=lambda i: (torch.zeros(5, device="cuda:0"),) * 2, groups=[0], used=None, max_norm=0.1,
                counts=torch.zeros(1, dtype=torch.int32, device="cuda:0"), hyper=[(0.9, 0.999, 1e-8, 0.0)],
                lr=torch.zeros(1, dtype=torch.float64, device="cuda:0"),
            )  # fmt: skip
            module._launch(*module._arguments(step, step.grads, Tables([5], [0], torch.device("cuda:0"))))

        launches = _record.record(passes, "a100")
    else:
        launches = _launched(**changes).values()
    for launch in launches:
        found = _assemble.assemble(launch, "sm_80")
        assert found.spill_bytes == 0
        assert found.stack_bytes == 0
