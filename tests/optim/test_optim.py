"""MaskedAdamW against the authors' trajectories, plain loops written here, and torch.optim.AdamW; the schedule."""

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests import parity
from tests.fixtures.parity import check
from unit_fast import ops
from unit_fast.config import OptimConfig
from unit_fast.errors import UserError
from unit_fast.optim import MaskedAdamW, make_optimizer
from unit_fast.schedule import lr_multiplier

SHAPES = ((7, 5), (5,), (), (3, 4, 2), (0, 3), (64,))
MODES = ("auto", "reference")
ROW = ops.adamw_step.NORM_ROW


def bits(tensor):
    """The value as integers, so that -0.0 and NaN compare by representation."""
    return tensor.detach().clone().view({4: torch.int32, 8: torch.int64}[tensor.element_size()])


def snapshot(optimizer, params):
    """Everything a step may change, bit for bit."""
    state = [
        (*(bits(optimizer.state[p][k]) for k in ("exp_avg", "exp_avg_sq")),) if optimizer.state.get(p) else ()
        for p in params
    ]
    return [bits(p) for p in params], state, optimizer.step_counts().clone()


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def random_steps(steps, seed=1, scale=1.0, dtype=torch.float64):
    """Per step a list of gradients: a tensor, exact zeros, or None."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(steps):
        grads = []
        for i, shape in enumerate(SHAPES):
            kind = int(torch.randint(0, 6, (), generator=generator)) if i else 5
            grad = scale * 10.0 ** -(step % 4) * torch.randn(shape, generator=generator, dtype=torch.float64)
            grads.append(None if kind == 0 else torch.zeros_like(grad) if kind == 1 else grad)
        out.append([None if g is None else g.to(dtype) for g in grads])
    return out


def set_gradients(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


class Loop:
    """SPEC 3.1, 3.3 and 3.5 for one parameter after the other, state in plain dictionaries."""

    def __init__(self, params, lrs, *, policy, max_norm, wd=1e-4, eps=1e-8, betas=(0.9, 0.999)):
        self.values = [p.detach().clone() for p in params]
        self.state = [None] * len(params)
        self.lrs, self.policy, self.max_norm = lrs, policy, max_norm
        self.wd, self.eps, self.betas = wd, eps, betas

    def step(self, grads, used=None, multiplier=1.0):
        used = [g is not None for g in grads] if used is None else used
        norm = math.sqrt(sum(float((g**2).sum()) for g, u in zip(grads, used, strict=True) if u and g is not None))
        factor = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        b1, b2 = self.betas
        for i, (g, u) in enumerate(zip(grads, used, strict=True)):
            g = g * factor if u and g is not None else torch.zeros_like(self.values[i])
            if not u and (self.policy != "update_all" or self.state[i] is None):
                continue
            if self.policy == "skip" and float(g.abs().sum()) == 0.0:
                continue
            t, m, v = self.state[i] or (0, torch.zeros_like(g), torch.zeros_like(g))
            t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            lr = self.lrs[i] * multiplier
            p = self.values[i] - lr * (math.sqrt(1 - b2**t) / (1 - b1**t)) * m / (v.sqrt() + self.eps)
            self.values[i], self.state[i] = p - lr * self.wd * p, (t, m, v)
        return norm


def assert_follows(optimizer, params, loop, tolerance):
    for i, p in enumerate(params):
        t, m, v = loop.state[i] or (0, None, None)
        assert int(optimizer.step_counts()[i]) == t, f"step count of parameter {i}"
        torch.testing.assert_close(p.detach(), loop.values[i], rtol=tolerance, atol=tolerance)
        if t:
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.skipif(not (parity.FIXTURES / "optimizer.json").exists(), reason="the parity kit is not in tests/fixtures")
@pytest.mark.parametrize(("variant", "policy"), [("skip", "skip"), ("plain", "graph")])
@pytest.mark.parametrize(("mode", "tolerance"), [("auto", 1e-9), ("reference", 1e-12)])
def test_authors_trajectory(variant, policy, mode, tolerance):
    case = check.OptimizerCase(parity.FIXTURES)
    meta = case.meta
    params = {name: nn.Parameter(torch.from_numpy(case.initial(name))) for name in case.names}
    groups = [
        {
            "name": group,
            "lr": lr,
            "params": [params[n] for n in case.names if meta["parameters"][n]["group"] == group],
        }
        for group, lr in meta["base_lr"].items()
    ]
    optimizer = MaskedAdamW(
        groups,
        betas=tuple(meta["betas"]),
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        rule="hf",
        unused=policy,
        max_norm=meta["clip_norm"],
    )
    path = {name: [] for name in case.names}
    for update in range(meta["updates"]):
        for name, p in params.items():
            grad = case.gradient(name, update)
            p.grad = None if grad is None else torch.from_numpy(grad)
        optimizer.scale_lr(lr_multiplier(update, meta["warmup_updates"], meta["updates"]))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(case.arrays["lr"][update], rel=1e-14)
        with ops.kernels(mode):
            stats = optimizer.step()
        assert stats.grad_norm.item() == pytest.approx(case.arrays["grad_norm"][update], rel=1e-12)
        assert stats.nonfinite.item() == 0
        for name, p in params.items():
            path[name].append(p.detach().numpy().copy())
    results = {f"param/{name}": values for name, values in path.items()}
    order = [p for g in optimizer.param_groups for p in g["params"]]
    for name, p in params.items():
        state = optimizer.state.get(p) or {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        results[f"m/{name}"], results[f"v/{name}"] = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        results[f"step/{name}"] = optimizer.step_counts()[next(i for i, q in enumerate(order) if q is p)]
    report = case.compare(results, variant, tolerance)
    assert report.ok, str(report)


@pytest.mark.parametrize("policy", ["skip", "graph", "update_all"])
@pytest.mark.parametrize("flags", ["gradient", "mask"])
@pytest.mark.parametrize(("mode", "tolerance"), [("auto", 1e-11), ("reference", 1e-12)])
def test_policies_follow_a_plain_loop(policy, flags, mode, tolerance):
    """Two groups; zeros, missing gradients, and masks that disagree with which gradients exist."""
    params = parameters()
    lrs = [1e-2] * 4 + [3e-3] * 2
    optimizer = MaskedAdamW(
        [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "lr": 3e-3}],
        unused=policy, max_norm=0.1, weight_decay=0.1,
    )  # fmt: skip
    loop = Loop(params, lrs, policy=policy, max_norm=0.1, wd=0.1)
    generator = torch.Generator().manual_seed(5)
    for step, grads in enumerate(random_steps(40)):
        used = None
        if flags == "mask":
            used = torch.randint(0, 2, (len(params),), generator=generator, dtype=torch.uint8)
        set_gradients(params, grads)
        multiplier = lr_multiplier(step, 5, 40)
        optimizer.scale_lr(multiplier)
        with ops.kernels(mode):
            stats = optimizer.step(used)
        norm = loop.step(grads, None if used is None else used.tolist(), multiplier)
        assert stats.grad_norm.item() == pytest.approx(norm, rel=1e-12)
        assert_follows(optimizer, params, loop, tolerance)
    moved = optimizer.step_counts().tolist()
    assert len(set(moved)) > 1, "the test must mix step counts"


@pytest.mark.parametrize("mode", MODES)
def test_torch_rule_is_torch_adamw(mode):
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = MaskedAdamW(ours, **settings, rule="torch", unused="graph")
    peer = torch.optim.AdamW(theirs, **settings, foreach=False)
    for grads in random_steps(25):
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        with ops.kernels(mode):
            optimizer.step()
        peer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rules_differ_where_they_should():
    """With tiny gradients the place of eps decides the first update."""
    found = {}
    for rule in ("hf", "torch"):
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        p.grad = torch.full_like(p, 1e-9)
        MaskedAdamW([p], lr=1.0, weight_decay=0.0, rule=rule).step()
        found[rule] = 1 - p.item()
    m, v = 1e-10, 1e-21
    assert found["hf"] == pytest.approx(math.sqrt(1e-3) / 0.1 * m / (math.sqrt(v) + 1e-8), rel=1e-9)
    assert found["torch"] == pytest.approx(1 / 0.1 * m / (math.sqrt(v) / math.sqrt(1e-3) + 1e-8), rel=1e-9)


# ---------------------------------------------------------------------------------------- what does not move, and why


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["skip", "graph", "update_all"])
def test_unused_parameters_keep_every_bit(mode, policy):
    params = parameters(torch.float32)
    optimizer = MaskedAdamW(params, lr=1e-2, unused=policy, max_norm=0.1, weight_decay=0.5)
    used = torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.uint8)
    with ops.kernels(mode):
        if policy != "update_all":  # give the others a history
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        before = snapshot(optimizer, params)
        for p in params:
            p.grad = torch.randn_like(p)
        raw = [p.grad.clone() for p in params]
        stats = optimizer.step(used)
        after = snapshot(optimizer, params)
    for i, p in enumerate(params):
        if used[i]:
            assert p.numel() == 0 or not torch.equal(before[0][i], after[0][i])
            assert int(after[2][i]) == int(before[2][i]) + (p.numel() > 0 or policy != "skip")
        else:
            assert torch.equal(before[0][i], after[0][i])
            assert int(after[2][i]) == int(before[2][i])
            assert all(torch.equal(a, b) for a, b in zip(before[1][i], after[1][i], strict=True))
            assert torch.equal(p.grad, raw[i])
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g, u in zip(raw, used, strict=True) if u]))
    assert stats.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("policy", "count"), [("skip", 0), ("graph", 1), ("update_all", 1)])
@pytest.mark.parametrize("grad", ["zero", "missing"])
def test_a_used_parameter_with_gradient_zero(mode, policy, count, grad):
    """``bert_pos_projection`` on GLUE: marked used, gradient exactly zero or no tensor at all."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    params[1].grad = torch.zeros(3) if grad == "zero" else None
    optimizer = MaskedAdamW(params, lr=0.1, unused=policy, weight_decay=0.1)
    with ops.kernels(mode):
        optimizer.step(torch.ones(2, dtype=torch.uint8))
    assert optimizer.step_counts().tolist() == [1, count]
    expected = 1 - 0.1 * 0.1 if count else 1.0
    assert params[1].tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_skip_sees_gradients_whose_squares_underflow(mode):
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    params[0].grad = torch.full((4,), 1e-30)
    params[1].grad = torch.zeros(4)
    params[2].grad = torch.tensor([0.0, 0.0, -1e-42, 0.0])
    optimizer = MaskedAdamW(params, unused="skip")
    with ops.kernels(mode):
        optimizer.step()
    assert optimizer.step_counts().tolist() == [1, 0, 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["skip", "graph", "update_all"])
