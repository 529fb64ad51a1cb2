"""Static shapes: every batch fits its bucket, and what a bucket pads changes nothing that is computed from it."""

import dataclasses
import random

import pytest
import torch

from tests.models import random_batch, small_config
from unit_fast.buckets import PADDING, Buckets, BucketSpec, fill, real_share
from unit_fast.config import DataConfig
from unit_fast.data.images.geometry import TrainTransform
from unit_fast.model.unit import UniT
from unit_fast.tasks import TASKS

SIZES = [(480, 640), (640, 480), (427, 640), (333, 500), (500, 281), (640, 640), (300, 1200)]


def _buckets(**changes) -> Buckets:
    return Buckets(short_side=800, max_side=1333, **changes)


def test_image_buckets_have_two_orientations_and_a_square():
    assert _buckets(heights=1, widths=1).images == ((800, 1344), (1344, 800), (1344, 1344))
    found = _buckets(heights=2, widths=4).images
    assert len(found) == len(set(found)) == 15  # a square has one orientation: 2 x 2 x 4 - 2, and the largest square
    assert all((w, h) in found for h, w in found)
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in found)
    assert [h * w for h, w in found] == sorted(h * w for h, w in found)


def test_every_training_image_fits_the_smallest_bucket_that_holds_it():
    buckets, transform, rng = _buckets(), TrainTransform(DataConfig()), random.Random(0)
    for key in range(2000):
        size = transform.geometry(*rng.choice(SIZES), key).size
        spec = buckets.bucket_of([size])
        assert spec.height >= size[0]
        assert spec.width >= size[1]
        assert (spec.height, spec.width) in buckets.images
        smaller = [s for s in buckets.images if s[0] * s[1] < spec.height * spec.width]
        assert not any(h >= size[0] and w >= size[1] for h, w in smaller)


def test_a_batch_of_both_orientations_gets_a_bucket_for_both():
    assert _buckets().bucket_of([(800, 1200), (1200, 800)]) == BucketSpec(height=1344, width=1344, batch=2)


def test_an_image_beyond_every_bucket_gets_its_own():
    assert _buckets().bucket_of([(900, 1500)]) == BucketSpec(height=928, width=1504, batch=1)


@pytest.mark.parametrize(
    ("length", "alone", "beside"),
    [(3, 16, 16), (16, 16, 16), (17, 24, 32), (25, 32, 32), (64, 64, 64), (65, 96, 128), (97, 128, 128), (200,) * 3],
)
def test_texts_are_padded_to_powers_of_two_and_alone_to_half_as_much_again(length, alone, beside):
    assert _buckets().bucket_of([(length,)], text_len=length).text_len == alone
    assert _buckets().bucket_of([(480, 640)], text_len=length).text_len == beside


def test_images_are_ranked_so_that_neighbours_share_a_bucket():
    """One orientation after the other, and where they meet stand large ones."""
    buckets, transform, rng = _buckets(), TrainTransform(DataConfig()), random.Random(0)
    sizes = [transform.geometry(*rng.choice(SIZES), key).size for key in range(400)]
    ranked = sorted(sizes, key=lambda size: buckets.rank(*size))
    found = [buckets.bucket_of([size]) for size in ranked]
    sides = [(b.height, b.width) for b in found]
    assert sum(a != b for a, b in zip(sides, sides[1:])) == len(set(sides)) - 1  # each bucket in one stretch
    kinds = ["wide" if h < w else "square" if h == w else "tall" for h, w in sides]
    assert kinds == sorted(kinds, key=["wide", "square", "tall"].index)
    areas = {kind: [h * w for (h, w), k in zip(sides, kinds) if k == kind] for kind in set(kinds)}
    assert areas["wide"] == sorted(areas["wide"])
    assert areas["tall"] == sorted(areas["tall"], reverse=True)


def test_the_largest_bucket_of_a_kind():
    buckets = _buckets()
    image = buckets.bucket_of([(480, 640)] * 2, text_len=9)
    assert buckets.largest(image) == dataclasses.replace(image, height=1344, width=1344, text_len=128)
    huge = buckets.bucket_of([(1400, 1500)], targets=3)
    assert buckets.largest(huge) == huge
    text = buckets.bucket_of([(9,)], text_len=9)
    assert buckets.largest(text) == dataclasses.replace(text, text_len=128)


