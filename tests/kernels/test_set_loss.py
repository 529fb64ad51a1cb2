"""The set loss: its cases, the definition query by query, what gets no gradient, box gradients, launches."""

import pytest
import torch
import torch.nn.functional as F
from unit_fast_kernels import set_loss as module
from unit_fast_kernels.match_cost import pairwise_giou
from unit_fast_kernels.set_loss import set_loss_fused, set_loss_reference
from unit_fast_kernels.set_loss.cpu import set_loss_cpu
from unit_fast_kernels.set_loss.reference import set_loss_bwd_reference
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Call, Cases, Problem, as_it_is, both, launched, patched
from tests.kernels.common import (
    Registered,
    assert_fake_is_real,
    assert_same_in_any_order,
    guarded,
    kernels_launched,
    values_and_gradients,
)
from tests.kernels.program_order import ORDERS
from tests.planted_kernels import needs_compiler
from unit_fast import ops

SETTINGS = {
    "per_image": {},
    "per_process": {"normalisation": "per_process", "no_object_weight": 0.3},
    "balanced": {"balanced": True},
    "weights": {"weights": (2.5, 5.0, 0.5)},
}
VALIDATE = ops.OPERATORS["set_loss"].validate
OPS = {"reference": set_loss_reference, "cpu": set_loss_cpu}


def make(size, **settings):
    (layers, images, queries, classes, objects), counts, *of_no_object = size
    rng = torch.Generator().manual_seed(5)

    def rand(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64).bfloat16().double()

    logits, boxes = 6 * rand(layers, images, queries, classes) - 3, 0.1 + 0.8 * rand(layers, images, queries, 4)
    target_boxes = 0.1 + 0.8 * rand(images, objects, 4)
    query = torch.full((layers, images, objects), -1)
    labels = torch.full((images, objects), -1)
    for b, count in enumerate(counts):
        labels[b, :count] = torch.randint(0, classes - 1, (count,), generator=rng)
        if of_no_object:
            labels[b, :count:2] = classes - 1
        target_boxes[b, count:] = float("nan")  # padding is never looked at
        for l in range(layers):
            matched = min(count, queries)
            which = torch.randperm(count, generator=rng)[:matched]
            query[l, b, which] = torch.randperm(queries, generator=rng)[:matched]
    inputs = {"logits": logits, "boxes": boxes, "target_boxes": target_boxes}
    inputs = {k: v.bfloat16().half().double() for k, v in inputs.items()}
    inputs["num_boxes"] = torch.tensor(float(max(1, sum(counts))), dtype=torch.float64)
    return Problem(inputs, {"query": query, "labels": labels, "no_object": classes - 1, **settings})


def also(arguments, found):
    """Queries without an object get zero box gradients, the others some."""
    losses, _, dboxes = found
    matched = torch.zeros(dboxes.shape[:3], dtype=torch.bool, device=dboxes.device)
    for l, of_layer in enumerate(arguments["query"]):
        for b, of_image in enumerate(of_layer):
            matched[l, b, of_image[of_image >= 0]] = True
    assert not dboxes[~matched].any()
    assert (dboxes[matched] != 0).any(-1).all()
    if not matched.any():
        assert not losses[1:].any()


def arguments_of(name, dtype=torch.float32, **changes):
    return Call(CASES, CASES.problem(name, "per_image"), dtype).arguments | changes


def _changed(argument, *shape, dtype=torch.float32):
    return {argument: torch.zeros(shape, dtype=dtype)}