def test_a_refused_first_step_leaves_no_state(mode, policy):
    params = parameters(torch.float32)
    optimizer = MaskedAdamW(params, unused=policy, max_norm=0.1)
    set_gradients(params, [torch.full(shape, math.nan) for shape in SHAPES])
    with ops.kernels(mode):
        assert optimizer.step().nonfinite.item() == 1
    assert optimizer.state_dict()["state"] == {}
    assert not optimizer.step_counts().any()


@pytest.mark.parametrize("mode", MODES)
def test_update_zero_with_rate_zero_moves_only_the_state(mode):
    params = parameters(torch.float32)
    optimizer = MaskedAdamW(params, lr=1e-2, max_norm=0.1)
    optimizer.scale_lr(lr_multiplier(0, 10, 100))
    before = [bits(p) for p in params]
    set_gradients(params, [torch.ones(s) for s in SHAPES])
    with ops.kernels(mode):
        optimizer.step()
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, params, strict=True))
    assert optimizer.step_counts().tolist() == [1, 1, 1, 1, 0, 1]
    assert optimizer.state[params[0]]["exp_avg"].abs().min() > 0
    optimizer.scale_lr(lr_multiplier(5, 10, 100))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_left_clipped(mode, dtype):
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    p.grad = torch.full((4,), 3.0, dtype=dtype)
    with ops.kernels(mode):
        MaskedAdamW([p], max_norm=0.1).step()
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.05), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [ROW - 1, 2 * ROW, 5 * ROW + 1, 3_000_000])
def test_the_norm_of_large_gradients_is_accurate(mode, size):
    """A running float32 sum of three million squares would be off by 1e-4."""
    p = nn.Parameter(torch.zeros(size))
    p.grad = torch.rand(size, generator=torch.Generator().manual_seed(0))
    p.grad[-1] = 50.0
    expected = p.grad.double().norm().item()
    with ops.kernels(mode):
        assert MaskedAdamW([p]).step().grad_norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_layout_does_not_matter(p_format, grad_format, channels):
    """The fused kernel pairs elements by their place in memory."""
    torch.manual_seed(0)
    value, grads = torch.randn(4, channels, 2, 2), [torch.randn(4, channels, 2, 2) for _ in range(3)]
    plain, other = nn.Parameter(value.clone()), nn.Parameter(value.clone(memory_format=p_format))
    a, b = (MaskedAdamW([p], lr=1e-2, max_norm=0.1) for p in (plain, other))
    for step, grad in enumerate(grads):
        plain.grad, other.grad = grad.clone(), grad.clone(memory_format=grad_format)
        a.step()
        b.step()
        torch.testing.assert_close(plain.grad, other.grad, rtol=1e-6, atol=0)
        if step == 1:  # a state from elsewhere is contiguous
            saved = b.state_dict()
            for state in saved["state"].values():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].contiguous()
            b.load_state_dict(saved)
    torch.testing.assert_close(plain.data, other.data.contiguous(), rtol=1e-6, atol=1e-7)


