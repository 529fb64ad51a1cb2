"""The losses against a second implementation that loops over layers, images, queries and slots in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import parity
from tests.fixtures.parity import check
from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.config import LossConfig
from unit_fast.detection import criterion
from unit_fast.detection.matcher import match

LAYERS, QUERIES, CLASSES, WIDTH, ATTRIBUTES = 3, 7, 6, 8, 5
NO_OBJECT = CLASSES - 1
COUNTS = {"some": (3, 5), "empty_image": (0, 4), "no_targets": (0, 0), "many": (9, 2), "full": (7, 7), "one": (1,)}
VARIANTS = {
    "per_image": {},
    "per_process": {"ce_normalisation": "per_process"},
    "weights": {"weight_bbox": 3.0, "weight_giou": 0.5, "no_object_weight": 0.3, "detection_loss_weight": 2.5},
    "bcl": {"balanced_class_loss": True},
}


class Head(nn.Module):
    """Attribute head small enough to read: logits = relu(A hidden + table[class])."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.linear = nn.Parameter(torch.randn(ATTRIBUTES, WIDTH, generator=generator, dtype=torch.float64).to(dtype))
        self.table = nn.Parameter(torch.randn(CLASSES, ATTRIBUTES, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, hidden, classes):
        return F.relu(hidden @ self.linear.T + self.table[classes])


def make(counts, seed=0, attributes=True, dtype=torch.float64):
    """Random predictions (leaves with gradient) and a batch with ``counts`` objects, 0 to 16 attributes each."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    images, n = len(counts), max(counts)
    size = (LAYERS, images, QUERIES)
    logits = (4 * rand(*size, CLASSES) - 2).to(dtype).requires_grad_()
    boxes = (0.1 + 0.8 * rand(*size, 4)).to(dtype).requires_grad_()
    hidden = (2 * rand(*size, WIDTH) - 1).to(dtype).requires_grad_()
    labels = torch.full((images, n), -1)
    targets = torch.zeros(images, n, 4, dtype=dtype)
    slots = torch.full((images, n, 16), -1)
    for b, count in enumerate(counts):
        labels[b, :count] = torch.randint(0, NO_OBJECT, (count,), generator=generator)
        targets[b, :count] = (0.1 + 0.8 * rand(count, 4)).to(dtype)
        for t in range(count):
            k = (0, 16, 1, 3)[(t + b) % 4]
            slots[b, t, :k] = torch.randint(0, ATTRIBUTES, (k,), generator=generator)
    batch = Batch(
        task="detection_visual_genome",
        labels=labels,
        boxes=targets,
        attributes=slots if attributes else None,
        counts=torch.tensor(counts, dtype=torch.int32),
    )
    return SimpleNamespace(logits=logits, boxes=boxes, hidden=hidden, batch=batch)


def giou(a, b):
    """Of two boxes (cx, cy, w, h) of plain numbers or scalar tensors."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    inner = width * height if width > 0 and height > 0 else 0.0
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inner
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inner / union - (hull - union) / hull


def naive(logits, boxes, hidden, query, batch, loss, head):
    """SPEC 2.1 word for word, one layer, image, query and attribute at a time."""
    out = {}
    layers, images, queries, _ = logits.shape
    number = max(1, int(batch.counts.sum()))
    for l in range(layers):
        object_of = [{int(query[l, b, t]): t for t in range(int(batch.counts[b]))} for b in range(images)]
        for b in range(images):
            object_of[b].pop(-1, None)
        ce, bbox, box_giou, attr, positive, negative = [], 0.0, 0.0, [], 0.0, 0.0
        for b in range(images):
            weighted, weights, values, k_values = 0.0, 0.0, 0.0, 0
            for q in range(queries):
                t = object_of[b].get(q)
                target = NO_OBJECT if t is None else int(batch.labels[b, t])
                nll = torch.logsumexp(logits[l, b, q], 0) - logits[l, b, q, target]
                weight = loss.no_object_weight if t is None else 1.0
                weighted, weights = weighted + weight * nll, weights + weight
                positive, negative = (positive, negative + nll) if t is None else (positive + nll, negative)
                if t is not None:
                    for i in range(4):
                        bbox = bbox + (boxes[l, b, q, i] - batch.boxes[b, t, i]).abs()
                    box_giou = box_giou + 1 - giou(boxes[l, b, q], batch.boxes[b, t])
                if head is not None:
                    z = head(hidden[l, b, q], torch.tensor(target))
                    slots = [] if t is None else [a for a in batch.attributes[b, t].tolist() if a >= 0]
                    for a in slots:
                        values = values + 0.5 / len(slots) * (torch.logsumexp(z, 0) - z[a])
                    k_values += bool(slots)
            ce.append((weighted, weights))
            attr.append((values, k_values))
        terms = {"loss_bbox": loss.weight_bbox * bbox / number, "loss_giou": loss.weight_giou * box_giou / number}
        if loss.balanced_class_loss:
            terms["loss_ce"] = 0.9 * positive / number + 0.1 * negative / max(1, images * queries - number)
        elif loss.ce_normalisation == "per_process":
            terms["loss_ce"] = sum(v for v, _ in ce) / sum(w for _, w in ce)
        else:
            terms["loss_ce"] = sum(v / w for v, w in ce) / images
        if head is not None:
            if loss.ce_normalisation == "per_process":
                terms["loss_attr"] = sum(v for v, _ in attr) / max(1, sum(k for _, k in attr))
            else:
                terms["loss_attr"] = sum(v / max(1, k) for v, k in attr) / images
        suffix = "" if l == layers - 1 else f"_{l}"
        out |= {name + suffix: loss.detection_loss_weight * value for name, value in terms.items()}
    return out


def run(given, loss, head, query=None):
    if query is None:
        query = match(given.logits, given.boxes, given.batch, loss)
    return criterion.detection_losses(
        given.logits, given.boxes, given.hidden, query, given.batch, loss, head, no_object=NO_OBJECT
    ), query


def gradients(total, leaves):
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "last"])
def test_losses_and_gradients_equal_the_loops(counts, variant, auxiliary):
    loss = LossConfig(**VARIANTS[variant], auxiliary=auxiliary)
    head = None if loss.balanced_class_loss else Head()
    given = make(counts, seed=sum(counts))
    terms, query = run(given, loss, head)
    expected = naive(given.logits, given.boxes, given.hidden, query, given.batch, loss, head)
    if not auxiliary:
        expected = {name: value for name, value in expected.items() if name.count("_") == 1}
    assert terms.keys() == expected.keys()
    leaves = [given.logits, given.boxes, given.hidden, *(head.parameters() if head else ())]
    for name, value in terms.items():
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(float(torch.as_tensor(expected[name]).detach()), rel=1e-12, abs=1e-14), (
            name
        )
        for ours, theirs in zip(gradients(value, leaves), gradients(expected[name], leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("padding", [0, 3], ids=["no_columns", "padded"])
def test_without_objects_zero_losses_have_zero_gradients(padding):
    given = make((0, 0), seed=2)
    for name, value in given.batch.tensors().items():
        if name != "counts":
            shape = (value.shape[0], padding, *value.shape[2:])
            setattr(given.batch, name, torch.full(shape, 0.0 if name == "boxes" else -1, dtype=value.dtype))
    head = Head()
    terms, _ = run(given, LossConfig(), head)
    for name, value in terms.items():
        if "ce" not in name:
            assert value.item() == 0.0
            assert value.requires_grad
    sum(terms.values()).backward()
    for leaf in (given.boxes, given.hidden, head.linear, head.table):
        assert leaf.grad is not None
        assert torch.count_nonzero(leaf.grad) == 0
    assert torch.count_nonzero(given.logits.grad) > 0


def test_without_attributes_the_head_has_zero_gradients():
    given, head = make((3, 2), seed=4), Head()
    given.batch.attributes.fill_(-1)
    terms, _ = run(given, LossConfig(), head)
    assert terms["loss_attr"].item() == 0.0
    sum(terms.values()).backward()
    assert torch.count_nonzero(head.linear.grad) == 0
    assert torch.count_nonzero(head.table.grad) == 0
    assert torch.count_nonzero(given.boxes.grad) > 0


def test_only_the_configured_number_of_attributes_counts():
    given, head, loss = make((3, 4), seed=6), Head(), LossConfig(max_attributes=2)
    terms, query = run(given, loss, head)
    cut = make((3, 4), seed=6)
    cut.batch.attributes[..., 2:] = -1
    assert terms["loss_attr"].item() == run(cut, LossConfig(), head, query)[0]["loss_attr"].item()
    assert terms["loss_attr"].item() != run(given, LossConfig(), head, query)[0]["loss_attr"].item()


def test_padding_content_is_irrelevant():
    given, head = make((2, 5), seed=7), Head()
    terms, query = run(given, LossConfig(), head)
    given.batch.boxes[0, 2:] = math.nan
    given.batch.attributes[0, 2:] = 3
    again, _ = run(given, LossConfig(), head, query)
    for name in terms:
        assert terms[name].item() == again[name].item()
    sum(again.values()).backward()
    assert given.boxes.grad.isfinite().all()


def test_low_precision_is_computed_in_float32():
    given = make((3, 5), seed=8, dtype=torch.bfloat16)
    head = Head(torch.bfloat16)
    terms, query = run(given, LossConfig(), head)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    wide = make((3, 5), seed=8, dtype=torch.float64)
    for name in ("logits", "boxes", "hidden"):
        getattr(wide, name).data = getattr(given, name).detach().double()
    wide.batch.boxes = given.batch.boxes.double()
    expected, _ = run(wide, LossConfig(), None, query)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)


def faked(given, head, query):
    """(mode, ``given``, the head's table, query) as tensors without data: any read of a value raises."""
    mode = FakeTensorMode()
    leaves = {name: mode.from_tensor(getattr(given, name)) for name in ("logits", "boxes", "hidden")}
    fields = {name: mode.from_tensor(value) for name, value in given.batch.tensors().items()}
    fake = SimpleNamespace(**leaves, batch=Batch(task=given.batch.task, **fields))
    return mode, fake, mode.from_tensor(head.table), mode.from_tensor(query)


@pytest.mark.parametrize("variant", VARIANTS)
def test_criterion_reads_nothing_on_the_host(variant):
    loss, given, head = LossConfig(**VARIANTS[variant]), make((3, 0, 9), seed=10), Head()
    mode, fake, table, query = faked(given, head, match(given.logits, given.boxes, given.batch, loss))
    with mode:
        attributes = None if loss.balanced_class_loss else lambda hidden, classes: table[classes] * hidden[..., :1]
        terms, _ = run(fake, loss, attributes, query)
        sum(terms.values()).backward()
        assert fake.logits.grad.shape == given.logits.shape
        assert (table.grad is None) == (attributes is None)
        with pytest.raises(DataDependentOutputException):
            terms["loss_ce"].item()


@pytest.mark.parametrize("attributes", [False, True])
def test_fused_losses_are_few_operators(attributes):
    """What is left between the model's outputs and the terms: the number of boxes, and one operator for each loss."""
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor | tuple | list) and not function.is_view:
                seen.append(function._schema.name.split("::")[1])
            return out

    given, head, loss = make((3, 5), seed=10, dtype=torch.bfloat16), Head(torch.bfloat16), LossConfig()
    mode, fake, table, query = faked(given, head, match(given.logits, given.boxes, given.batch, loss))
    with mode, ops.kernels("fused"):
        with Note():
            terms, _ = run(fake, loss, (lambda hidden, classes: table[classes]) if attributes else None, query)
        forward = seen.copy()
        seen.clear()
        total = torch.stack(list(terms.values())).sum()
        with Note():
            total.backward()
    expected = ["sum", "clamp", "set_loss_fwd"]
    if attributes:  # the queries of the objects, their classes, the head's lookup
        expected += ["clamp", "gather", "clamp", "index", "attribute_loss_fwd"]
    assert forward == expected
    assert {name for name in seen if "loss" in name} == {
        "set_loss_bwd",
        *(["attribute_loss_bwd"] if attributes else []),
    }
    assert len([name for name in seen if "loss" in name]) == 1 + attributes