CLOSE = ("odd", "crowd", "no_targets", "no_object_label")
ONE_ROW = both(patched(module, SUM_IMAGES=2, SUM_BLOCKS=4), launched(rows=1, block=32, warps=1))
"""Many partial sums, added a few at a time."""
CASES = Cases(
    op="set_loss",
    sizes={  # (L, B, Q, K, N), objects of the images
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
        "no_object_label": ((2, 3, 7, 5, 40), (40, 0, 3), True),  # objects of class no-object: weighed as that class is
    },
    make=make,
    settings=SETTINGS,
    main=("per_image", "per_process"),
    gives=torch.float32,
    leaves=("logits", "boxes"),
    out=torch.stack,
    ways={"fused": {"as_it_is": as_it_is, "one_row": ONE_ROW, "rows": launched(rows=4, block=4, warps=1)}},
    close={"rtol": 1e-11, "atol": 1e-13},
    skip=lambda way, size, setting, dtype: (
        (dtype == torch.float16 and size != "odd")
        or (INTERPRETING and (setting != "per_image" or way != "as_it_is") and dtype != torch.float32)
        or (INTERPRETING and (setting != "per_image" or way == "one_row") and size not in CLOSE)
        or (INTERPRETING and size in ("many_images", "many_layers") and dtype == torch.bfloat16)
        or (way == "rows" and (size not in ("odd", "crowd", "many_objects") or setting != "per_image"))
    ),
    also=also,
    memory=("odd", "tail", "crowd", "no_targets", "empty"),
    dynamic=("odd", "crowd"),
    card={
        name: (shape[:5], [(7 * b) % (shape[4] + 1) for b in range(shape[1])]) for name, shape in module.SHAPES.items()
    },
    valid=lambda: arguments_of("odd"),
    refusals=[
        (_changed("logits", 2, 3, 7), r"logits is of shape \[2, 3, 7\]; it must be \[L,B,Q,K\]"),
        (_changed("logits", 2, 3, 0, 5), r"logits is of shape \[2, 3, 0, 5\]; there is no loss of nothing"),
        (_changed("boxes", 2, 3, 6, 4), r"boxes is of shape .* it must be \[L,B,Q,4\] = \[2, 3, 7, 4\]"),
        (_changed("query", 2, 4, 4, dtype=torch.int64), r"query is of shape .* \[L,B,N\] = \[2, 3, any\]"),
        (_changed("labels", 3, 5, dtype=torch.int64), r"labels is of shape .* \[B,N\] = \[3, 4\]"),
        (_changed("target_boxes", 3, 4, 5), r"target_boxes is of shape .* \[B,N,4\] = \[3, 4, 4\]"),
        (_changed("num_boxes", 1), r"num_boxes is of shape \[1\]; it must be a scalar"),
        ({"num_boxes": torch.tensor(3)}, "num_boxes is torch.int64; it must be floating point"),
        (_changed("logits", 2, 3, 7, 5, dtype=torch.int64), "logits is torch.int64; it must be floating point"),
        (_changed("query", 2, 3, 4, dtype=torch.int32), "query is torch.int32; it must be int64"),
        (_changed("labels", 3, 4), "labels is torch.float32; it must be int64"),
        ({"boxes": torch.zeros(2, 3, 7, 4, device="meta")}, "boxes is on meta; move it to cpu"),
        ({"no_object": 5}, "no_object is 5; it must be one of the 5 classes"),
        ({"normalisation": "per_imag"}, "normalisation is 'per_imag'; nearest: per_image"),
    ],
    unfit=[
        (
            _changed("logits", 2, 3, 7, 5, dtype=torch.float64),
            "logits is torch.float64: convert it to float32, bfloat16",
        ),
        (_changed("target_boxes", 3, 4, 4, dtype=torch.float64), "target_boxes is torch.float64: convert it"),
        (
            {"logits": torch.zeros(1).expand(2, 3, 7, 65537)},
            "there are 65537 classes: kernels exist for 1 to 65536",
        ),
    ],
)


# --- The definition ---------------------------------------------------------------------------------------------------


