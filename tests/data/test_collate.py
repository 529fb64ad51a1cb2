"""Padding, masks and the checks of ``collate``."""

import numpy as np
import pytest
import torch

from tests.models import small_config
from unit_fast.batch import Output
from unit_fast.data.collate import collate
from unit_fast.errors import UserError
from unit_fast.model import UniT


def image(height, width, value=1.0, dtype=torch.float32):
    return torch.full((3, height, width), value, dtype=dtype)


def detection(count, height=4, width=6, **more):
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4]]).repeat(count, 1)
    return {"image": image(height, width), "labels": torch.arange(1, count + 1), "boxes": boxes, **more}


def test_images_are_padded_at_the_bottom_and_right():
    batch = collate("coco", [detection(2), detection(0, 5, 3), detection(1, 2, 2)])
    assert batch.task == "detection_coco"
    assert batch.image.shape == (3, 3, 5, 6)
    assert batch.pixel_mask.dtype == torch.bool
    for i, (h, w) in enumerate([(4, 6), (5, 3), (2, 2)]):
        assert (batch.image[i, :, :h, :w] == 1).all()
        assert batch.image[i].sum() == 3 * h * w
        assert not batch.pixel_mask[i, :h, :w].any()
        assert (~batch.pixel_mask[i]).sum() == h * w
    assert batch.sizes == [(4, 6), (5, 3), (2, 2)]
    assert batch.orig_size.tolist() == [[4, 6], [5, 3], [2, 2]]
    assert batch.sample_ids == [0, 1, 2]


def test_targets_are_padded_with_minus_one():
    samples = [
        detection(2, attributes=torch.tensor([[1, 400, -1], [-1, -1, -1]]), image_id=7, orig_size=(40, 60)),
        detection(0, sample_id="x", image_id=8),
        detection(1),
    ]
    batch = collate("detection_visual_genome", samples)
    assert torch.equal(batch.labels, torch.tensor([[1, 2], [-1, -1], [1, -1]]))
    assert torch.equal(batch.counts, torch.tensor([2, 0, 1], dtype=torch.int32))
    assert batch.boxes.shape == (3, 2, 4)
    assert batch.boxes[1].abs().sum() == 0
    assert batch.attributes.shape == (3, 2, 16)
    assert batch.attributes[0, 0].tolist() == [1, 400] + [-1] * 14
    assert (batch.attributes[1:] == -1).all()
    assert batch.sample_ids == [7, "x", 2]
    assert batch.orig_size.tolist() == [[40, 60], [4, 6], [4, 6]]
    assert collate("coco", samples[1:]).attributes is None


def test_no_targets_at_all():
    batch = collate("vg", [detection(0), detection(0)])
    shapes = (batch.labels.shape, batch.boxes.shape, batch.attributes.shape)
    assert shapes == ((2, 0), (2, 0, 4), (2, 0, 16))
    assert batch.counts.tolist() == [0, 0]
    lists = collate("coco", [{"image": image(2, 2), "labels": [], "boxes": []}])
    assert (lists.labels.shape, lists.boxes.shape) == ((1, 0), (1, 0, 4))
    plain = collate("coco", [{"image": image(2, 2)}])
    assert plain.labels is plain.counts is None


def test_texts_are_padded_and_defaults_filled():
    samples = [{"input_ids": [5, 6, 7]}, {"input_ids": np.array([5]), "token_type_ids": [1], "attention_mask": [0]}]
    batch = collate("sst2", samples)
    assert batch.input_ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert batch.sizes == [(3,), (1,)]
    assert batch.image is batch.label is batch.orig_size is None
    padded = collate("sst2", [{**s, "label": i} for i, s in enumerate(samples)], pad_text_to=8)
    assert padded.input_ids.shape == (2, 8)
    assert padded.attention_mask.sum() == 3
    assert torch.equal(padded.label, torch.tensor([0, 1]))


