"""Images in every way in which people have them, folders and patterns, and files of texts."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_roots import picture, write
from unit_fast.errors import UserError
from unit_fast.prediction.inputs import read_texts, sources

LIMIT = 10_000


@pytest.fixture
def folder(tmp_path):
    """Three images and other things."""
    for name in ("10.jpg", "2.JPG", "a.jpeg"):
        picture(tmp_path / "in" / name, 30, 20, seed=len(name))
    write(tmp_path / "in" / "notes.txt", "no image")
    picture(tmp_path / "in" / ".hidden.jpg", 30, 20)
    picture(tmp_path / "in" / "below" / "deep.png", 30, 20)
    return tmp_path / "in"


def names(found) -> list[str]:
    return [source.name.rpartition("/")[2] for source in found]


def test_a_folder_is_all_its_images_in_the_order_of_their_names(folder):
    assert names(sources(folder, LIMIT)) == ["2.JPG", "10.jpg", "a.jpeg"]
    assert names(sources(str(folder) + "/", LIMIT)) == ["2.JPG", "10.jpg", "a.jpeg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["10.jpg"]),
        ("*", ["2.JPG", "10.jpg", "a.jpeg"]),
        ("**/*.png", ["deep.png"]),
        ("[0-9]*", ["2.JPG", "10.jpg"]),
        ("*.txt", ["notes.txt"]),
    ],
)
def test_a_pattern_is_what_matches_it(folder, pattern, expected):
    assert names(sources(f"{folder}/{pattern}", LIMIT)) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    path = picture(tmp_path / "a[1].jpg", 30, 20)
    assert sources(path, LIMIT).read().size == (30, 20)


def test_a_list_is_each_of_its_images(folder):
    array = np.zeros((5, 6, 3), np.uint8)
    found = sources([folder, folder / "10.jpg", array, Image.new("L", (7, 8))], LIMIT)
    assert names(found) == ["2.JPG", "10.jpg", "a.jpeg", "10.jpg", "image 3", "image 4"]
    assert [source.read().size for source in found[-2:]] == [(6, 5), (7, 8)]
    assert isinstance(sources([folder / "10.jpg"], LIMIT), list), "a list of one is a list"
    assert len(sources((path for path in (folder / "10.jpg", folder / "a.jpeg")), LIMIT)) == 2


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)
GREY = PIXELS[:, :, :1].repeat(3, axis=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS[:, ::-1], PIXELS[:, ::-1]),
        (np.dstack([PIXELS, PIXELS[..., 0]]), PIXELS),
        (PIXELS[:, :, 0], GREY),
        (PIXELS[:, :, :1], GREY),
        (CHW, PIXELS),
        (CHW.float() / 255, PIXELS),
        (CHW.double() / 255, PIXELS),
        ((CHW.float() / 255).requires_grad_(), PIXELS),
        (CHW[:1], GREY),
        (Image.fromarray(PIXELS), PIXELS),
        (Image.fromarray(PIXELS).convert("RGBA"), PIXELS),
    ],
    ids=["HWC", "strided", "RGBA", "HW", "HW1", "CHW", "float", "double", "grad", "1HW", "PIL", "PIL RGBA"],
)
def test_pixels_arrive_as_they_are(given, expected):
    assert np.array_equal(np.asarray(sources(given, LIMIT).read()), expected)


def test_a_batch_is_its_images():
    for batch in (np.stack([PIXELS, PIXELS[::-1]]), torch.stack([CHW, CHW.flip(1)])):
        found = sources(batch, LIMIT)
        assert [source.name for source in found] == ["image 1", "image 2"]
        assert np.array_equal(np.asarray(found[1].read()), PIXELS[::-1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/a.jpg", "addresses are not fetched; download it"),
        ("s3://bucket/a.jpg", "addresses are not fetched"),
        ("FOLDER/below/none*", "no file is called like this"),
        ("FOLDER/empty", "no JPEG or PNG file in this folder"),
        ([], "an empty list"),
        (b"bytes", "expected a path, a PIL image, an array, a tensor or a list of them, found bytes"),
        ({"a": 1}, "found dict"),
        (None, "found NoneType"),
        ([3], "found int"),
        (PIXELS.astype(np.float32), "image: an array of float32; give uint8"),
        (CHW.numpy(), r"image: an array of shape \[3, 4, 6\]; give \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "image: 4 x 0 pixels"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), r"shape \[2, 3, 4, 5, 3\]"),
        (torch.zeros(3, 0, 4), "image: 4 x 0 pixels"),
        (torch.zeros(2, 3, 4, 0), "image 1: 0 x 4 pixels"),
        (CHW.float(), "float32 tensor with values outside 0..1"),
        (CHW.float() / 255 - 0.5, "values outside 0..1"),
        (CHW.float() * float("nan"), "values outside 0..1"),
        (CHW.long(), "a tensor of torch.int64"),
        (torch.zeros(5, 6, 3), r"a tensor of shape \[5, 6, 3\]; give \[3, H, W\]"),
        ([PIXELS, CHW.long()], "image 2: a tensor of torch.int64"),
        (np.zeros((101, 100, 3), np.uint8), "100 x 101 pixels, the limit is 10,000"),
        (Image.new("RGB", (101, 100)), "101 x 100 pixels, the limit is 10,000"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_named_with_its_remedy(folder, given, message):
    (folder / "empty").mkdir()
    given = given.replace("FOLDER", str(folder)) if isinstance(given, str) else given

    def read():
        found = sources(given, LIMIT)
        return [source.read() for source in (found if isinstance(found, list) else [found])]

    with pytest.raises(UserError, match=message):
        read()


def test_a_file_of_texts_has_one_a_line(tmp_path):
    path = write(tmp_path / "q.txt", "\ufeffwho ?\r\n what  \n")
    assert read_texts(path, pair=False) == ["who ?", "what"]
    path = write(tmp_path / "pairs.tsv", "a b\tc\n")
    assert read_texts(path, pair=True) == [("a b", "c")]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("vqa2", "who ?\n\nwhat ?\n", "q.txt:2: an empty text; give one text a line"),
        ("vqa2", "", "q.txt:1: an empty text"),
        ("mnli", "a\tb\nc\n", "q.txt:2: 1 texts between tabs, a pair has 2"),
        ("mnli", "a\t\n", "q.txt:1: an empty text; give one pair a line"),
        ("vqa2", b"\xff\xfe", "q.txt: not UTF-8"),
    ],
)
def test_a_bad_file_of_texts_names_the_line(tmp_path, task, content, message):
    with pytest.raises(UserError, match=message):
        read_texts(write(tmp_path / "q.txt", content), task == "mnli")
    with pytest.raises(UserError, match="absent"):
        read_texts(tmp_path / "absent", pair=False)
