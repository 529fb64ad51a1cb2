"""The fused set loss: bounds, memory, fakes, compilation, launches, determinism.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

from functools import partial

import pytest
import torch
from unit_fast_kernels import set_loss as module
from unit_fast_kernels.assembly import record as _record
from unit_fast_kernels.shared.registration import REGISTERED
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.common import (
    assert_as_good_as_eager,
    assert_fake_is_real,
    guarded,
    poison_new_memory,
    values_and_gradients,
)
from tests.kernels.program_order import ORDERS, permute_programs
from tests.planted_kernels import needs_compiler
from unit_fast import ops

SIZES = {  # (L, B, Q, K, N), objects of the images
    "row": ((1, 1, 1, 3, 1), (1,)),
    "odd": ((2, 3, 7, 5, 4), (4, 0, 3)),
    "tail": ((1, 2, 9, 130, 5), (5, 2)),
    "many_classes": ((1, 2, 5, 1602, 6), (3, 6)),
    "many_objects": ((1, 2, 80, 6, 70), (70, 35)),
    "many_images": ((1, 17, 2, 3, 1), (1, 0) * 8 + (1,)),
    "many_layers": ((40, 1, 3, 3, 2), (2,)),
    "two_classes": ((2, 2, 9, 2, 3), (3, 1)),
    "empty": ((2, 2, 5, 4, 0), (0, 0)),
    "no_targets": ((2, 3, 6, 4, 5), (0, 0, 0)),
    "all_padded": ((2, 2, 6, 4, 5), (0, 3)),
    "crowd": ((2, 2, 6, 5, 14), (14, 9)),
    "no_object_label": ((2, 3, 7, 5, 40), (40, 0, 3)),  # objects whose class is no-object: weighed as that class is
}
SETTINGS = {
    "per_image": {},
    "per_process": {"normalisation": "per_process", "no_object_weight": 0.3},
    "balanced": {"balanced": True},
    "weights": {"weights": (2.5, 5.0, 0.5)},
}
DTYPES = [torch.float32, torch.bfloat16]
set_loss_reference, set_loss_cpu, set_loss_fused = (
    partial(module.SET_LOSS.run, name) for name in ("reference", "cpu", "fused")
)


@pytest.fixture(params=["default", "row"])
def blocks(request, monkeypatch):
    """The default blocks, or one of each row: many partial sums, added a few at a time."""
    if request.param == "row":
        parameters = {"rows": 1, "block": 32, "warps": 1}
        monkeypatch.setattr(module, "SUM_IMAGES", 2)
        monkeypatch.setattr(module, "SUM_BLOCKS", 4)
        monkeypatch.setattr(module, "launch_parameters", lambda op, bucket, default, device: parameters)
    return request.param


def problem(name, seed=5):
    """(leaves logits and boxes, the other arguments, the upstream gradient of the three losses), exact in bf16."""
    (layers, images, queries, classes, objects), counts = SIZES[name]
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64).bfloat16().double()

    logits, boxes = 6 * rand(layers, images, queries, classes) - 3, 0.1 + 0.8 * rand(layers, images, queries, 4)
    target_boxes = (0.1 + 0.8 * rand(images, objects, 4)).bfloat16().double()
    query = torch.full((layers, images, objects), -1)
    labels = torch.full((images, objects), -1)
    for b, count in enumerate(counts):
        labels[b, :count] = torch.randint(0, classes - 1, (count,), generator=rng)
        if name == "no_object_label":
            labels[b, :count:2] = classes - 1
        target_boxes[b, count:] = float("nan")  # padding is never looked at
        for l in range(layers):
            matched = min(count, queries)
            which = torch.randperm(count, generator=rng)[:matched]
            query[l, b, which] = torch.randperm(queries, generator=rng)[:matched]
    others = {
        "query": query,
        "labels": labels,
        "target_boxes": target_boxes,
        "num_boxes": torch.tensor(float(max(1, sum(counts)))),
        "no_object": classes - 1,
    }
    return [logits, boxes.bfloat16().double()], others, rand(3, layers) - 0.5


def stacked(op, others, **settings):
    """The three losses as one tensor, so that all gradients count."""

    def function(logits, boxes):
        return torch.stack(op(logits, boxes, **others, **settings))

    return function


def wide(others, dtype=torch.float64):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in others.items()}


def check(name, dtype, **settings):
    inputs, others, upstream = problem(name)
    low = [x.to(dtype) for x in inputs]
    exact = values_and_gradients(stacked(set_loss_reference, others, **settings), inputs, upstream)
    eager = values_and_gradients(stacked(set_loss_reference, wide(others, dtype), **settings), low, upstream)
    ours = values_and_gradients(stacked(set_loss_fused, wide(others, dtype), **settings), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, torch.float32, dtype, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, d) for n in SIZES for d in DTYPES[: 1 + (n not in ("many_images", "many_layers"))]),
        ("odd", torch.float16),
    ],
    ids=str,
)
def test_is_as_good_as_eager(name, dtype):
    check(name, dtype)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["odd", "crowd", "no_targets", "no_object_label"])
def test_every_setting(blocks, name, setting):
    check(name, torch.float32, **SETTINGS[setting])


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", module.SHAPES)
def test_real_shapes_on_a_gpu(shape, setting):
    torch.manual_seed(0)
    arguments = module.make(module.SHAPES[shape], torch.bfloat16, "cuda")
    low = [arguments.pop("logits"), arguments.pop("boxes")]
    inputs = [x.double() for x in low]
    upstream = torch.randn(3, len(low[0]), device="cuda", dtype=torch.float64)
    settings = SETTINGS[setting]
    exact = values_and_gradients(stacked(set_loss_reference, wide(arguments), **settings), inputs, upstream)
    eager = values_and_gradients(stacked(set_loss_reference, arguments, **settings), low, upstream)
    runs = [values_and_gradients(stacked(set_loss_fused, arguments, **settings), low, upstream) for _ in range(2)]
    assert_as_good_as_eager(runs[0], eager, exact, torch.float32, torch.bfloat16, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- Which outputs are asked for, and what gets no gradient -----------------------------------------------------------


@pytest.mark.parametrize("used", [0, 1, 2, None])
def test_gradients_of_one_output(used):
    """A gradient that does not come is not read."""
    inputs, others, upstream = problem("odd")
    gradients = []
    for op in (set_loss_fused, set_loss_reference):
        leaves = [x.float().requires_grad_() for x in inputs]
        out = op(*leaves, **wide(others, torch.float32))
        total = (torch.stack(out) * 0.0).sum() if used is None else (out[used] * upstream[used]).sum()
        gradients.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["empty", "no_targets", "all_padded", "crowd"])
def test_queries_without_an_object_get_zero_box_gradients(blocks, name):
    inputs, others, upstream = problem(name)
    losses, _, dboxes = values_and_gradients(
        stacked(set_loss_fused, wide(others, torch.float32)), [x.float() for x in inputs], upstream
    )
    matched = torch.zeros(dboxes.shape[:3], dtype=torch.bool)
    for l, of_layer in enumerate(others["query"]):
        for b, of_image in enumerate(of_layer):
            matched[l, b, of_image[of_image >= 0]] = True
    assert torch.count_nonzero(dboxes[~matched]) == 0
    assert bool((dboxes[matched] != 0).any(-1).all())
    if not matched.any():
        assert torch.count_nonzero(losses[1:]) == 0


def test_equal_touching_and_inner_boxes_have_the_gradient_of_pytorch():
    """Minima and maxima of equal edges share their gradient evenly; clamps pass it at exactly zero."""
    target = torch.tensor([0.5, 0.5, 0.25, 0.5])
    cases = torch.tensor(
        [
            [0.5, 0.5, 0.25, 0.5],  # the same
            [0.75, 0.5, 0.25, 0.5],  # side by side
            [0.75, 1.0, 0.25, 0.5],  # corner to corner
            [0.5, 0.5, 0.125, 0.25],  # inside
            [0.5, 0.5, 0.5, 0.5],  # around, edges in common
            [0.25, 0.125, 0.125, 0.125],  # apart
        ]
    )
    n = len(cases)
    others = {
        "query": torch.arange(n)[None, None],
        "labels": torch.zeros(1, n, dtype=torch.int64),
        "target_boxes": target.expand(1, n, 4).contiguous(),
        "num_boxes": torch.tensor(float(n)),
        "no_object": 1,
    }
    inputs = [torch.zeros(1, 1, n, 2), cases[None, None]]
    for used in (1, 2):
        upstream = torch.zeros(3, 1)
        upstream[used] = 1.0
        ours, theirs = (
            values_and_gradients(stacked(op, others), inputs, upstream) for op in (set_loss_fused, set_loss_reference)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tail", "crowd", "no_targets", "empty"])
def test_reads_inside_and_writes_everything(blocks, name, monkeypatch):
    inputs, others, upstream = problem(name)
    low, others = [x.float() for x in inputs], wide(others, torch.float32)
    plain = values_and_gradients(stacked(set_loss_fused, others), low, upstream)
    poison_new_memory(monkeypatch)
    leaves = [guarded(x).requires_grad_() for x in low]
    between = {k: guarded(v) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    out = stacked(set_loss_fused, between)(*leaves)
    poisoned = [out, *torch.autograd.grad(out, leaves, guarded(upstream.float()))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, low, strict=True))
    for key, value in others.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(between[key].nan_to_num(), value.nan_to_num())


@pytest.mark.skipif(not INTERPRETING, reason="PyTorch's cross-entropy raises")
def test_what_is_out_of_range_reads_nothing_and_shows():
    """A label that is no class gives NaN; a query that does not exist belongs to nobody."""
    (logits, boxes), others, _ = problem("odd")
    leaves = [guarded(x.float()).requires_grad_() for x in (logits, boxes)]
    arguments = wide(others, torch.float32)
    arguments["labels"] = torch.where(arguments["labels"] >= 0, 10**6, -1)
    ce, bbox, _ = set_loss_fused(*leaves, **arguments)
    assert bool(ce.isnan().all())
    assert bool(bbox.isfinite().all())
    dlogits, dboxes = torch.autograd.grad((ce + bbox).sum(), leaves)
    assert bool(dlogits.isnan().any())
    assert bool(dboxes.isfinite().all())
    arguments = wide(others, torch.float32)
    arguments["query"] = torch.where(arguments["query"] >= 0, 10**6, -1)
    ce, bbox, _ = set_loss_fused(*leaves, **arguments)
    assert torch.count_nonzero(bbox) == 0
    assert bool(ce.isfinite().all())


def _strided(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_strided_inputs():
    inputs, others, upstream = problem("odd")
    low, others = [x.float() for x in inputs], wide(others, torch.float32)
    dense = values_and_gradients(stacked(set_loss_fused, others), low, upstream)
    strided = {k: _strided(v) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in others.items()}
    upstream = upstream.mT.contiguous().mT
    found = values_and_gradients(stacked(set_loss_fused, strided), [_strided(x) for x in low], upstream)
    assert all(torch.equal(a, b) for a, b in zip(dense, found, strict=True))


def _arguments(dtype, strided, settings):
    (logits, boxes), others, upstream = problem("odd")
    logits, boxes, others = logits.to(dtype), boxes.to(dtype), wide(others, torch.float32)
    query, labels, target_boxes = (others[k] for k in ("query", "labels", "target_boxes"))
    target_boxes = target_boxes.nan_to_num()  # opcheck compares runs and takes NaN for a difference
    by = list(upstream.float())
    if strided:
        logits, boxes, query, labels = (_strided(x) for x in (logits, boxes, query, labels))
    inputs = logits, boxes, query, labels, target_boxes
    forward = (*inputs, others["num_boxes"], others["no_object"], *settings)
    _, lse = module._forward(*forward)
    backward = (*by, *inputs, others["num_boxes"], lse, others["no_object"], *settings)
    return forward, backward


@pytest.mark.parametrize(
    ("dtype", "strided", "settings"),
    [
        (torch.float32, False, (0.1, False, False, 1.0, 5.0, 2.0)),
        (torch.bfloat16, True, (0.3, True, False, 1.0, 1.0, 1.0)),
    ],
)
def test_registration(dtype, settings, strided):
    for op, arguments in zip((module._forward, module._backward), _arguments(dtype, strided, settings)):
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)
    assert_fake_is_real(module._backward, None, arguments[1], None, *arguments[3:])


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def function(logits, boxes, query, labels, target_boxes, num_boxes):
        settings = module.Settings(4, 0.1, False, False, 1.0, 1.0, 1.0)
        losses = module.set_loss_fused(logits, boxes, query, labels, target_boxes, num_boxes, settings)
        return torch.stack(losses)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for name in ("odd", "crowd") if dynamic else ("odd",):
        inputs, others, upstream = problem(name)
        others = wide(others, torch.float32)
        del others["no_object"]
        results = [
            values_and_gradients(lambda *x, f=f, o=others: f(*x, **o), [x.float() for x in inputs], upstream)
            for f in (function, compiled)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Launches ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("shape", module.SHAPES)
def test_one_launch_each(shape):
    found, recorded = [], []

    def both():
        for operator, arguments in module.launches(module.SHAPES[shape], torch.bfloat16, "cuda:0"):
            before = len(recorded)
            REGISTERED[operator].launch(*arguments)
            found.append([launch.name for launch in recorded[before:]])

    _record.record(both, "a100", into=recorded)
    assert found == [["_set_loss_fwd_kernel"], ["_set_loss_bwd_kernel"]]


@pytest.mark.parametrize("name", ["odd", "crowd", "many_objects"])
def test_results_do_not_depend_on_launch_parameters(name, monkeypatch):
    inputs, others, upstream = problem(name)
    low, others = [x.float() for x in inputs], wide(others, torch.float32)
    first = values_and_gradients(stacked(set_loss_fused, others), low, upstream)
    other = {"rows": 4, "block": 4, "warps": 1}
    monkeypatch.setattr(module, "launch_parameters", lambda op, bucket, default, device: other)
    second = values_and_gradients(stacked(set_loss_fused, others), low, upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal():
    inputs, others, upstream = problem("tail")
    low, others = [x.bfloat16() for x in inputs], wide(others, torch.float32)
    runs = [values_and_gradients(stacked(set_loss_fused, others), low, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def forward_of(name):
    """Losses and log-sum-exps."""
    (logits, boxes), others, _ = problem(name)
    a = wide(others, torch.float32)
    return module._forward(
        logits.float(), boxes.float(), a["query"], a["labels"], a["target_boxes"], a["num_boxes"],
        a["no_object"], 0.1, False, False, 1.0, 5.0, 2.0,
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_programs_in_any_order_give_the_same_bits(blocks, order, monkeypatch):
    """Other sizes in turn: a counter that were not back at 0 would give other sums, or none."""
    names = ["odd", "many_layers", "row", "tail", "no_targets", "odd"]
    plain = [forward_of(name) for name in names]
    poison_new_memory(monkeypatch)
    permute_programs(monkeypatch, order)
    for name, expected in zip(names, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(forward_of(name), expected, strict=True)), name


def test_candidates_are_looked_up(monkeypatch):
    """Tuning would find every entry, the default first."""
    asked = []
    monkeypatch.setattr(
        module, "launch_parameters", lambda op, bucket, default, device: asked.append((op, bucket, default))
    )
    for shape in module.SHAPES.values():
        tried = module.candidates(shape)
        assert all(set(candidate["parameters"]) == {"rows", "block", "warps"} for candidate in tried)
        asked.clear()
        for op in ("set_loss_fwd", "set_loss_bwd"):
            module._parameters(op, torch.empty(shape[:4], device="meta"))
            first = next(c for c in tried if c["op"] == op)
            assert asked.pop() == (first["op"], first["bucket"], first["parameters"])


# --- What does not fit ------------------------------------------------------------------------------------------------


def _small(**changes):
    (logits, boxes), others, _ = problem("odd")
    return {"logits": logits.float(), "boxes": boxes.float(), **wide(others, torch.float32), **changes}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"logits": torch.zeros(2, 3, 7, 5).double()}, "logits is torch.float64: convert it to float32, bfloat16"),
        ({"target_boxes": torch.zeros(3, 4, 4).double()}, "target_boxes is torch.float64: convert it"),
        ({"logits": torch.zeros(1).expand(2, 3, 7, 65537)}, "there are 65537 classes: kernels exist for 1 to 65536"),
    ],
)
def test_unfit_arguments_are_told(changes, text):
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^set_loss: the mode is fused, but {text}"):
        ops.set_loss(**_small(**changes))


def test_fused_mode_calls_the_kernels_or_says_why_not():
    with ops.kernels("fused"):
        if INTERPRETING:
            found = ops.set_loss(**_small())
            assert all(torch.equal(a, b) for a, b in zip(found, set_loss_fused(**_small()), strict=True))
        else:
            with pytest.raises(ValueError, match="^set_loss: the mode is fused, but tensors are on cpu"):
                ops.set_loss(**_small())