def test_vqa_batch():
    scores = torch.tensor([0.0, 0.3, 1.0])
    batch = collate("vqa2", [{"image": image(2, 3), "input_ids": [1, 2], "answer_scores": scores}] * 2)
    assert batch.answer_scores.tolist() == torch.stack([scores] * 2).tolist()
    assert batch.sizes == [(2, 3)] * 2


def test_the_dtype_is_kept():
    sample = detection(1)
    batch = collate("coco", [{**sample, "image": image(3, 3, dtype=torch.float64), "boxes": sample["boxes"].double()}])
    assert batch.image.dtype == batch.boxes.dtype == torch.float64


TEXT = {"input_ids": [1, 2, 3]}
BOXES = torch.tensor([[0.5, 0.5, 0.1, 0.1]])


@pytest.mark.parametrize(
    ("task", "samples", "message"),
    [
        ("coco", [], "no samples"),
        ("coco", [7], "sample 0: expected a dict"),
        ("coco", [{"labels": [1], "boxes": BOXES}], "sample 0: field 'image' is missing"),
        ("coco", [detection(1), {"image": image(2, 2)}], "sample 1: field 'labels' is missing, but sample 0 has it"),
        ("coco", [{"image": image(2, 2), "labels": [1]}], "sample 0: field 'boxes' is missing"),
        ("coco", [{"image": image(2, 2), "boxes": BOXES}], "sample 0: has boxes but no labels"),
        ("coco", [detection(1, labels=[1, 2])], "boxes has shape (1, 4), expected [2, 4]"),
        ("coco", [detection(1, labels=[-1])], "sample 0: labels has -1"),
        ("coco", [detection(1, labels=[1.0])], "labels is torch.float32, expected integers"),
        ("coco", [detection(1, boxes=BOXES * float("nan"))], "not finite"),
        ("coco", [detection(1, boxes=BOXES * torch.tensor([1, 1, -1, 1]))], "negative width or height"),
        ("coco", [detection(1, boxes=BOXES * 100)], "relative to the image"),
        ("coco", [detection(1, boxes=(BOXES * 10).long())], "boxes is torch.int64, expected a floating type"),
        ("coco", [detection(1, attributes=[[1]])], "'attributes' is no field of task coco"),
        ("coco", [detection(1, label=1)], "'label' is no field of task coco"),
        ("coco", [detection(1, input_ids=[1])], "'input_ids' is no field of task coco"),
        ("coco", [detection(1, image=image(2, 2).byte())], "image is torch.uint8, expected a floating type"),
        ("coco", [detection(1, image=image(2, 2)[0])], "image has shape (2, 2), expected 3 dimensions"),
        ("coco", [detection(1, image=torch.zeros(1, 2, 2))], "expected [3, H, W]"),
        ("coco", [detection(1), detection(1, image=image(2, 2).double())], "sample 1: image has dtype torch.float64"),
        ("coco", [detection(1, orig_size=(0, 4))], "orig_size is [0, 4]"),
        ("coco", [detection(1, orig_size=(1, 2, 3))], "orig_size is [1, 2, 3]"),
        ("vg", [detection(1, attributes=[[1], [2]])], "attributes has shape (2, 1), expected [1, 16]"),
        ("vg", [detection(1, attributes=[[1] * 17])], "attributes has shape (1, 17)"),
        ("vg", [detection(1, attributes=[[-2]])], "attributes has -2"),
        ("sst2", [{"input_ids": []}], "input_ids is empty"),
        ("sst2", [{"input_ids": [-1]}], "input_ids has -1"),
        ("sst2", [{"input_ids": [[1]]}], "expected 1 dimensions"),
        ("sst2", [{"input_ids": "abc"}], "cannot become a tensor"),
        ("sst2", [TEXT | {"attention_mask": [1, 1]}], "attention_mask has 2 entries, input_ids has 3"),
        ("sst2", [TEXT | {"attention_mask": [1, 2, 1]}], "attention_mask must be 0 or 1"),
        ("sst2", [TEXT | {"label": -1}], "label is -1"),
        ("sst2", [TEXT | {"label": 1}, TEXT], "sample 1: field 'label' is missing"),
        ("sst2", [TEXT | {"image": image(2, 2)}], "'image' is no field of task sst2"),
        ("vqa2", [TEXT], "field 'image' is missing"),
        ("vqa2", [TEXT | {"image": image(2, 2), "label": 1}], "'label' is no field of task vqa2"),
        (
            "vqa2",
            [TEXT | {"image": image(2, 2), "answer_scores": torch.zeros(n)} for n in (2, 3)],
            "sample 1: answer_scores has entries 3, sample 0 has 2",
        ),
        ("cocoo", [detection(1)], "unknown task 'cocoo'; nearest: coco"),
    ],
)
def test_contradictions_name_sample_and_field(task, samples, message):
    with pytest.raises(UserError) as info:
        collate(task, samples)
    assert message in str(info.value)