def by_loops(logits, boxes, query, labels, target_boxes, num_boxes, no_object, no_object_weight=0.1,
             normalisation="per_image", balanced=False, weights=(1.0, 1.0, 1.0)):  # fmt: skip
    """(ce, bbox, giou), one layer, image and query at a time."""
    out = []
    _, images, queries, _ = logits.shape
    for l in range(len(logits)):
        of_images, positive, negative, bbox, giou = [], 0.0, 0.0, 0.0, 0.0
        for b in range(images):
            object_of = {q: t for t, q in enumerate(query[l, b].tolist()) if q >= 0}
            above, below = 0.0, 0.0
            for q in range(queries):
                t = object_of.get(q)
                label = no_object if t is None else int(labels[b, t])
                nll = -F.log_softmax(logits[l, b, q], 0)[label]
                weight = no_object_weight if label == no_object else 1.0
                above, below = above + weight * nll, below + weight
                if label == no_object:
                    negative = negative + nll
                else:
                    positive = positive + nll
                if t is not None:
                    bbox = bbox + (boxes[l, b, q] - target_boxes[b, t]).abs().sum()
                    giou = giou + 1 - pairwise_giou(boxes[l, b, q], target_boxes[b, t])
            of_images.append((above, below))
        if balanced:
            ce = 0.9 * positive / num_boxes + 0.1 * negative / max(1, images * queries - float(num_boxes))
        elif normalisation == "per_process":
            ce = sum(a for a, _ in of_images) / sum(b for _, b in of_images)
        else:
            ce = sum(a / b for a, b in of_images) / images
        terms = [w * x for w, x in zip(weights, (ce, bbox / num_boxes, giou / num_boxes))]
        out.append(torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in terms]))
    return torch.stack(out).unbind(1)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in CASES.sizes if not name.startswith("many")])
def test_is_the_definition(name, setting, op):
    arguments = arguments_of(name, torch.float64, **SETTINGS[setting])
    for a, b in zip(op(*VALIDATE(**arguments)), by_loops(**arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck(setting, op):
    arguments = arguments_of("crowd", torch.float64, **SETTINGS[setting])

    def function(logits, boxes):
        return torch.stack(op(*VALIDATE(**arguments | {"logits": logits, "boxes": boxes})))

    assert torch.autograd.gradcheck(function, [arguments["logits"], arguments["boxes"]], fast_mode=True)


def test_no_object_may_be_any_class():
    for no_object in (0, 2, 4):
        arguments = arguments_of("odd", no_object=no_object)
        arguments["labels"] = torch.where(arguments["labels"] == no_object, 1, arguments["labels"])
        expected, *others = (op(*VALIDATE(**arguments)) for op in (*OPS.values(), set_loss_fused))
        for found in others:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["odd", "crowd", "no_targets", "empty", "all_padded", "no_object_label"])
def test_gradient_by_hand_is_autograds(name, setting):
    """The registered backward, which CPU tensors get, in float32."""
    settings = SETTINGS[setting]
    a = arguments_of(name, torch.float64, **settings)
    leaves, upstream = [a["logits"], a["boxes"]], torch.randn(3, len(a["logits"]), dtype=torch.float64)
    expected = torch.autograd.grad(torch.stack(set_loss_reference(*VALIDATE(**a))), leaves, upstream)
    logits, boxes = (x.detach() for x in leaves)
    found = set_loss_bwd_reference(
        *upstream.float(), logits.float(), boxes.float(), a["query"], a["labels"], a["target_boxes"].float(),
        a["num_boxes"].float(), logits.logsumexp(-1).float(), a["no_object"], settings.get("no_object_weight", 0.1),
        settings.get("normalisation") == "per_process", settings.get("balanced", False),
        *settings.get("weights", (1.0, 1.0, 1.0)),
    )  # fmt: skip
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["empty", "no_targets"])
def test_without_objects_zero_terms_are_connected(name):
    arguments = arguments_of(name, torch.float64)
    ce, bbox, giou = ops.set_loss(**arguments)
    assert torch.count_nonzero(bbox) == torch.count_nonzero(giou) == 0
    dlogits, dboxes = torch.autograd.grad((ce + bbox + giou).sum(), [arguments["logits"], arguments["boxes"]])
    assert torch.count_nonzero(dlogits) > 0
    assert torch.count_nonzero(dboxes) == 0


