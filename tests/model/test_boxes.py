"""Box conversions against numbers worked out by hand, and each other."""

import math

import pytest
import torch

from unit_fast.detection import boxes as b

XYWH = torch.tensor([[10.0, 20.0, 4.0, 6.0], [0.0, 0.0, 1.0, 2.0]])
XYXY = torch.tensor([[10.0, 20.0, 14.0, 26.0], [0.0, 0.0, 1.0, 2.0]])
CXCYWH = torch.tensor([[12.0, 23.0, 4.0, 6.0], [0.5, 1.0, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("function", "given", "expected"),
    [
        (b.xywh_to_xyxy, XYWH, XYXY),
        (b.xyxy_to_xywh, XYXY, XYWH),
        (b.xyxy_to_cxcywh, XYXY, CXCYWH),
        (b.cxcywh_to_xyxy, CXCYWH, XYXY),
        (b.xywh_to_cxcywh, XYWH, CXCYWH),
        (b.cxcywh_to_xywh, CXCYWH, XYWH),
    ],
)
def test_conversion(function, given, expected):
    assert torch.equal(function(given), expected)
    assert torch.equal(function(given.double()[None]), expected.double()[None])
    assert function(given[:0]).shape == (0, 4)


def test_clamp_cuts_to_the_image():
    cut = b.clamp_xyxy(torch.tensor([[-3.0, -1.0, 50.0, 70.0], [5.0, 6.0, 7.0, 8.0]]), height=60, width=40)
    assert cut.tolist() == [[0, 0, 40, 60], [5, 6, 7, 8]]


def test_scale_turns_relative_boxes_into_pixels():
    relative = torch.tensor([[0.5, 0.5, 0.25, 1.0]])
    assert (relative * b.image_scale(100, 200, relative)).tolist() == [[100, 50, 50, 100]]


def test_valid_needs_area_and_finite_numbers():
    given = torch.tensor(
        [
            [0, 0, 1, 1],
            [1, 0, 1, 1],
            [0, 2, 1, 1],
            [0, 0, math.nan, 1],
            [0, 0, math.inf, 1],
            [-5, -5, -4, -4],
        ]
    )
    assert b.valid_xyxy(given).tolist() == [True, False, False, False, False, True]