MODEL = small_config("coco", "vg", "vqa2", "sst2")


@pytest.mark.parametrize(
    ("task", "samples", "message"),
    [
        ("coco", [detection(1), detection(2, labels=[90, 91])], "sample 1: labels has 91, .* 0 to 90 .*outputs is 92"),
        ("coco", [detection(1, labels=[500])], "sample 0: labels has 500"),
        ("vg", [detection(1, labels=[1600]), detection(1, labels=[1601])], "sample 1: labels has 1601"),
        ("vg", [detection(1, attributes=[[400]]), detection(1, attributes=[[401]])], "sample 1: attributes has 401"),
        ("sst2", [TEXT, {"input_ids": [1, 200]}], "sample 1: input_ids has 200, .*model.text.vocab_size is 200"),
        ("sst2", [TEXT | {"label": 1}, TEXT | {"label": 2}], "sample 1: label has 2"),
        ("vqa2", [TEXT | {"image": image(2, 2), "answer_scores": torch.zeros(7)}], "has 7 entries, the model has 3129"),
        ("qnli", [TEXT], "the model has no such task; it has detection_coco"),
    ],
)
def test_what_the_model_has_no_place_for(task, samples, message):
    with pytest.raises(UserError, match=message):
        collate(task, samples, model=MODEL)
    if task not in ("qnli", "vqa2"):
        assert len(collate(task, samples[:1])) == 1


def test_answer_scores_are_shares():
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="sample 0: answer_scores must be numbers from 0 to 1"):
            collate("vqa2", [TEXT | {"image": image(2, 2), "answer_scores": torch.tensor([0.0, value])}])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("task", "field", "sample", "message"),
    [
        ("coco", "labels", detection(2, labels=[1, 91]), "labels has 91, the model has places for 0 to 90"),
        ("vg", "attributes", detection(1, attributes=[[401]]), "attributes has 401"),
        ("sst2", "label", TEXT | {"label": 2}, "label has 2, the model has places for 0 to 1"),
    ],
)
def test_the_model_refuses_it_on_every_device(task, field, sample, message, device):
    """Without a look at the device: what ``collate`` noted is on the host."""
    model = UniT(MODEL)
    batch = collate(task, [sample]).to(device)
    assert batch.largest[field] == int(message.split(" has ")[1].split(",")[0])
    with pytest.raises(UserError, match=f"losses of {batch.task}: {message}"):
        model.losses(Output(hidden_states=None), batch)


def test_the_model_refuses_word_pieces_it_has_no_row_for():
    with pytest.raises(UserError, match="glue_sst2: input_ids has 200, the model has places for 0 to 199"):
        UniT(MODEL)(collate("sst2", [{"input_ids": [1, 200]}]))


def test_text_longer_than_the_padding():
    with pytest.raises(UserError, match="input_ids has 3 entries, more than pad_text_to 2"):
        collate("sst2", [TEXT], pad_text_to=2)
