"""What a caller gives by mistake is named in one message; what is printed is short."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.models import random_batch, small_config
from unit_fast import Batch, MaskedAdamW, RunConfig, UniT, ops
from unit_fast.errors import UserError

ROWS = torch.zeros(2, 5, 2, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.attention([1], ROWS, ROWS), "attention: q is of type list; give a torch.Tensor"),
        (lambda: ops.attention(ROWS, ROWS.numpy(), ROWS), "attention: k is of type numpy.ndarray"),
        (lambda: ops.attention(ROWS, ROWS, ROWS, None, 0.1, 7), "attention: seed is of type int"),
        (lambda: ops.attention(ROWS, ROWS, v=None), "attention: v is None; give a torch.Tensor"),
        (lambda: ops.attention(ROWS, ROWS, ROWS, seed=np.zeros(2)), "attention: seed is of type numpy.ndarray"),
        (lambda: ops.dropout(3.0, 0.1, torch.tensor([1, 2])), "dropout: x is of type float"),
        (lambda: ops.assignment(ROWS[0], [1, 2]), "assignment: counts is of type list"),
    ],
)
def test_operators_name_what_is_no_tensor(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.fixture(scope="module")
def model():
    return UniT(small_config("coco", "sst2")).eval()


@pytest.mark.parametrize(
    ("task", "change", "text"),
    [
        ("coco", {"labels": None}, "match: the batch of detection_coco has no labels; give every sample its targets"),
        ("coco", {"boxes": np.zeros((2, 3, 4))}, "match: the batch of detection_coco has boxes of type ndarray"),
        ("coco", {"counts": [3, 1]}, "match: .* has counts of type list"),
        ("sst2", {"label": None}, "losses: the batch of glue_sst2 has no label"),
        ("sst2", {"task": "sst"}, "losses: the model has no task 'sst'; nearest: glue_sst2"),
    ],
)
def test_losses_name_the_target_that_is_missing(model, task, change, text):
    batch = random_batch(task, model.config)
    out = model(batch)
    with pytest.raises(UserError, match=text):
        model.losses(out, dataclasses.replace(batch, **change))


def test_models_name_what_is_no_batch(model):
    with pytest.raises(UserError, match="UniT: expected a unit_fast.Batch, found Tensor; make it with collate"):
        model(torch.zeros(1, 3, 8, 8))
    texts = random_batch("sst2", model.config)
    with pytest.raises(UserError, match="match: glue_sst2 has no boxes to match"):
        model.match(model(texts), texts)


def test_a_step_takes_a_closure_as_torchs():
    start = torch.randn(4, generator=torch.Generator().manual_seed(0))
    steps = []
    for by_closure in (False, True):
        p = torch.nn.Parameter(start.clone())
        optimizer = MaskedAdamW([p], lr=0.1)

        def loss(p=p, optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            value = (p**2).sum()
            value.backward()
            return value

        if by_closure:
            with torch.no_grad():
                assert optimizer.step(loss).item() == pytest.approx((start**2).sum().item())
                optimizer.step(closure=loss, used=torch.zeros(1, dtype=torch.uint8))  # nothing moves
        else:
            loss()
            assert optimizer.step(torch.ones(1, dtype=torch.bool)).nonfinite == 0
        steps.append(p.detach().clone())
    assert torch.equal(*steps)
    assert not torch.equal(steps[0], start)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1,), "closure is of type int"),
        ((None, np.ones(1, dtype=np.uint8)), r"used is of type ndarray; give a uint8 or bool tensor \[1\]"),
        ((None, [True]), "used is of type list"),
    ],
)
def test_a_step_names_what_it_cannot_take(arguments, text):
    with pytest.raises(ValueError, match=f"MaskedAdamW: {text}"):
        MaskedAdamW([torch.nn.Parameter(torch.ones(2))]).step(*arguments)


def test_nothing_prints_a_page(model):
    batch = random_batch("coco", model.config)
    optimizer = MaskedAdamW(model.parameter_groups(1e-3, 1e-4))
    things = [model, model.backbone, model.decoder, model.text_encoder, model.image_encoder, batch, model(batch)]
    for thing in (*things, optimizer, model.config, RunConfig()):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 700
    assert repr(RunConfig(steps=5)) == "RunConfig(steps=5)"
    assert eval(repr(model.config), vars(__import__("unit_fast.config", fromlist=[""]))) == model.config
    assert repr(Batch(task="glue_sst2", input_ids=torch.ones(2, 3, dtype=torch.int64))) == (
        "Batch(glue_sst2, 2 samples: input_ids int64 [2, 3] on cpu)"
    )
    assert "main: " in repr(optimizer)
    assert "backbone: " in repr(optimizer)
