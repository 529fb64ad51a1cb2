"""Roots of photographs made up for a test, and steps read from them by each engine and compared."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data_roots import box, write
from unit_fast.config import DataConfig, ModelConfig, RunConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.data.fetch import Fetcher
from unit_fast.data.images.decoded_steps import DecodedSteps
from unit_fast.data.images.engine import has_dali
from unit_fast.data.images.transforms import STD
from unit_fast.data.loader import Loader, sort_keys
from unit_fast.data.sampler import requests

needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
graphs = pytest.mark.parametrize(
    "graph", [pytest.param("decode", marks=needs_dali), pytest.param("whole", marks=needs_dali), "torchvision"]
)
STEP_255 = 1 / 255
SMALL = {
    "short_side": 48, "max_side": 64, "train_short_sides": (40, 48), "crop_short_sides": (48, 56), "crop_min": 32,
    "crop_max": 48,
}  # fmt: skip


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Smooth at several scales, with edges and some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3))
    for scale in (4, 16, 64):
        coarse = rng.uniform(0, 255, (scale, scale, 3)).astype(np.uint8)
        out += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / scale**0.5
    out += rng.normal(0, 3, out.shape) + 60 * (out[..., :1] > np.median(out))
    return Image.fromarray((255 * (out - out.min()) / max(np.ptp(out), 1)).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def difference(got: torch.Tensor, expected: torch.Tensor) -> np.ndarray:
    """Absolute difference of two normalised images, in units of the full range."""
    return ((got.double() - expected.double()).abs() * torch.tensor(STD).view(3, 1, 1)).numpy()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The issue's bounds: mean at most 1 of 255 steps, 99.9 % at most 8."""
    found = difference(got, expected)
    assert found.mean() <= STEP_255
    assert np.quantile(found, 0.999) <= 8 * STEP_255


def photographs(count: int) -> dict[str, bytes]:
    """Name -> content of so many different ones of 80 x 60 pixels."""
    return {f"{i}.jpg": encoded(photograph(60, 80, i)) for i in range(count)}


def photo_root(folder: Path, images: dict[str, bytes]) -> Path:
    """A COCO root of these files, all said to be of 80 x 60 pixels, one box each."""
    content = {
        "images": [{"id": i, "file_name": name, "height": 60, "width": 80} for i, name in enumerate(images, 1)],
        "annotations": [box(i, i, 1, [5, 6, 30, 40]) for i in range(1, len(images) + 1)],
        "categories": [{"id": 1, "name": "a"}],
    }
    write(folder / "coco/annotations/instances_train2017.json", content)
    for name, data in images.items():
        write(folder / "coco/images/train2017" / name, data)
    return folder


def photo_config(folder: Path, images: dict[str, bytes], engine="torchvision", **changes) -> RunConfig:
    """A run on ``photo_root``, at small sizes."""
    return config_for(photo_root(folder / "root", images), "coco", data={**SMALL, "engine": engine}, **changes)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def faulty(count: int) -> dict[str, bytes]:
    """``count`` images; every twentieth is truncated, empty, no image, 1 x 1, or enormous by its header."""
    whole = [encoded(photograph(60, 80, i)) for i in range(7)]
    images = {f"{i:04d}.jpg": whole[i % 7] for i in range(count)}
    damage = (
        whole[0][: len(whole[0]) // 2],
        b"",
        b"not an image",
        encoded(Image.new("RGB", (1, 1))),
        png_header(20_000, 20_000),
    )
    for n, name in enumerate(list(images)[10::20]):
        images[name] = damage[n % len(damage)]
    return images


def config_for(root, *tasks, batch=4, **changes):
    """Real sizes on a data root, the model is not built."""
    kinds = default_tasks(*tasks)
    data = changes.pop("data", {})
    settings = DataConfig(root=str(root), **data)
    run = RunConfig(seed=1, batch_per_process=batch, model=ModelConfig(tasks=kinds), data=settings, **changes)
    return dataclasses.replace(run, ratios=dict.fromkeys(kinds, 1.0))


def opened(config):
    return {n: open_dataset(n, "train", config.data, t, augment=True) for n, t in config.model.tasks.items()}


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def steps_of(config, start=0, stop=12, counts=None, **options):
    with Loader(opened(config), config, start, stop, counts or {}, **options) as loader:
        return list(loader)


def content(steps):
    """Everything in the batches of steps, and how many images were unreadable, for ``==``."""
    return [
        (s.task, [(b.sample_ids, {k: v.tolist() for k, v in b.tensors().items()}) for b in s.batches], len(s.bad))
        for s in steps
    ]


def assert_same(ours, reference):
    """Everything equal, images within the bounds."""
    assert len(ours) == len(reference) > 0
    for a, b in zip(ours, reference):
        assert (a.task, a.bad, a.images_read) == (b.task, b.bad, b.images_read)
        for x, y in zip(a.batches, b.batches, strict=True):
            assert x.sample_ids == y.sample_ids
            assert x.sizes == y.sizes
            fields = y.tensors()
            assert x.tensors().keys() == fields.keys()
            for name, value in fields.items():
                if name != "image":
                    assert torch.equal(getattr(x, name), value), name
            for got, expected in zip(x.image if x.image is not None else (), y.image if y.image is not None else ()):
                assert_close(got, expected)


def threaded(config, stop, graph):
    """The steps by DALI's graph, or by torchvision's decoder as a run on a GPU has it."""
    if graph != "torchvision":
        return steps_of(with_data(config, engine="dali", dali_graph=graph), stop=stop)
    datasets = opened(config)
    shapes = sort_keys(datasets, config) if config.data.group > 1 else {}
    requested = requests(config, {name: len(d) for name, d in datasets.items()}, 0, {}, stop, shapes=shapes)
    fetcher, most = Fetcher(datasets, config.seed, {}), max(map(config.batch_of, datasets))
    data = dataclasses.replace(config.data, cache_dir="", workers=2)
    return list(DecodedSteps(fetcher, requested, data, most, torch.device("cpu"), graph))


graphs = pytest.mark.parametrize(
    "graph", [pytest.param("decode", marks=needs_dali), pytest.param("whole", marks=needs_dali), "torchvision"]
)