def test_a_longest_text_that_is_no_power_of_two_is_the_last_bucket():
    assert _buckets(text_len=140).bucket_of([(9,)], text_len=130).text_len == 140


@pytest.mark.parametrize(("targets", "expected"), [(1, 32), (32, 32), (33, 64), (129, 256)])
def test_targets_are_padded_to_powers_of_two(targets, expected):
    assert _buckets().bucket_of([(480, 640)], targets=targets).max_targets == expected


@pytest.mark.parametrize("field", ["short_side", "heights", "widths", "least_text"])
def test_settings_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"Buckets: {field} is 0; it must be at least 1"):
        Buckets(**({"short_side": 8, "max_side": 8} | {field: 0}))


@pytest.mark.parametrize("name", TASKS)
def test_fill_writes_the_batch_and_nothing_but_padding_beside_it(name):
    config = small_config()
    first, second = random_batch(name, config, 3), random_batch(name, config, 2 + 1, seed=1)
    spec = Buckets(short_side=96, max_side=128).of([first])
    static = spec.empty(first, "cpu")
    addresses = {k: v.data_ptr() for k, v in static.tensors().items()}
    for batch in (first, second):  # the second finds the first in the buffers
        fill(static, batch)
        for field, buffer in static.tensors().items():
            value = getattr(batch, field)
            place = tuple(slice(0, n) for n in value.shape)
            torch.testing.assert_close(buffer[place], value, rtol=0, atol=0)
            outside = torch.ones(buffer.shape, dtype=torch.bool)
            outside[place] = False
            assert (buffer[outside] == PADDING.get(field, 0)).all(), field
    assert addresses == {k: v.data_ptr() for k, v in static.tensors().items()}


def test_fill_makes_the_mask_that_a_batch_without_padding_leaves_out():
    batch = dataclasses.replace(random_batch("detection_coco", small_config()), pixel_mask=None)
    static = Buckets(short_side=96, max_side=128).of([batch]).empty(batch, "cpu")
    fill(static, batch)
    assert not static.pixel_mask[:, :64, :80].any()
    assert static.pixel_mask[:, 64:].all()


def test_fill_refuses_what_does_not_fit():
    config = small_config()
    batch = random_batch("detection_coco", config)
    static = Buckets(short_side=32, max_side=48).of([batch]).empty(batch, "cpu")
    with pytest.raises(ValueError, match="fill: the batch of vqa2 has"):
        fill(static, random_batch("vqa2", config))
    with pytest.raises(ValueError, match=r"fill: image \[3, 3, 64, 80\] does not fit into \[2, 3, 64, 96\]"):
        fill(static, random_batch("detection_coco", config, 3))
    wide = dataclasses.replace(batch, labels=batch.labels.repeat(1, 20), boxes=batch.boxes.repeat(1, 20, 1))
    with pytest.raises(ValueError, match=r"fill: labels \[2, 60\] does not fit into \[2, 32\]"):
        fill(static, wide)


@pytest.mark.parametrize("name", ["glue_qnli", "detection_coco"])
def test_padding_texts_and_targets_changes_no_loss(name):
    """Padding of images reaches their border through the convolutions, as in every batch of DETR; this does not."""
    torch.manual_seed(0)
    config = small_config(name, dropout=0.0)
    model = UniT(config).double().train()
    batch = random_batch(name, config, dtype=torch.float64)
    spec = Buckets(short_side=64, max_side=80, multiple=16, widths=1, heights=1).of([batch])
    static = spec.empty(batch, "cpu")
    fill(static, batch)
    assert static.labels.shape[1] == 32 if name == "detection_coco" else static.input_ids.shape[1] == 16
    exact, padded = (model.losses(model(b), b) for b in (batch, static))
    for key, value in exact.items():
        torch.testing.assert_close(padded[key], value, rtol=1e-12, atol=0)


def test_the_real_share_is_that_of_the_pixels():
    batch = random_batch("detection_coco", small_config())
    batch.sizes = [(64, 80), (48, 60)]
    spec = BucketSpec(height=64, width=96, max_targets=32, batch=2)
    assert real_share(batch, spec) == (64 * 80 + 48 * 60) / (2 * 64 * 96)