def test_number_of_boxes_is_averaged_over_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(9))
    assert criterion.num_boxes(torch.tensor([1, 2]), torch.float64).item() == 3.0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(0))
    assert criterion.num_boxes(torch.tensor([1, 2]), torch.float64).item() == 1.0


def test_errors_name_the_remedy():
    given, head = make((2,), attributes=False), Head()
    with pytest.raises(ValueError, match="has no attributes"):
        run(given, LossConfig(), head)
    with pytest.raises(ValueError, match="balanced_class_loss is not defined together with attributes"):
        run(make((2,)), LossConfig(balanced_class_loss=True), head)


def test_vqa_loss_is_the_sum_over_answers():
    scores = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]], dtype=torch.float64)
    targets = torch.tensor([[0.3, 0.0, 1.0], [0.0, 0.9, 0.6]], dtype=torch.float64)
    p = scores.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum() / 2
    assert criterion.vqa_loss(scores, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    assert criterion.vqa_loss(scores.bfloat16(), targets).dtype == torch.float32


def test_class_loss_is_the_mean_cross_entropy():
    scores = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]], dtype=torch.float64)
    expected = -(scores.softmax(1)[0, 2].log() + scores.softmax(1)[1, 0].log()) / 2
    assert criterion.class_loss(scores, torch.tensor([2, 0])).item() == pytest.approx(expected.item(), rel=1e-12)
    assert criterion.class_loss(scores.bfloat16(), torch.tensor([2, 0])).dtype == torch.float32


