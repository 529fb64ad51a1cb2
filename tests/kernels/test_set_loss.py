"""The set loss in plain PyTorch: the definition query by query, gradients, padding, each refusal."""

import pytest
import torch
import torch.nn.functional as F
from unit_fast_kernels.match_cost import pairwise_giou
from unit_fast_kernels.set_loss.reference import set_loss_bwd_reference
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.common import assert_as_good_as_eager, values_and_gradients
from tests.kernels.test_set_loss_fused import SETTINGS, SIZES, problem, set_loss_cpu, set_loss_reference, stacked, wide
from unit_fast import ops

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel is launched here")
OPS = {"reference": set_loss_reference, "cpu": set_loss_cpu}


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
@pytest.mark.parametrize("name", [name for name in SIZES if not name.startswith("many")])
def test_is_the_definition(name, setting, op):
    inputs, others, _ = problem(name)
    found = op(*inputs, **others, **SETTINGS[setting])
    expected = by_loops(*inputs, **others, **SETTINGS[setting])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck(setting, op):
    inputs, others, _ = problem("crowd")
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(stacked(op, others, **SETTINGS[setting]), leaves, fast_mode=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SIZES)
def test_cpu_equals_the_reference(name, setting):
    """Values and gradients, in float64; then in low precision, as good as the reference."""
    inputs, others, upstream = problem(name)
    exact, found = (
        values_and_gradients(stacked(op, others, **SETTINGS[setting]), inputs, upstream) for op in OPS.values()
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for dtype in (torch.float32, torch.bfloat16):
        low = [x.to(dtype) for x in inputs]
        eager, found = (
            values_and_gradients(stacked(op, wide(others, dtype), **SETTINGS[setting]), low, upstream)
            for op in OPS.values()
        )
        assert_as_good_as_eager(found, eager, exact, torch.float32, dtype, dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_cpu_gradients_of_one_input(which):
    inputs, others, _ = problem("odd")
    leaves = [x.requires_grad_(i == which) for i, x in enumerate(inputs)]
    ours, theirs = (
        torch.autograd.grad(sum(x.sum() for x in op(*leaves, **others)), leaves[which]) for op in OPS.values()
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["odd", "crowd", "no_targets", "empty", "all_padded", "no_object_label"])
def test_gradient_by_hand_is_autograds(name, setting):
    """The registered backward, which CPU tensors get, in float32."""
    (logits, boxes), others, upstream = problem(name)
    leaves = [x.clone().requires_grad_() for x in (logits, boxes)]
    settings = SETTINGS[setting]
    expected = torch.autograd.grad(stacked(set_loss_reference, others, **settings)(*leaves), leaves, upstream)
    found = set_loss_bwd_reference(
        *upstream.float(), logits.float(), boxes.float(), others["query"], others["labels"],
        others["target_boxes"].float(), others["num_boxes"], logits.logsumexp(-1).float(), others["no_object"],
        settings.get("no_object_weight", 0.1), settings.get("normalisation") == "per_process",
        settings.get("balanced", False), *settings.get("weights", (1.0, 1.0, 1.0)),
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["empty", "no_targets"])
def test_without_objects_zero_terms_are_connected(name):
    inputs, others, _ = problem(name)
    leaves = [x.requires_grad_() for x in inputs]
    ce, bbox, giou = ops.set_loss(*leaves, **others)
    assert torch.count_nonzero(bbox) == torch.count_nonzero(giou) == 0
    dlogits, dboxes = torch.autograd.grad((ce + bbox + giou).sum(), leaves)
    assert torch.count_nonzero(dlogits) > 0
    assert torch.count_nonzero(dboxes) == 0


def test_dtypes():
    inputs, others, _ = problem("odd")
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = ops.set_loss(*leaves, **others)
        assert {x.dtype for x in out} == {expected}
        assert {g.dtype for g in torch.autograd.grad(sum(x.sum() for x in out), leaves)} == {dtype}


def _arguments(**changes):
    (logits, boxes), others, _ = problem("odd")
    return {"logits": logits, "boxes": boxes, **others, **changes}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"logits": torch.zeros(2, 3, 7)}, r"logits is of shape \[2, 3, 7\]; it must be \[L,B,Q,K\]"),
        ({"logits": torch.zeros(2, 3, 0, 5)}, r"logits is of shape \[2, 3, 0, 5\]; there is no loss of nothing"),
        ({"boxes": torch.zeros(2, 3, 6, 4)}, r"boxes is of shape .* it must be \[L,B,Q,4\] = \[2, 3, 7, 4\]"),
        ({"query": torch.zeros(2, 4, 4).long()}, r"query is of shape .* \[L,B,N\] = \[2, 3, any\]"),
        ({"labels": torch.zeros(3, 5).long()}, r"labels is of shape .* \[B,N\] = \[3, 4\]"),
        ({"target_boxes": torch.zeros(3, 4, 5)}, r"target_boxes is of shape .* \[B,N,4\] = \[3, 4, 4\]"),
        ({"num_boxes": torch.ones(1)}, r"num_boxes is of shape \[1\]; it must be a scalar"),
        ({"num_boxes": torch.tensor(3)}, "num_boxes is torch.int64; it must be floating point"),
        ({"logits": torch.zeros(2, 3, 7, 5).long()}, "logits is torch.int64; it must be floating point"),
        ({"query": torch.zeros(2, 3, 4).int()}, "query is torch.int32; it must be int64"),
        ({"labels": torch.zeros(3, 4)}, "labels is torch.float32; it must be int64"),
        ({"boxes": torch.zeros(2, 3, 7, 4, device="meta")}, "boxes is on meta; move it to cpu"),
        ({"no_object": 5}, "no_object is 5; it must be one of the 5 classes"),
        ({"normalisation": "per_imag"}, "normalisation is 'per_imag'; nearest: per_image"),
    ],
)
def test_refusals(changes, text):
    with pytest.raises(ValueError, match=f"^set_loss: {text}"):
        ops.set_loss(**_arguments(**changes))