def test_mask_on_the_device_of_the_parameters_reads_nothing():
    """The reference on fake CUDA tensors, where reading a value raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s, device="cuda")) for s in SHAPES]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = MaskedAdamW(params, unused="update_all", max_norm=0.1)
        stats = optimizer.step(torch.empty(len(params), dtype=torch.uint8, device="cuda"))
        assert stats.grad_norm.device.type == "cuda"
        assert stats.nonfinite.dtype == torch.int32
        with pytest.raises(DataDependentOutputException):
            stats.nonfinite.item()


# ---------------------------------------------------------------------------------------------------------- the state


def test_a_saved_state_is_one_of_torchs_with_names_and_rates():
    """By group; that training goes on in either is ``kernels/test_masked_adamw.py``'s."""
    ours = parameters()[:4]
    groups = [{"params": ours[:2], "name": "main"}, {"params": ours[2:], "name": "backbone", "lr": 1e-3}]
    optimizer = MaskedAdamW(groups, lr=1e-2, rule="torch", unused="graph")
    set_gradients(ours, random_steps(1)[0][:4])
    optimizer.step()
    saved = optimizer.state_dict()
    assert all(s["step"].dtype == torch.float32 and s["step"].shape == () for s in saved["state"].values())
    peer = torch.optim.AdamW([{"params": ours[:2]}, {"params": ours[2:]}], foreach=False)
    peer.load_state_dict(saved)
    saved = peer.state_dict()
    for group in saved["param_groups"]:  # an optimiser that never loaded ours has no names
        del group["name"]
    again = MaskedAdamW([{"params": ours[:2], "name": "main"}, {"params": ours[2:], "name": "backbone"}])
    again.load_state_dict(saved)
    assert [g["name"] for g in again.param_groups] == ["main", "backbone"]
    assert [g["lr"] for g in again.param_groups] == [1e-2, 1e-3]


