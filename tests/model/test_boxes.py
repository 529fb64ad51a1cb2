"""The model's boxes as a COCO file has them."""

import torch

from unit_fast.detection import boxes as b

XYWH = torch.tensor([[10.0, 20.0, 4.0, 6.0], [0.0, 0.0, 1.0, 2.0]])
CXCYWH = torch.tensor([[12.0, 23.0, 4.0, 6.0], [0.5, 1.0, 1.0, 2.0]])


def test_conversion():
    assert torch.equal(b.cxcywh_to_xywh(CXCYWH), XYWH)
    assert torch.equal(b.cxcywh_to_xywh(CXCYWH.double()[None]), XYWH.double()[None])
    assert b.cxcywh_to_xywh(CXCYWH[:0]).shape == (0, 4)


def test_scale_turns_relative_boxes_into_pixels():
    relative = torch.tensor([[0.5, 0.5, 0.25, 1.0]])
    assert (relative * b.image_scale(100, 200, relative)).tolist() == [[100, 50, 50, 100]]
