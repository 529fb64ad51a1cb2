"""Drawn boxes: a colour a class, labels apart and inside."""

import random

import pytest
from PIL import Image, ImageColor

from unit_fast.report import boxes
from unit_fast.report.boxes import class_colour, draw_boxes


def test_a_class_keeps_its_colour_and_neighbours_differ():
    assert class_colour("person") == class_colour("person")
    assert len({class_colour(i) for i in range(91)}) == 91
    for i in range(200):
        colour, other = (ImageColor.getrgb(class_colour(k)) for k in (i, i + 1))
        assert sum(abs(a - b) for a, b in zip(colour, other)) > 90
        red, green, blue = colour
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 140, "white letters stay readable"


def test_without_colours_each_class_has_its_own():
    objects = [{"label": "a", "bbox": [10, 30, 30, 30]}, {"label": "b", "bbox": [60, 60, 30, 30]}]
    drawn = draw_boxes(Image.new("RGB", (100, 100), "white"), objects, (100, 100))
    assert drawn.getpixel((10, 55)) == ImageColor.getrgb(class_colour("a"))
    assert drawn.getpixel((60, 85)) == ImageColor.getrgb(class_colour("b"))


@pytest.fixture
def places(monkeypatch):
    """The rectangles of the labels that are written, and their texts."""
    seen = []

    def write(labels):
        seen.extend(zip(labels.taken.tolist(), (text for text, *_ in labels.texts)))

    monkeypatch.setattr(boxes._Labels, "write", write)
    return seen


@pytest.mark.parametrize(
    ("count", "size", "fit"),
    [(1, (400, 300), 1), (2, (400, 300), 2), (12, (400, 300), 12), (60, (400, 300), 20), (12, (800, 90), 8)],
)
def test_labels_lie_apart_and_inside(places, count, size, fit):
    draw = random.Random(count)
    objects = [
        {
            "label": draw.choice(["person", "a rather long name", "x"]),
            "score": 0.5,
            "bbox": [
                draw.uniform(-50, size[0]),
                draw.uniform(-50, size[1]),
                draw.uniform(0, 200),
                draw.uniform(0, 200),
            ],
        }
        for _ in range(count)
    ]
    draw_boxes(Image.new("RGB", size), objects, size[::-1])
    assert fit <= len(places) <= count, "a name is left out only where there is no place"
    rectangles = [place for place, _ in places]
    for i, (x1, y1, x2, y2) in enumerate(rectangles):
        assert x1 >= 0
        assert y1 >= 0
        assert x2 <= size[0] - 1
        assert y2 <= size[1] - 1
        for a, b, c, d in rectangles[:i]:
            assert x2 < a or x1 > c or y2 < b or y1 > d


def test_boxes_in_one_place_keep_their_names_beside_it(places):
    objects = [{"label": f"thing {i}", "score": 0.5, "bbox": [150, 150, 80, 60]} for i in range(4)]
    draw_boxes(Image.new("RGB", (400, 400)), objects, (400, 400))
    assert [text for _, text in places] == [f"thing {i} 0.50" for i in range(4)]
    assert places[0][0][0] == 150
    assert all(100 < x1 < 300 and 100 < y1 < 300 for (x1, y1, _, _), _ in places)


def test_a_name_wider_than_the_picture_is_cut_and_its_score_kept(places):
    draw_boxes(Image.new("RGB", (120, 90)), [{"label": "n" * 40, "score": 0.25, "bbox": [0, 20, 50, 50]}], (90, 120))
    ((_, text),) = places
    assert text.endswith("… 0.25")
    draw_boxes(Image.new("RGB", (4, 90)), [{"label": "n", "score": 0.25, "bbox": [0, 0, 4, 90]}], (90, 4))
    assert len(places) == 1, "no place at all"