def assert_steps_are_views(optimizer):
    counts = optimizer.step_counts()
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if p in optimizer.state:
            assert optimizer.state[p]["step"].data_ptr() == counts[i].data_ptr()


def test_a_copy_keeps_its_settings():
    params = parameters()
    optimizer = MaskedAdamW(params, rule="torch", unused="graph", max_norm=0.5)
    set_gradients(params, random_steps(1)[0])
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert (copied.rule, copied.unused, copied.max_norm) == ("torch", "graph", 0.5)
    before = optimizer.step_counts().clone()
    for p in copied.param_groups[0]["params"]:  # a copied parameter has no gradient
        p.grad = torch.ones_like(p)
    copied.step()
    assert torch.equal(optimizer.step_counts(), before)
    assert copied.step_counts()[0] == before[0] + 1
    assert_steps_are_views(copied)


# ------------------------------------------------------------------------------------------------- errors and choices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "hg"}, "rule is 'hg'; nearest: hf"),
        ({"unused": "skp"}, "unused is 'skp'; nearest: skip"),
        ({"max_norm": 0.0}, "max_norm is 0.0; give a positive number"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor(0.1)}, "lr is a tensor; give a number"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"betas": (0.9, 1.0)}, "betas are"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(parameters(), **settings)


@pytest.mark.parametrize("used", [torch.ones(5, dtype=torch.uint8), torch.ones(6)])
def test_a_mask_of_another_kind_is_refused(used):
    with pytest.raises(ValueError, match=r"used is .*; it must be uint8 or bool \[6\]"):
        MaskedAdamW(parameters()).step(used)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        MaskedAdamW(table.parameters()).step()