def test_dtypes():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        arguments = arguments_of("odd", dtype)
        out = ops.set_loss(**arguments)
        assert {x.dtype for x in out} == {expected}
        gradients = torch.autograd.grad(sum(x.sum() for x in out), [arguments["logits"], arguments["boxes"]])
        assert {g.dtype for g in gradients} == {dtype}


# --- What gets no gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["logits", "boxes"])
def test_cpu_gradients_of_one_input(which):
    other = "boxes" if which == "logits" else "logits"
    arguments = arguments_of("odd", torch.float64)
    arguments[other] = arguments[other].detach()
    ours, theirs = (
        torch.autograd.grad(sum(x.sum() for x in op(*VALIDATE(**arguments))), arguments[which]) for op in OPS.values()
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("used", [0, 1, 2, None])
def test_gradients_of_one_output(used):
    """A gradient that does not come is not read."""
    upstream, gradients = torch.randn(3, 2), []
    for op in (set_loss_fused, set_loss_reference):
        arguments = arguments_of("odd")
        out = op(*VALIDATE(**arguments))
        total = (torch.stack(out) * 0.0).sum() if used is None else (out[used] * upstream[used]).sum()
        leaves = [arguments["logits"], arguments["boxes"]]
        with Registered() as backward:
            gradients.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        for function, given in backward.calls:
            assert_fake_is_real(function, *given)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


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

    def function(op):
        return lambda logits, boxes: torch.stack(op(*VALIDATE(logits=logits, boxes=boxes, **others)))

    inputs = [torch.zeros(1, 1, n, 2), cases[None, None]]
    for used in (1, 2):
        upstream = torch.zeros(3, 1)
        upstream[used] = 1.0
        results = (values_and_gradients(function(op), inputs, upstream) for op in (set_loss_fused, set_loss_reference))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not INTERPRETING, reason="PyTorch's cross-entropy raises")
def test_what_is_out_of_range_reads_nothing_and_shows():
    """A label that is no class gives NaN; a query that does not exist belongs to nobody."""
    arguments = arguments_of("odd")
    leaves = [guarded(arguments[k]).requires_grad_() for k in ("logits", "boxes")]
    arguments |= dict(zip(("logits", "boxes"), leaves))
    labels, query = (torch.where(arguments[k] >= 0, 10**6, -1) for k in ("labels", "query"))
    ce, bbox, _ = set_loss_fused(*VALIDATE(**arguments | {"labels": labels}))
    assert bool(ce.isnan().all())
    assert bool(bbox.isfinite().all())
    dlogits, dboxes = torch.autograd.grad((ce + bbox).sum(), leaves)
    assert bool(dlogits.isnan().any())
    assert bool(dboxes.isfinite().all())
    ce, bbox, _ = set_loss_fused(*VALIDATE(**arguments | {"query": query}))
    assert torch.count_nonzero(bbox) == 0
    assert bool(ce.isfinite().all())


# --- Launches ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("shape", module.SHAPES)
def test_one_launch_each(shape):
    assert kernels_launched(module, module.SHAPES[shape]) == [["_set_loss_fwd_kernel"], ["_set_loss_bwd_kernel"]]


def forward_of(name):
    """Losses and log-sum-exps."""
    a = arguments_of(name)
    return module._forward(
        a["logits"].detach(), a["boxes"].detach(), a["query"], a["labels"], a["target_boxes"],
        a["num_boxes"], a["no_object"], 0.1, False, False, 1.0, 5.0, 2.0,
    )  # fmt: skip


@pytest.mark.parametrize("way", [as_it_is, ONE_ROW], ids=["as_it_is", "one_row"])
@pytest.mark.parametrize("order", ORDERS)
def test_programs_in_any_order_give_the_same_bits(way, order, monkeypatch):
    """Other sizes in turn: a counter that were not back at 0 would give other sums, or none."""
    names = ["odd", "many_layers", "row", "tail", "no_targets", "odd"]
    with way(None):
        assert_same_in_any_order(forward_of, names, order, monkeypatch)


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
