"""The fast transform and DALI's decoder against the reference, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.image_roots import assert_close, encoded, needs_dali, photograph
from tests.data_roots import REAL, needs_real
from unit_fast.config import DataConfig
from unit_fast.data.images.decode import load_image
from unit_fast.data.images.geometry import EvalTransform, TrainTransform
from unit_fast.data.images.transforms import place, to_tensor, transform

MAX = 50_000_000
SIZES = [(427, 640), (640, 480), (375, 500), (500, 333), (96, 640), (480, 97), (33, 31), (1, 1), (2, 300), (612, 612)]
"""(height, width) of generated photographs: COCO's, thin ones, tiny ones."""


def decoded_pairs(paths):
    """(DALI's pixels, Pillow's) of plain JPEGs."""
    from unit_fast.data.images.dali import Pipeline

    pipeline, out = Pipeline(8, 2), []
    for begin in range(0, len(paths), 8):
        group = paths[begin : begin + 8]
        pipeline.feed([p.read_bytes() for p in group], [None] * len(group))
        out += zip(pipeline.take(), [np.asarray(load_image(p, MAX)) for p in group])
    return out


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for i, (height, width) in enumerate(SIZES):
        (folder / f"{i}.jpg").write_bytes(encoded(photograph(height, width, i), quality=90))
    return sorted(folder.glob("*.jpg"))


@needs_dali
def test_decoders_agree_on_generated_photographs(photographs):
    for ours, pillow in decoded_pairs(photographs):
        assert (ours.numpy() == pillow).all()


@needs_dali
@needs_real
def test_decoders_agree_on_real_photographs():
    pairs = decoded_pairs(sorted(REAL.glob("*/images/**/*.jpg")) + sorted(REAL.glob("snli_ve/**/*.jpg")))
    assert len(pairs) > 100
    for ours, pillow in pairs:
        assert np.abs(ours.numpy().astype(int) - pillow).mean() <= 0.5


@pytest.mark.parametrize("bits8", [True, False], ids=["cpu", "as on a device"])
@pytest.mark.parametrize("floor", [None, True, False], ids=["train", "vqa", "val"])
def test_our_transform_equals_the_reference(photographs, floor, bits8):
    data = DataConfig()
    draws = TrainTransform(data) if floor is None else EvalTransform(data, floor=floor)
    cropped = flipped = 0
    for number, path in enumerate(photographs):
        image = load_image(path, MAX)
        for key in range(6 if floor is None else 1):
            geometry = draws.geometry(image.height, image.width, 10 * number + key)
            cropped, flipped = cropped + bool(geometry.crop), flipped + geometry.flip
            pixels = transform(torch.from_numpy(np.array(image)), geometry, bits8).permute(1, 2, 0).numpy()
            expected = np.asarray(geometry.apply_image(image)).astype(int)
            found = np.abs(pixels - expected)
            # A pass along rows or columns rounds once; averaging makes no difference larger. A resize has two passes.
            assert found.max() <= (4 if geometry.crop else 2)
            assert found.mean() <= 0.1
    assert floor is not None or (cropped > 10 and flipped > 10)


def test_placing_normalises_and_pads_what_was_there(photographs):
    image = load_image(photographs[0], MAX)
    geometry = TrainTransform(DataConfig()).geometry(image.height, image.width, 3)
    height, width = geometry.size
    out = torch.full((3, height + 5, width + 7), torch.nan)
    place(torch.from_numpy(np.array(image)), geometry, out)
    assert_close(out[:, :height, :width], to_tensor(geometry.apply_image(image)))
    assert not out[:, height:].any()
    assert not out[:, :, width:].any()


def test_tensor_equals_torchvision():
    from torchvision.transforms import functional

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    expected = functional.normalize(functional.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    got = to_tensor(image)
    assert torch.equal(got, expected)
    assert got.is_contiguous()
