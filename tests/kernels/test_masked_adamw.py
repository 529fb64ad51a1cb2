"""``MaskedAdamW`` on its kernels: long mixed-task runs, rates on the device, GradScaler, copies, captures.

Under ``TRITON_INTERPRET=1`` the kernels run, else torch's fused AdamW, to which the same tests apply.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from unit_fast_kernels import adamw as module
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.captures import Recorded, watching
from tests.kernels.test_adamw import bits
from unit_fast import ops, recipes
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.schedule import lr_multiplier, lr_multiplier_tensor

FAST = "fused" if INTERPRETING else "auto"
MODES = (FAST, "reference")
SIZES = (1, 3, 8, 17, 40, 64, 5, 1025)
TASKS = ((1, 1, 1, 1, 0, 0, 0, 1), (0, 0, 0, 1, 1, 1, 0, 0), (1, 0, 0, 1, 1, 0, 0, 1))
"""Which parameters a task uses; one is never used."""


@dataclasses.dataclass
class Found:
    """What a step returns."""

    grad_norm: torch.Tensor
    nonfinite: torch.Tensor


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in SIZES]
    return [nn.Parameter(value.to(dtype=dtype, device=device)) for value in values]


def snapshot(optimizer, p, i):
    state = optimizer.state.get(p) or {}
    moments = [bits(state[k]).clone() for k in ("exp_avg", "exp_avg_sq") if k in state]
    return bits(p.detach()).clone(), moments or [torch.zeros_like(bits(p.detach()))] * 2, optimizer._counts[i].clone()


def run(steps, mode, dtype=torch.float32, device="cpu", watch=False, **settings):
    """Mixed-task steps with rates, zeros among the gradients and a bad step now and then; the optimiser."""
    params = parameters(dtype, device)
    groups = [{"params": params[:4], "lr": 1e-3}, {"params": params[4:], "lr": 3e-4}]
    optimizer = MaskedAdamW(groups, weight_decay=0.01, max_norm=0.1, **settings)
    generator = torch.Generator().manual_seed(1)
    expected = [0] * len(params)
    for step in range(steps):
        task = TASKS[int(torch.randint(3, (), generator=generator))]
        zero = int(torch.randint(3 * len(params), (), generator=generator))
        bad = step % 29 == 28
        for i, p in enumerate(params):
            grad = 10.0 ** -(step % 3) * torch.randn(p.shape, generator=generator)
            p.grad = (grad * (i != zero)).to(dtype=dtype, device=device) if task[i] or i % 2 else None
        if bad:
            params[3].grad[0] = float("nan")
        used = torch.tensor(task, dtype=torch.uint8, device=device)
        optimizer.scale_lr(lr_multiplier(step, 10, steps))
        before = [snapshot(optimizer, p, i) for i, p in enumerate(params)] if watch and step else None
        with ops.kernels(mode):
            stats = optimizer.step(used)
        for i in range(len(params)):
            moves = task[i]
            if settings["unused"] == "skip":
                moves = task[i] and i != zero
            elif settings["unused"] == "update_all":
                moves = task[i] or expected[i] > 0
            moves = moves and not bad
            expected[i] += int(moves)
            if before is not None and not moves:
                p, m, t = snapshot(optimizer, params[i], i)
                assert torch.equal(p, before[i][0])
                assert torch.equal(t, before[i][2])
                assert all(torch.equal(a, b) for a, b in zip(m, before[i][1]))
        if watch:
            assert stats.nonfinite.item() == int(bad)
    assert optimizer.step_counts().tolist() == expected
    return optimizer, params


def assert_follows(steps, mode, device="cpu", **settings):
    """At most twice as far from float64 as the reference in float32, and a band: an update rounds a parameter to
    float32 twice, and its own error is a few units of the rate, of which n add up."""
    ours = run(steps, mode, device=device, watch=device == "cpu", **settings)
    reference = run(steps, "reference", device=device, **settings)
    exact = run(steps, "reference", torch.float64, device=device, **settings)
    eps = torch.finfo(torch.float32).eps
    for a, b, c in zip(ours[1], reference[1], exact[1]):
        a, b, c = (t.detach().double() for t in (a, b, c))
        band = 4 * eps * c.abs().max() + 8 * eps * 1e-3 * steps
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + band
    for p, q, r in zip(*(optimizer.param_groups[0]["params"] for optimizer, _ in (ours, reference, exact))):
        for name in ("exp_avg", "exp_avg_sq"):
            a, b, c = (o.state[t][name].double() for (o, _), t in zip((ours, reference, exact), (p, q, r)))
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 8 * eps * c.abs().max()


PAIRS = [("hf", "skip"), ("torch", "graph"), ("hf", "update_all")]
"""The other pairs of rule and policy: a step each in test_adamw."""


@pytest.mark.parametrize(("rule", "policy"), PAIRS)
def test_mixed_tasks_follow_the_reference(rule, policy):
    assert_follows(32, FAST, rule=rule, unused=policy)


@pytest.mark.long
@pytest.mark.parametrize(("rule", "policy"), PAIRS)
def test_a_thousand_mixed_tasks_follow_the_reference(rule, policy):
    assert_follows(1000, FAST, rule=rule, unused=policy)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["skip", "graph", "update_all"])
@pytest.mark.parametrize("rule", ["hf", "torch"])
def test_a_thousand_mixed_tasks_on_a_gpu(rule, policy):
    assert_follows(1000, "fused", device="cuda", rule=rule, unused=policy)


# --- Rates on the device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 10), (4, 20), (10, 10), (10, 8), (2000, 500_000)])
def test_the_schedule_on_the_device(warmup, total):
    steps = sorted({*range(min(total, 30) + 3), warmup, total, total // 2, total + 7})
    found = lr_multiplier_tensor(torch.tensor(steps), warmup, total)
    expected = torch.tensor([lr_multiplier(step, warmup, total) for step in steps], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-16)
    assert lr_multiplier_tensor(torch.tensor(1), warmup, total).shape == ()


def test_the_schedule_on_the_device_refuses_negative_numbers():
    with pytest.raises(ValueError, match="lr_multiplier_tensor: step 0, warmup -1, total 3; none may be negative"):
        lr_multiplier_tensor(torch.tensor(0), -1, 3)


@pytest.mark.parametrize("mode", MODES)
def test_rates_from_the_device_are_those_of_the_host(mode):
    """The schedule as a tensor, the groups' rates, and a group's rate changed by hand give the same bits."""
    found = []
    for how in ("host", "tensor", "group"):
        params = parameters()
        optimizer = MaskedAdamW(
            [{"params": params[:3], "lr": 1e-2}, {"params": params[3:], "lr": 1e-3}], unused="graph"
        )
        if how == "group":
            assert optimizer.device_lr.tolist() == [1e-2, 1e-3]
        for step in range(4):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            if how == "host":
                optimizer.scale_lr(lr_multiplier(step, 2, 6))
            elif how == "tensor":
                optimizer.scale_lr(lr_multiplier_tensor(torch.tensor(step), 2, 6))
            else:
                for group, lr in zip(optimizer.param_groups, (1e-2, 1e-3)):
                    group["lr"] = lr * lr_multiplier(step, 2, 6)
            with ops.kernels(mode):
                optimizer.step()
        found.append(params)
        rates = [lr * lr_multiplier(3, 2, 6) for lr in (1e-2, 1e-3)]
        assert optimizer.device_lr.tolist() == pytest.approx(rates, rel=1e-15)
        assert optimizer.device_lr.dtype == torch.float64
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_to_the_rates_holds_until_a_group_changes(mode):
    p = nn.Parameter(torch.zeros(1))
    optimizer = MaskedAdamW([p], lr=1.0, weight_decay=0.0, unused="graph")
    optimizer.device_lr.fill_(0.25)
    moved = []
    for lr in (None, None, 0.5):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr
        p.grad, before = torch.ones(1), p.item()
        with ops.kernels(mode):
            optimizer.step()
        moved.append(before - p.item())
    assert moved == pytest.approx([0.25, 0.25, 0.5], rel=1e-5)
    for multiplier, rate in ((1.0, 0.5), (torch.tensor(0.3), 0.15), (1.0, 0.5)):
        optimizer.scale_lr(multiplier)
        assert optimizer.device_lr.tolist() == pytest.approx([rate])


# --- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(mode, unscale):
    """Steps through ``torch.amp.GradScaler`` are those without it; an overflow changes nothing and halves the scale."""
    plain, scaled = parameters(), parameters()
    a, b = (MaskedAdamW(p, lr=1e-2, max_norm=0.1) for p in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    generator = torch.Generator().manual_seed(7)
    for step in range(4):
        targets = [torch.randn(p.shape, generator=generator) for p in plain]
        overflow = step == 2
        for params, optimizer in ((plain, a), (scaled, b)):
            optimizer.zero_grad(set_to_none=True)
            loss = sum(((p - t) ** 2).sum() for p, t in zip(params, targets))
            with ops.kernels(mode):
                if optimizer is a:
                    if not overflow:
                        loss.backward()
                        optimizer.step()
                    continue
                scaler.scale(loss).backward()
                if overflow:
                    scaled[2].grad[0] = float("inf")
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        assert not hasattr(b, "found_inf")
        for p, q in zip(plain, scaled):  # the scale is a power of two: exact
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert a.step_counts().tolist() == b.step_counts().tolist() == [3] * len(SIZES)
    assert scaler.get_scale() == 512.0


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_shadow(mode):
    params = parameters()
    shadow = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params[:6]}
    optimizer = MaskedAdamW(params, lr=0.1, unused="graph", shadow=shadow)
    assert all(torch.equal(shadow[p], p.detach().bfloat16()) for p in shadow)
    for task in TASKS:
        for p in params:
            p.grad = torch.ones_like(p)
        with ops.kernels(mode):
            optimizer.step(torch.tensor(task, dtype=torch.bool))
        for p in shadow:  # the interpreter cuts a float32 off where a card rounds it
            rtol = 2.0**-7 if mode == "fused" and INTERPRETING else 0
            torch.testing.assert_close(shadow[p], p.detach().bfloat16(), rtol=rtol, atol=0)
    with torch.no_grad():
        params[0].fill_(3.0)
    optimizer.refresh_shadow()
    assert shadow[params[0]].tolist() == [3.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda p: {"shadow": {torch.zeros(1): torch.zeros(1).bfloat16()}}, "shadow has a tensor that is not one of"),
        (lambda p: {"shadow": {p: torch.zeros_like(p)}}, "shadow of a parameter .* it must be torch.bfloat16"),
        (lambda p: {"shadow": {p: torch.zeros(2).bfloat16()}}, "shadow of a parameter .* of its shape"),
    ],
)
def test_copies_that_do_not_fit_are_refused(settings, message):
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        MaskedAdamW([p], **settings(p))


# --- State ------------------------------------------------------------------------------------------------------------


def stepped(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i + 1) * (-1) ** step)
        with ops.kernels(FAST) if isinstance(optimizer, MaskedAdamW) else ops.kernels("auto"):
            optimizer.step()


def test_state_goes_to_torch_and_back():
    """Ours, then torch's AdamW from our state, then ours from theirs, beside torch's AdamW alone."""
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    alone, params = parameters(), parameters()
    stepped(torch.optim.AdamW(alone, **settings), alone, 9)
    first = MaskedAdamW(params, **settings, rule="torch", unused="graph")
    stepped(first, params, 3)
    theirs = torch.optim.AdamW(params, **settings)
    theirs.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(theirs, params, 3, 3)
    last = MaskedAdamW(params, **settings, rule="torch", unused="graph")
    last.load_state_dict(copy.deepcopy(theirs.state_dict()))
    stepped(last, params, 3, 6)
    assert last.step_counts().tolist() == [9] * len(SIZES)
    for a, b in zip(params, alone):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_loaded_state_a_copy_and_a_new_group_go_on_exactly():
    """Each makes the tables anew."""
    params = parameters()
    a = MaskedAdamW(params[:5], lr=1e-2, max_norm=0.1)
    stepped(a, params[:5], 2)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    b = MaskedAdamW(others[:5], lr=1e-2, max_norm=0.1)
    stepped(b, others[:5], 1)  # makes tables, of moments that loading replaces
    for p, q in zip(others, params):
        p.data.copy_(q.detach())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for optimizer, mine in ((a, params), (b, others)):
        optimizer.add_param_group({"params": mine[5:], "lr": 1e-3})
        stepped(optimizer, mine, 2, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    assert a.step_counts().tolist() == b.step_counts().tolist() == [4] * 5 + [2] * 3
    copied = copy.deepcopy(a)
    twins = [p for group in copied.param_groups for p in group["params"]]
    stepped(copied, twins, 1, 4)
    stepped(a, params, 1, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, twins))


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_laid_out_anew_takes_its_moments_along(mode):
    plain, turned = (nn.Parameter(torch.arange(24.0).view(2, 3, 2, 2)) for _ in range(2))
    a, b = (MaskedAdamW([p], lr=0.1) for p in (plain, turned))
    for step in range(2):
        if step:
            turned.data = turned.data.contiguous(memory_format=torch.channels_last)
        for p, optimizer in ((plain, a), (turned, b)):
            p.grad = torch.arange(24.0).view(2, 3, 2, 2).sin() + step
            with ops.kernels(mode):
                optimizer.step()
    torch.testing.assert_close(plain, turned.data.contiguous(), rtol=1e-6, atol=0)


def test_moments_fit_the_list_of_the_model():
    """The sizes that the kernels are assembled and timed for are those of the model."""
    with torch.device("meta"):
        model = UniT(recipes.recipe("all8_shared").model)
    names = {id(p): name for name, p in model.named_parameters()}
    members = [p for group in model.parameter_groups(1.0, 1.0) for p in group["params"]]
    used = model.used_parameters("detection_coco")
    found: dict[int, list[int]] = {}
    for p in members:
        row = found.setdefault(p.numel(), [0, 0])
        row[0] += 1
        row[1] += int(used[names[id(p)]])
    assert sorted(module.UNIT_TENSORS, reverse=True) == sorted(
        ((size, *row) for size, row in found.items()), reverse=True
    )
    layer = [p.numel() for name, p in model.named_parameters() if ".layer.3." in name or ".layers.3." in name]
    assert {2359296, 589824, 3072, 768} <= set(layer)


# --- What the host reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_step_on_fake_tensors_reads_nothing(device, masked):
    with FakeTensorMode(), ops.kernels("fused"):
        params = [nn.Parameter(torch.empty(size, device=device)) for size in SIZES]
        shadow = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
        optimizer = MaskedAdamW([{"params": params[:3]}, {"params": params[3:]}], max_norm=0.1, shadow=shadow)
        count = torch.zeros((), dtype=torch.int64, device=device)
        used = torch.ones(len(params), dtype=torch.uint8, device=device) if masked else None
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.scale_lr(lr_multiplier_tensor(count, 4, 100))
            stats = optimizer.step(used)
            count += 1
        assert stats.grad_norm.device == torch.device(device)
        with pytest.raises(DataDependentOutputException):
            stats.nonfinite.item()


@pytest.mark.skipif(INTERPRETING, reason="under the interpreter kernels run on a CPU")
def test_fused_on_a_cpu_says_what_to_do():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with (
        ops.kernels("fused"),
        pytest.raises(ValueError, match="adamw: the mode is fused, but tensors are on cpu: move them to CUDA"),
    ):
        MaskedAdamW([p]).step()


def test_a_captured_update_finds_its_gradients():
    """Replayed by the stand-in, which fills the graph's memory with garbage before: the table of addresses that the
    graph writes is all that leads the kernels (interpreted here) to the gradients."""
    if not INTERPRETING:
        pytest.skip("registered operators run their reference, which needs no addresses")
    results = []
    for captured in (False, True):
        with watching() as watch, ops.kernels("fused"):
            params, backend = parameters(), Recorded(watch)
            optimizer = MaskedAdamW(params, lr=1e-2, max_norm=0.1)
            used = torch.tensor(TASKS[0], dtype=torch.uint8)
            generator = torch.Generator().manual_seed(1)
            raw = [torch.randn(p.shape, generator=generator) for p in params]
            optimizer.prepare()

            def one(params=params, optimizer=optimizer, used=used, raw=raw):
                for p, g in zip(params, raw):
                    p.grad = g * 1.0  # new memory, as a backward pass would take
                stats = optimizer.step(used)
                optimizer.zero_grad(set_to_none=True)
                return Found(stats.grad_norm, stats.nonfinite)

            backend.eager(one)
            replay = backend.capture(one)[0] if captured else None
            for i in range(3):
                for g in raw:
                    g.mul_(i + 2)
                replay() if captured else backend.eager(one)
            results.append(([p.detach().clone() for p in params], optimizer.step_counts().clone()))
    (eager, eager_counts), (replayed, replayed_counts) = results
    assert torch.equal(eager_counts, replayed_counts)
    assert max(eager_counts) == 4
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed))


@pytest.mark.gpu
def test_a_captured_step_on_a_gpu_follows_the_schedule():
    """Replays equal eager steps bit for bit, with rates from a step count on the device."""
    results = []
    for captured in (False, True):
        params = parameters(device="cuda")
        optimizer = MaskedAdamW(params, lr=1e-2, max_norm=0.1)
        used = torch.tensor(TASKS[0], dtype=torch.uint8, device="cuda")
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        raw = [torch.randn(p.shape, generator=torch.Generator("cuda").manual_seed(i), device="cuda") for i, p in
               enumerate(params)]  # fmt: skip

        def one(params=params, optimizer=optimizer, used=used, count=count, raw=raw):
            for p, g in zip(params, raw):
                p.grad = g * 1.0  # new memory, as a backward pass would take
            optimizer.scale_lr(lr_multiplier_tensor(count, 3, 20))
            optimizer.step(used)
            count.add_(1)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                one()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one()
            for _ in range(5):
                graph.replay()
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(5):
                    one()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append(([p.detach().clone() for p in params], optimizer.step_counts().clone()))
    (eager, eager_counts), (replayed, replayed_counts) = results
    assert torch.equal(eager_counts, replayed_counts)
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed))
