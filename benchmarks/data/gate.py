"""Whether a loader's batches are what they should be: the gate of ``bench_data``."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.providers import Spec, open_data, order_of, settings
from benchmarks.data.rounds import has_dali
from unit_fast.data import collate
from unit_fast.data.images.transforms import STD

ALLOWED_MEAN, ALLOWED_P999 = 1.0, 8.0
"""Largest differences of pixels, in steps of 255."""
_FILES_OF_DECODERS = 16
"""Files on which the decoders are compared."""


def reference(spec: Spec, batches: int) -> list[dict[str, Tensor]]:
    """The first batches by Pillow's decoder, ``Geometry.apply_image`` and ``to_tensor``."""
    config = settings(dataclasses.replace(spec, provider="ours_torchvision"))
    datasets = open_data(config)
    ((task, dataset),) = datasets.items()
    found = []
    for visits, _ in zip(order_of(config, datasets), range(batches)):
        found.append(collate(task, [dataset.get(*visit) for visit in visits]).tensors())
    return found


def differences(expected: Tensor, found: Tensor, padding: Tensor) -> tuple[float, float]:
    """Mean and 99.9 % point of the difference of pixels, in steps of 255, of the worst image; infinite on padding
    that is not zero.

    Args:
        expected, found: [B,3,H,W] normalised.
        padding: [B,H,W] bool.
    """
    if expected.shape != found.shape or bool((found.abs().amax(1) * padding).any()) or not bool(found.isfinite().all()):
        return float("inf"), float("inf")
    std = torch.tensor(STD).view(3, 1)
    worst = [0.0, 0.0]
    for a, b, pad in zip(expected, found, padding):
        steps = ((a - b).abs()[:, ~pad] * std * 255).flatten().numpy()
        place = min(len(steps) - 1, int(0.999 * len(steps)))
        worst = [max(worst[0], float(steps.mean())), max(worst[1], float(np.partition(steps, place)[place]))]
    return worst[0], worst[1]


def judge(expected: Sequence[Mapping[str, Tensor]], found: Sequence[Mapping[str, Tensor]]) -> tuple[bool, str]:
    """Whether batches are what they should be, and a line about them."""
    mean = p999 = 0.0
    wrong = set() if len(expected) == len(found) else {"number of batches"}
    for a, b in zip(expected, found):
        for name, value in a.items():
            if name == "image":
                batch = differences(value, b[name], a["pixel_mask"]) if name in b else (float("inf"),) * 2
                mean, p999 = max(mean, batch[0]), max(p999, batch[1])
            elif name not in b or b[name].dtype != value.dtype or not torch.equal(value, b[name]):
                wrong.add(name)
    pixels = f"pixels differ by {mean:.3f} on average, {p999:.2f} at 99.9 % of 255 steps in the worst image"
    fine = not wrong and mean <= ALLOWED_MEAN and p999 <= ALLOWED_P999
    others = ", ".join(sorted(wrong))
    return fine, (f"DIFFERS in {others}; " if wrong else "all else equal; ") + pixels


def decoders(spec: Spec) -> list[str]:
    """Lines about how far the decoders are from Pillow's on files of the data."""
    from torchvision.io import ImageReadMode, decode_image, read_file

    from unit_fast.data.images.decode import load_image

    config = settings(spec)
    (dataset,) = open_data(config).values()
    paths = []
    for index in range(len(dataset)):
        path = dataset.image_path(index)
        if path not in paths:
            paths.append(path)
        if len(paths) == _FILES_OF_DECODERS:
            break
    pillow = [torch.from_numpy(np.array(load_image(path, config.data.max_pixels))) for path in paths]
    found = {"torchvision": [decode_image(read_file(str(p)), mode=ImageReadMode.RGB).permute(1, 2, 0) for p in paths]}
    if has_dali():
        from unit_fast.data.images.dali import Pipeline

        pipeline = Pipeline(len(paths), 1)
        pipeline.feed([path.read_bytes() for path in paths], [])
        found["DALI"] = pipeline.take()
    lines = []
    for name, images in found.items():
        steps = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(pillow, images)]).double()
        lines.append(
            f"decoders on {len(paths)} files: {name} differs from Pillow by {float(steps.mean()):.4f} on average, "
            f"{int(steps.max())} at most, of 255 steps"
        )
    return lines
