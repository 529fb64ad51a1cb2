"""Reading images and the transforms of SPEC 4.3."""

import dataclasses
import io
import math
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data_roots import picture, write
from tests.small_runs import small_config
from unit_fast.config import DataConfig
from unit_fast.data import BadImage, open_dataset
from unit_fast.data.images.transforms import (
    EvalTransform,
    ImageCache,
    TrainTransform,
    image_size,
    load_image,
    resized,
    to_tensor,
)

MAX = 50_000_000


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_modes_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    got = np.asarray(load_image(saved(tmp_path / "grey.png", Image.fromarray(grey)), MAX))
    assert (got == grey[..., None]).all()
    assert got.shape == (5, 7, 3)

    colours = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([colours, grey[..., None]], axis=2))
    assert (np.asarray(load_image(saved(tmp_path / "a.png", rgba), MAX)) == colours).all()

    palette = Image.fromarray(colours).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (np.asarray(load_image(saved(tmp_path / "p.png", palette), MAX)) == expected).all()
    assert (np.asarray(load_image(saved(tmp_path / "pt.png", palette, transparency=3), MAX)) == expected).all()

    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    got = np.asarray(load_image(saved(tmp_path / "c.jpg", cmyk), MAX)).reshape(-1, 3).mean(0)
    assert got[0] < 20
    assert got[1] > 235
    assert got[2] > 235

    bits = Image.fromarray(grey > 127)
    assert set(np.unique(load_image(saved(tmp_path / "1.png", bits), MAX))) <= {0, 255}


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    got = np.asarray(load_image(saved(tmp_path / "16.png", Image.fromarray(values)), MAX))[0, :, 0]
    assert got.tolist() == [round(v / 257) for v in values[0].tolist()] == [0, 1, 1, 156, 255]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "turned.jpg", Image.new("RGB", (30, 10)), exif=exif)
    assert load_image(path, MAX).size == (30, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncation_at_any_length_is_a_bad_image(tmp_path, kind):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    whole = buffer.getvalue()
    path = tmp_path / "cut"
    cuts = [0, 1, 2, 10, 20, 100, *range(150, len(whole) - 20, len(whole) // 40)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(BadImage, match="cut") as info:
            load_image(path, MAX)
        assert info.value.path == str(path)
    path.write_bytes(whole)
    assert load_image(path, MAX).size == (50, 40)


@pytest.mark.parametrize("content", [b"", b"hello", b"GIF89a" + bytes(50), b"BM" + bytes(60), b"SIMPLE  =" + bytes(90)])
def test_other_content_is_a_bad_image(tmp_path, content):
    with pytest.raises(BadImage, match="not a JPEG or PNG"):
        load_image(write(tmp_path / "x.jpg", content), MAX)


def test_gif_in_disguise_is_refused(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("P", (4, 4)).save(path, "GIF")
    with pytest.raises(BadImage, match="not a JPEG or PNG"):
        load_image(path, MAX)


def test_a_missing_image_is_a_bad_image_that_travels(tmp_path):
    with pytest.raises(BadImage, match="no such file") as info:
        load_image(tmp_path / "none.jpg", MAX)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (copy.path, copy.reason, str(copy)) == (info.value.path, info.value.reason, str(info.value))
    with pytest.raises(BadImage):
        load_image(tmp_path, MAX)


def png_header(width, height) -> bytes:
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def jpeg_header(width, height) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    raw = bytearray(buffer.getvalue())
    at = raw.index(b"\xff\xc0")
    raw[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (13_000, 13_000), (10_000, 5_001)])
def test_large_headers_are_refused_before_decoding(tmp_path, monkeypatch, width, height):
    def decoded(*_):
        raise AssertionError("decoded")

    headers = {"a.png": png_header(width, height), "a.jpg": jpeg_header(width, height)}
    monkeypatch.setattr(Image.Image, "load", decoded)
    for name, content in headers.items():
        path = write(tmp_path / name, content)
        for read in (load_image, image_size):
            with pytest.raises(BadImage, match=r"pixels|DecompressionBomb"):
                read(path, MAX)
    assert image_size(write(tmp_path / "b.png", png_header(10_000, 5_000)), MAX) == (5_000, 10_000)


def test_tensor_equals_torchvision():
    from torchvision.transforms import functional

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    expected = functional.normalize(functional.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    got = to_tensor(image)
    assert torch.equal(got, expected)
    assert got.is_contiguous()


# ------------------------------------------------------------------------------------------------------ sizes


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
    image = load_image(picture(tmp_path / "a.jpg", 96, 96), MAX)
    geometry = EvalTransform(DataConfig(short_side=96, max_side=200)).geometry(96, 96)
    assert geometry.apply_image(image) is image


# ------------------------------------------------------------------------------------------------------ geometry

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
    short = {min(g.size) for g in drawn if not g.crop}
    assert short == set(range(480, 801, 32))
    assert {min(g.first) for g in cropped} == {400, 500, 600}
    assert min(g.crop[2] for g in cropped) == 384
    assert max(g.crop[2] for g in cropped) == 600
    assert min(g.crop[3] for g in cropped) == 384
    assert max(g.crop[3] for g in cropped) == 600
    for g in cropped:
        top, left, height, width = g.crop
        assert top >= 0
        assert left >= 0
        assert top + height <= g.first[0]
        assert left + width <= g.first[1]
        assert max(g.size) <= 1334
    tops = [g.crop[0] for g in cropped if g.first[0] == 600]
    assert min(tops) == 0
    assert max(tops) > 180
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
    assert (edges >= -1e-6).all()
    assert (edges <= 1 + 1e-6).all()
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


def test_cached_images_are_read_once_and_up_to_the_limit(tmp_path):
    cache = ImageCache(3 * 8 * 6 + 3 * 4 * 4)
    for name, size in (("a", (8, 6)), ("b", (5, 5)), ("c", (4, 4))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / f"{name}.png")
    first = {name: cache.load(tmp_path / f"{name}.png", 100) for name in "abc"}
    for name in "abc":
        (tmp_path / f"{name}.png").unlink()
    assert cache.load(tmp_path / "a.png", 100) is first["a"]
    assert cache.load(tmp_path / "c.png", 100) is first["c"]
    with pytest.raises(BadImage, match="no such file"):
        cache.load(tmp_path / "b.png", 100)  # did not fit beside a


def test_a_cache_changes_no_sample(root):
    run = small_config(root, "coco", "vqa2", "snli_ve")
    config = run.data
    for name, task in run.model.tasks.items():
        plain = open_dataset(name, "train", config, task, augment=True)
        cached = open_dataset(name, "train", dataclasses.replace(config, cache_mib=4), task, augment=True)
        for key in (3, 4):  # the second visit finds the image decoded
            a, b = plain.get(1, key), cached.get(1, key)
            assert torch.equal(a["image"], b["image"])
            assert {k: v for k, v in a.items() if not isinstance(v, torch.Tensor)} == {
                k: v for k, v in b.items() if not isinstance(v, torch.Tensor)
            }