def test_states_that_do_not_fit_are_refused():
    params = parameters()
    optimizer = MaskedAdamW(params)
    set_gradients(params, random_steps(1)[0])
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(UserError, match="saved for 6 parameters in 1 groups, but there are 5 in 1"):
        MaskedAdamW(params[:5]).load_state_dict(saved)
    wrong = [nn.Parameter(torch.zeros(2, 2)), *params[1:]]
    with pytest.raises(UserError, match=r"exp_avg of parameter 0 is \[7, 5\], the parameter \[2, 2\]"):
        MaskedAdamW(wrong).load_state_dict(saved)
    momentum = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    momentum.step()
    with pytest.raises(UserError, match="has no 'step'"):
        optimizer.load_state_dict(momentum.state_dict())
    with pytest.raises(UserError, match="amsgrad"):
        optimizer.load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(ops, "_logged", set())
    params = parameters()
    optimizer = MaskedAdamW(params)
    with caplog.at_level(logging.INFO, logger="unit_fast.ops"):
        for mode in ("auto", "auto", "reference", "reference"):
            with ops.kernels(mode):
                optimizer.step()
    assert [r.message for r in caplog.records] == [
        "adamw: cpu (tensors on cpu)",
        "adamw: reference (the mode is reference)",
    ]


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
def test_what_the_fused_kernel_cannot_take_runs_as_the_reference(kind, caplog, monkeypatch):
    monkeypatch.setattr(ops, "_logged", set())
    dtypes = (torch.bfloat16, torch.bfloat16) if kind == "bfloat16" else (torch.float32, torch.float64)
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    for p in params:
        p.grad = torch.ones_like(p)
    with caplog.at_level(logging.INFO, logger="unit_fast.ops"):
        stats = MaskedAdamW(params, lr=0.1, max_norm=0.1).step()
    assert "adamw: reference (parameters are not all float32" in caplog.text
    assert stats.grad_norm.item() == pytest.approx(math.sqrt(6))
    assert all(p.tolist() == pytest.approx([0.9] * 3, rel=1e-2) for p in params)


def test_make_optimizer_takes_the_models_groups():
    body, head = nn.Linear(2, 2), nn.Linear(2, 1)

    def groups(lr, lr_backbone):
        return [
            {"name": "main", "params": list(head.parameters()), "lr": lr},
            {"name": "backbone", "params": list(body.parameters()) if lr_backbone else [], "lr": lr_backbone},
        ]

    model = SimpleNamespace(parameter_groups=groups)
    config = OptimConfig(lr=0.5, lr_backbone=0.25, rule="torch", unused="update_all", max_norm=None, eps=1e-3)
    optimizer = make_optimizer(model, config)
    assert [(g["name"], g["lr"], g["eps"]) for g in optimizer.param_groups] == [
        ("main", 0.5, 1e-3),
        ("backbone", 0.25, 1e-3),
    ]
    assert (optimizer.rule, optimizer.unused, optimizer.max_norm) == ("torch", "update_all", None)
    assert len(make_optimizer(model, OptimConfig(lr_backbone=0.0)).param_groups) == 1


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("step", "warmup", "total", "expected"),
    [
        (0, 2000, 500_000, 0.0),
        (1, 2000, 500_000, 1 / 2000),
        (1999, 2000, 500_000, 1999 / 2000),
        (2000, 2000, 500_000, 1.0),
        (251_000, 2000, 500_000, 0.5),
        (500_000, 2000, 500_000, 0.0),
        (600_000, 2000, 500_000, 0.0),
        (0, 0, 10, 1.0),
        (5, 0, 10, 0.5),
        (10, 10, 10, 1.0),
        (11, 10, 10, 0.0),
        (7, 10, 8, 0.7),
        (10, 10, 8, 1.0),
        (0, 0, 0, 1.0),
    ],
)
def test_lr_multiplier(step, warmup, total, expected):
    assert lr_multiplier(step, warmup, total) == pytest.approx(expected, abs=1e-15)


def test_lr_multiplier_refuses_negative_numbers():
    with pytest.raises(ValueError, match="none may be negative"):
        lr_multiplier(-1, 10, 100)


def test_a_state_is_loaded_as_a_copy_with_its_counts():
    """The counts are one tensor that the states share: loading must not read them after binding the present ones."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = MaskedAdamW(parameters)
    for _ in range(3):
        parameters[0].grad = torch.ones(3)
        optimizer.step()
    saved = optimizer.state_dict()
    others = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    other = MaskedAdamW(others)
    assert other.step_counts().tolist() == [0, 0]
    other.load_state_dict(saved)
    assert other.step_counts().tolist() == [3, 0]
    kept = bits(saved["state"][0]["exp_avg"])
    others.append(torch.nn.Parameter(torch.ones(3)))
    other.add_param_group({"params": others[2:], "lr": 1e-3})
    for p in others:
        p.grad = torch.ones(3)
    other.step()
    assert other.step_counts().tolist() == [4, 1, 1], "a group added later takes part"
    assert_steps_are_views(other)
    assert torch.equal(kept, bits(saved["state"][0]["exp_avg"])), "the loaded state must not be shared"


def test_a_rate_that_torch_kept_as_a_tensor_is_loaded_as_a_number():
    parameter = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([parameter], lr=torch.tensor(0.25), foreach=False)
    parameter.grad = torch.ones(3)
    theirs.step()
    ours = MaskedAdamW([parameter])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.25
    assert isinstance(ours.param_groups[0]["lr"], float)
