"""Photographs that viewers turn: training says so once, whoever reads them."""

import pytest
from PIL import Image

from tests.data.image_roots import encoded, graphs, photo_config, photograph, photographs, steps_of, threaded, with_data
from unit_fast.data.bad_images import BadImages


def with_orientation(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encoded(photograph(60, 80, 9), exif=exif)


def told(steps) -> list[str]:
    bad = BadImages(0.01)
    return [line for step in steps if (line := bad.turned(step))]


@pytest.mark.parametrize(("tag", "workers"), [*((tag, 0) for tag in range(1, 9)), (6, 1)])
def test_a_turned_photograph_is_named_once(tmp_path, tag, workers):
    config = photo_config(tmp_path, photographs(3) | {"phone.jpg": with_orientation(tag)})
    lines = told(steps_of(with_data(config, workers=workers), stop=4))
    assert len(lines) == (tag != 1)
    assert all("phone.jpg: its EXIF orientation says that viewers turn it" in line for line in lines)


@graphs
def test_whoever_decodes_it_says_so_and_a_later_run_too(tmp_path, graph):
    config = photo_config(tmp_path, photographs(3) | {"phone.jpg": with_orientation(6)})
    for _ in range(2):  # the second run knows the images from the first
        (line,) = told(threaded(config, 4, graph))
        assert "phone.jpg" in line


def test_upright_photographs_are_not_mentioned(tmp_path):
    assert told(steps_of(photo_config(tmp_path, photographs(4)), stop=4)) == []