@pytest.mark.parametrize(
    "stem", [s for s in check.cases(parity.FIXTURES) if s.name.endswith("__coco")], ids=lambda s: s.name
)
def test_matching_and_losses_equal_the_authors(stem):
    """From the stored logits and boxes of the authors' model; one case has more objects than queries."""
    case = check.load(stem)
    expected, targets = case.expected(), case.inputs()["targets"]
    logits, boxes = torch.from_numpy(expected["logits/all"]), torch.from_numpy(expected["boxes"])
    n = max(len(t["labels"]) for t in targets)
    labels, target_boxes = torch.full((len(targets), n), -1), torch.zeros(len(targets), n, 4, dtype=torch.float64)
    for i, target in enumerate(targets):
        labels[i, : len(target["labels"])] = torch.from_numpy(target["labels"])
        target_boxes[i, : len(target["labels"])] = torch.from_numpy(target["boxes"])
    counts = torch.tensor([len(t["labels"]) for t in targets], dtype=torch.int32)
    batch = Batch(task="detection_coco", labels=labels, boxes=target_boxes, counts=counts)
    loss = LossConfig(ce_normalisation="per_process")
    query = match(logits, boxes, batch, loss)
    for l in range(len(query)):
        for b in range(len(targets)):
            pairs = sorted((int(q), t) for t, q in enumerate(query[l, b]) if q >= 0)
            stored = [tuple(p) for p in expected["matching"][l, b].tolist() if p[0] >= 0]
            assert pairs == stored
    terms = criterion.detection_losses(logits, boxes, logits, query, batch, loss, no_object=logits.shape[-1] - 1)
    assert len(case.loss_names) == len(terms)
    for name, value in zip(case.loss_names, expected["loss"], strict=True):
        assert terms[name.split("/")[-1]].item() == pytest.approx(value, rel=1e-12), name
