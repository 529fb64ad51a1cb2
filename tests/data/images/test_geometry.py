"""Sizes, flips and crops of SPEC 4.3, and boxes that follow the pixels."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data_roots import picture
from unit_fast.config import DataConfig
from unit_fast.data.images.decode import load_image
from unit_fast.data.images.geometry import EvalTransform, TrainTransform, resized


@settings(max_examples=1000, deadline=None)
@given(st.integers(20, 4000), st.integers(20, 4000), st.sampled_from([96, 400, 480, 800]), st.booleans())
def test_sizes_follow_the_formula(width, height, s, floor):
    """SPEC 4.3 restated: s shrinks at the limit, rounded or floored; the long side is trunc(s long / short)."""
    short, long = min(width, height), max(width, height)
    expected_s = s
    if long / short * s > 1333:
        expected_s = math.floor(1333 * short / long) if floor else round(1333 * short / long)
    if short == expected_s:
        expected = (height, width)
    elif width < height:
        expected = (math.trunc(expected_s * height / width), expected_s)
    else:
        expected = (expected_s, math.trunc(expected_s * width / height))
    got = resized(height, width, s, 1333, floor)
    assert got == expected
    # rounding the short side up may take the long one past the limit by half a step
    assert max(got) <= 1333 + (0 if floor else 0.5 * long / short)


@pytest.mark.parametrize(
    ("height", "width", "rounded", "floored"),
    [
        (480, 640, (800, 1066), (800, 1066)),
        (640, 480, (1066, 800), (1066, 800)),
        (800, 1000, (800, 1000), (800, 1000)),
        (300, 640, (625, 1333), (624, 1331)),
        (427, 640, (800, 1199), (800, 1199)),
        (100, 300, (444, 1332), (444, 1332)),
        (333, 1000, (444, 1333), (443, 1330)),
        (1, 30_000, (1, 1333), (1, 1333)),
        (30_000, 1, (1333, 1), (1333, 1)),
        (1, 1, (800, 800), (800, 800)),
    ],
)
def test_known_sizes(height, width, rounded, floored):
    assert resized(height, width, 800, 1333) == rounded
    assert resized(height, width, 800, 1333, floor=True) == floored
    assert EvalTransform(DataConfig()).geometry(height, width).size == rounded
    assert EvalTransform(DataConfig(), floor=True).geometry(height, width).size == floored


def test_no_resize_when_the_size_is_right(tmp_path):
    image = load_image(picture(tmp_path / "a.jpg", 96, 96), 10**6)
    geometry = EvalTransform(DataConfig(short_side=96, max_side=200)).geometry(96, 96)
    assert geometry.apply_image(image) is image


SMALL = DataConfig(
    short_side=96, max_side=128, train_short_sides=(64, 80, 96), crop_short_sides=(60, 80), crop_min=48, crop_max=72
)


def test_train_transform_is_a_function_of_the_key():
    transform = TrainTransform(DataConfig())
    drawn = [transform.geometry(427, 640, key) for key in range(200)]
    assert drawn == [transform.geometry(427, 640, key) for key in range(200)]
    assert len(set(drawn)) > 100
    assert transform.geometry(427, 640, None) == EvalTransform(DataConfig()).geometry(427, 640)


def test_train_transform_draws_what_the_specification_says():
    data = DataConfig()
    drawn = [TrainTransform(data).geometry(427, 640, key) for key in range(4000)]
    assert 0.45 < np.mean([g.flip for g in drawn]) < 0.55
    cropped = [g for g in drawn if g.crop]
    assert 0.45 < len(cropped) / len(drawn) < 0.55
    assert {min(g.size) for g in drawn if not g.crop} == set(range(480, 801, 32))
    assert {min(g.first) for g in cropped} == {400, 500, 600}
    for side in (2, 3):
        assert (min(g.crop[side] for g in cropped), max(g.crop[side] for g in cropped)) == (384, 600)
    for g in cropped:
        top, left, height, width = g.crop
        assert 0 <= top <= g.first[0] - height
        assert 0 <= left <= g.first[1] - width
        assert max(g.size) <= 1334
    tops = [g.crop[0] for g in cropped if g.first[0] == 600]
    assert min(tops) == 0 < 180 < max(tops)
    assert not any(g.flip for g in (TrainTransform(DataConfig(flip=False)).geometry(40, 60, k) for k in range(50)))


boxes_of = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=0, max_size=12
)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**63), boxes_of, st.booleans())
def test_boxes_stay_in_the_image_and_counts_agree(height, width, key, relative, small):
    boxes = np.array(relative, dtype=np.float64).reshape(-1, 4)
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    boxes = np.concatenate([low, high], axis=1) * [width, height, width, height]
    geometry = TrainTransform(SMALL if small else DataConfig()).geometry(height, width, key)
    got, keep = geometry.apply_boxes(boxes)
    assert got.dtype == np.float32
    assert got.shape == (keep.sum(), 4)
    assert keep.shape == (len(boxes),)
    assert np.isfinite(got).all()
    edges = np.concatenate([got[:, :2] - got[:, 2:] / 2, got[:, :2] + got[:, 2:] / 2], axis=1)
    assert ((edges >= -1e-6) & (edges <= 1 + 1e-6)).all()
    assert (got[:, 2:] >= 0).all()
    if geometry.crop is None:
        assert keep.all()
    assert min(geometry.size) >= 1


@pytest.mark.parametrize("key", range(40))
def test_boxes_follow_the_pixels(key):
    """A bright rectangle on black: its box, found in the transformed image, is the transformed box."""
    rng = random.Random(key)
    height, width = rng.randint(80, 160), rng.randint(80, 160)
    x, y = rng.randint(0, width - 50), rng.randint(0, height - 50)
    w, h = rng.randint(25, 45), rng.randint(25, 45)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y : y + h, x : x + w] = 255
    geometry = TrainTransform(SMALL).geometry(height, width, key)
    out = np.asarray(geometry.apply_image(Image.fromarray(pixels)))[..., 0]
    assert out.shape == geometry.size
    boxes, keep = geometry.apply_boxes(np.array([[x, y, x + w, y + h]]))
    lit = out >= 128
    if not keep[0]:
        assert not lit.any()
        return
    (cx, cy, bw, bh), (oh, ow) = boxes[0], out.shape
    expected = np.array([(cx - bw / 2) * ow, (cy - bh / 2) * oh, (cx + bw / 2) * ow, (cy + bh / 2) * oh])
    if min(bw * ow, bh * oh) < 4:
        return  # a sliver at the border of the crop
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(found - expected).max() <= 1.5


def test_resize_equals_torchvisions_pil_path():
    from torchvision.transforms import functional

    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    geometry = EvalTransform(DataConfig(short_side=40, max_side=1333)).geometry(60, 90)
    expected = functional.resize(image, list(geometry.size))
    assert (np.asarray(geometry.apply_image(image)) == np.asarray(expected)).all()
