"""Accumulated batches are one batch: the same losses and gradients, whatever each of them holds."""

import dataclasses

import pytest
import torch

from tests.model.test_criterion import NO_OBJECT, QUERIES, VARIANTS, Head, gradients, make, run
from tests.models import random_batch, small_config
from unit_fast.batch import Batch
from unit_fast.config import LossConfig
from unit_fast.detection import criterion
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.step import train_step

SPLITS = {  # objects of the images of each batch
    "few_and_many": ((1,), (7,)),
    "one_without": ((0, 0), (3, 5)),
    "none_at_all": ((0,), (0,)),
    "three": ((2, 2), (0, 1), (6, 4)),
    "unequal_sizes": ((3,), (1, 0, 5)),
    "more_than_queries": ((9, 2), (1, 3)),
}


def part(given, images: slice):
    """The same predictions and objects for some of the images."""
    fields = {name: value[images] for name, value in given.batch.tensors().items()}
    return [value[:, images] for value in (given.logits, given.boxes, given.hidden)], Batch(
        task=given.batch.task, **fields
    )


def accumulated(given, query, split, loss, head, share=criterion.shares):
    """The terms of the whole update from its parts."""
    cuts, at = [], 0
    for counts in split:
        cuts.append(slice(at, at + len(counts)))
        at += len(counts)
    parts = [part(given, images) for images in cuts]
    total = {}
    for (outputs, batch), images, found in zip(parts, cuts, share([b for _, b in parts], QUERIES, loss), strict=True):
        terms = criterion.detection_losses(
            *outputs, query[:, images], batch, loss, head, no_object=NO_OBJECT, share=found
        )
        for name, value in terms.items():
            total[name] = total.get(name, 0.0) + value * len(batch.counts) / at
    return total


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_and_gradients_are_those_of_one_batch(variant, split):
    loss = LossConfig(**VARIANTS[variant])
    # Which objects stay without a query is known only after matching: see the next test.
    head = None if loss.balanced_class_loss or max(map(max, split)) > QUERIES else Head()
    given = make(sum(split, ()), seed=3)
    expected, query = run(given, loss, head)
    found = accumulated(given, query, split, loss, head)
    leaves = [given.logits, given.boxes, given.hidden, *(head.parameters() if head else ())]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-14), name
        for ours, theirs in zip(gradients(found[name], leaves), gradients(value, leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_the_test_would_see_denominators_of_the_parts():
    """The negative control: each batch divided by its own numbers."""
    given, loss = make((1, 7), seed=3), LossConfig(ce_normalisation="per_process")
    expected, query = run(given, loss, Head())
    own = accumulated(given, query, ((1,), (7,)), loss, Head(), lambda batches, *_: [None] * len(batches))
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_attr"):
        assert abs(own[name].item() / expected[name].item() - 1) > 0.01, name


def test_attributes_of_objects_without_a_query_count_by_their_share():
    """The weights of the parts add up to one, so that it stays a mean."""
    given, loss = make((9, 2), seed=3), LossConfig(ce_normalisation="per_process")
    batches = [part(given, slice(0, 1))[1], part(given, slice(1, 2))[1]]
    found = criterion.shares(batches, QUERIES, loss)
    assert sum(share.attr.item() * share.part for share in found) == pytest.approx(1.0)
    attributed = [int((batch.attributes >= 0).any(-1).sum()) for batch in batches]
    assert found[0].attr.item() / found[1].attr.item() == pytest.approx(attributed[0] * QUERIES / 9 / attributed[1])


def test_the_number_of_boxes_is_that_of_the_update_of_all_processes(monkeypatch):
    reduced = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: reduced.append(tensor.add_(4)))
    batches = [make(counts).batch for counts in ((1,), (7,))]
    assert [share.num_boxes.item() for share in criterion.shares(batches, QUERIES, LossConfig())] == [3.0, 3.0]
    assert len(reduced) == 1


# ------------------------------------------------------------------------------------------------ the whole update


def without_dropout(name, **changes):
    config = small_config(name, dropout=0.0)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, **changes))


def cut(batch: Batch, *ends: int) -> list[Batch]:
    """``batch`` as several, ending before these samples."""
    return [
        Batch(task=batch.task, **{name: value[start:end] for name, value in batch.tensors().items()})
        for start, end in zip((0, *ends), ends)
    ]


def update_of(model, batches):
    optimizer = MaskedAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    update = train_step(model, optimizer, batches[0].task, batches)
    return update, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ends", [(2, 4), (1, 4)], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("name", "normalisation"),
    [
        ("detection_coco", "per_image"), ("detection_coco", "per_process"), ("detection_visual_genome", "per_process"),
        ("vqa2", "per_image"), ("glue_sst2", "per_image"),
    ],
)  # fmt: skip
def test_an_update_of_several_batches_is_that_of_one(name, normalisation, ends):
    torch.manual_seed(0)
    config = without_dropout(name, ce_normalisation=normalisation)
    model = UniT(config).train()
    batch = random_batch(name, config, batch=4)  # 3, 1, 1 and 1 objects
    whole, expected = update_of(model, [batch])
    parts, found = update_of(model, cut(batch, *ends))
    assert parts.names == whole.names
    torch.testing.assert_close(parts.terms, whole.terms, rtol=2e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (found[parameter] - gradient).abs().max() < 1e-3 * scale, parameter
