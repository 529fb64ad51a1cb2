"""Image files to pixels: kinds that are converted, and all that is refused."""

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from tests.data.image_roots import png_header
from tests.data_roots import no_plain_file, write
from unit_fast.data import BadImage
from unit_fast.data.images.decode import image_size, is_turned, load_image, read_bytes, stamp

MAX = 50_000_000


def read(path, image, **options):
    """``image`` as it comes back from a file."""
    image.save(path, **options)
    return np.asarray(load_image(path, MAX))


def test_modes_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    assert np.array_equal(read(tmp_path / "grey.png", Image.fromarray(grey)), np.repeat(grey[..., None], 3, axis=2))

    colours = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([colours, grey[..., None]], axis=2))
    assert (read(tmp_path / "a.png", rgba) == colours).all()

    palette = Image.fromarray(colours).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (read(tmp_path / "p.png", palette) == expected).all()
    assert (read(tmp_path / "pt.png", palette, transparency=3) == expected).all()

    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    red, green, blue = read(tmp_path / "c.jpg", cmyk).reshape(-1, 3).mean(0)
    assert red < 20 < 235 < min(green, blue)

    assert set(np.unique(read(tmp_path / "1.png", Image.fromarray(grey > 127)))) <= {0, 255}


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    got = read(tmp_path / "16.png", Image.fromarray(values))[0, :, 0]
    assert got.tolist() == [round(v / 257) for v in values[0].tolist()] == [0, 1, 1, 156, 255]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(tmp_path / "turned.jpg", Image.new("RGB", (30, 10)), exif=exif).shape == (10, 30, 3)


@pytest.mark.parametrize(
    ("kind", "mode"), [("jpg", "RGB"), ("jpg", "L"), ("png", "RGB"), ("png", "L"), ("png", "I;16")]
)
@pytest.mark.parametrize("tag", [None, 1, 3, 6, 7, 9])
def test_an_orientation_is_noticed(tmp_path, kind, mode, tag):
    exif = Image.Exif()
    if tag is not None:
        exif[0x0112] = tag
    Image.new(mode, (30, 10)).save(tmp_path / f"x.{kind}", exif=exif)
    assert is_turned(load_image(tmp_path / f"x.{kind}", MAX)) == (tag in (3, 6, 7))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_orientation_is_none(tmp_path):
    Image.new("RGB", (30, 10)).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert not is_turned(load_image(tmp_path / "x.jpg", MAX))


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
    with pytest.raises(BadImage, match="not a JPEG or PNG"):
        read(tmp_path / "x.jpg", Image.new("P", (4, 4)), format="GIF")


def test_a_missing_image_is_a_bad_image_that_travels(tmp_path):
    with pytest.raises(BadImage, match="no such file") as info:
        load_image(tmp_path / "none.jpg", MAX)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (copy.path, copy.reason, str(copy)) == (info.value.path, info.value.reason, str(info.value))
    with pytest.raises(BadImage):
        load_image(tmp_path, MAX)


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
        for function in (load_image, image_size):
            with pytest.raises(BadImage, match=r"pixels|DecompressionBomb"):
                function(path, MAX)
    assert image_size(write(tmp_path / "b.png", png_header(10_000, 5_000)), MAX) == (5_000, 10_000)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_only_plain_image_files_are_read(tmp_path, kind):
    path = no_plain_file(kind, tmp_path / "a.jpg")
    reads = [(read_bytes,), (image_size, MAX), (load_image, MAX)] + ([(stamp,)] if kind != "sparse" else [])
    for function, *limit in reads:
        with pytest.raises(BadImage, match="not a plain file|the limit is"):
            function(path, *limit)
