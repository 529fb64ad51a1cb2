"""Decoded images kept in memory by the reader in threads, and the record of checked images when it is closed."""

import dataclasses
import gc
import os
from collections import Counter

import pytest
import torch
from PIL import Image

from tests.data.image_roots import (
    encoded,
    needs_dali,
    opened,
    photo_config,
    photograph,
    photographs,
    steps_of,
    threaded,
    with_data,
)  # fmt: skip
from tests.small_runs import small_config
from unit_fast.data import open_dataset
from unit_fast.data.images import decoded_steps as reader
from unit_fast.data.images.checked import FILE, CheckedImages
from unit_fast.data.images.decode import Stamp, load_image, stamp
from unit_fast.data.images.memory import Buffers, KeptImages
from unit_fast.data.loader import Loader
from unit_fast.data.readers import dataset

SIDES = (60, 80)
engines = pytest.mark.parametrize("engine", [pytest.param("decode", marks=needs_dali), "torchvision"])


@pytest.fixture
def config(tmp_path):
    images = photographs(5)
    images["5.png"] = encoded(photograph(*SIDES, 5), "PNG")  # what only Pillow decodes is kept like the others
    return photo_config(tmp_path, images, "auto")


@pytest.fixture
def read(monkeypatch):
    """How often the contents of each image file were read for the decoder."""
    count, encode = Counter(), reader.DecodedSteps._encoded

    def counted(self, path):
        count[path.name] += 1
        return encode(self, path)

    monkeypatch.setattr(reader.DecodedSteps, "_encoded", counted)
    return count


@engines
def test_kept_images_change_no_pixel_and_are_read_once(config, read, engine):
    plain = threaded(config, 12, engine)
    assert sum(read.values()) == 48
    read.clear()
    kept = threaded(with_data(config, cache_mib=1), 12, engine)
    # a pass of six images spreads over the first two steps, and two more may be described before these are decoded
    assert len(read) == 6
    assert sum(read.values()) <= 4 * (2 + reader.AHEAD + 1)
    for a, b in zip(plain, kept, strict=True):
        assert a.request == b.request
        for x, y in zip(a.batches, b.batches, strict=True):
            assert torch.equal(x.image, y.image)
            assert torch.equal(x.boxes, y.boxes)


@engines
def test_only_what_fits_is_kept(config, read, engine, monkeypatch):
    image = 3 * SIDES[0] * SIDES[1]
    monkeypatch.setattr(reader, "KeptImages", lambda limit: KeptImages(2 * image + 5))
    threaded(with_data(config, cache_mib=1), 20, engine)
    visits = sorted(read.values())  # about 13 of each image
    assert max(visits[:2]) < 6, "two are kept"
    assert min(visits[2:]) >= 12, "the others are read at each visit"


def test_a_file_that_changed_is_read_again(config):
    cache = KeptImages(100)
    pixels = torch.arange(12, dtype=torch.uint8).view(2, 2, 3)
    cache.put("a", pixels, 12, Stamp(5, 1))
    pixels.zero_()
    assert cache.get("a", Stamp(5, 1))[0, 0, 2] == 2, "a copy"
    assert cache.get("a", Stamp(5, 2)) is None
    cache.put("a", torch.ones(2, 4, 3, dtype=torch.uint8), 24, Stamp(5, 2))
    assert cache.get("a", Stamp(5, 2)).shape == (2, 4, 3)
    assert cache.left == 100 - 24


@needs_dali
def test_dali_keeps_images_when_asked_to(config, read):
    config = with_data(config, engine="dali", cache_mib=1)
    with Loader(opened(config), config, 0, 10, {}) as loader:
        assert "1 MiB of them kept decoded" in loader.describe()
        list(loader)
    assert sum(read.values()) <= 4 * (2 + reader.AHEAD + 1) < 40
    assert len(steps_of(config)) == 12


def _open_files(name) -> set[str]:
    """Files of this name that the process has open, without what tests before left to the garbage collector."""
    gc.collect()
    links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return {path for path in (os.readlink(link) for link in links if os.path.lexists(link)) if name in path}


def test_the_record_of_checked_images_closes_its_file(tmp_path, config):
    path, before = next((tmp_path / "root/coco/images/train2017").iterdir()), _open_files(FILE)
    checked = CheckedImages(tmp_path / "cache", 10**6)
    checked.facts(path)
    assert _open_files(FILE) > before
    checked.close()
    assert _open_files(FILE) == before
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == [FILE], "what was written is in the one file"
    os.utime(path, ns=(1, 1))
    assert checked.facts(path).stamp == stamp(path), "in memory it goes on"
    checked.close()


@engines
def test_a_reader_leaves_no_file_open(config, engine):
    before = _open_files(FILE)
    if engine == "decode":
        steps_of(with_data(config, engine="dali"))
    else:
        threaded(config, 3, engine)
    assert _open_files(FILE) <= before


def test_buffers_are_used_again_only_when_nothing_refers_to_them():
    buffers = Buffers(keep=2)
    first = buffers.empty(4, 3, 100, 100)
    address, part = first.data_ptr(), first[1]
    del first
    second = buffers.empty(4, 3, 100, 100)
    assert second.data_ptr() != address, "a view is alive"
    del part
    third = buffers.empty(2, 3, 100, 100)
    assert third.data_ptr() == address
    kept = [buffers.empty(100) for _ in range(5)]
    del kept, second, third
    assert len(buffers._free) == 2


def test_images_are_kept_up_to_the_limit():
    cache = KeptImages(3 * 8 * 6 + 3 * 4 * 4)
    made = {name: Image.new("RGB", size) for name, size in (("a", (8, 6)), ("b", (5, 5)), ("c", (4, 4)))}
    kept = {name: cache.put(name, image, 3 * image.width * image.height) for name, image in made.items()}
    assert kept == {"a": True, "b": False, "c": True}
    assert cache.get("a") is made["a"]
    assert cache.get("c") is made["c"]
    assert cache.get("b") is None  # did not fit beside a


def test_a_cache_changes_no_sample_and_each_image_is_read_once(root, monkeypatch):
    reads = []
    monkeypatch.setattr(dataset, "load_image", lambda path, limit: reads.append(path) or load_image(path, limit))
    run = small_config(root, "coco", "vqa2", "snli_ve")
    config = run.data
    for name, task in run.model.tasks.items():
        plain = open_dataset(name, "train", config, task, augment=True)
        cached = open_dataset(name, "train", dataclasses.replace(config, cache_mib=4), task, augment=True)
        reads.clear()
        names, found = [], cached.image_path
        monkeypatch.setattr(
            cached, "image_path", lambda index, names=names, found=found: names.append(index) or found(index)
        )
        for key in (3, 4):  # the second visit finds the image decoded
            a, b = plain.get(1, key), cached.get(1, key)
            assert torch.equal(a["image"], b["image"])
            assert {k: v for k, v in a.items() if not isinstance(v, torch.Tensor)} == {
                k: v for k, v in b.items() if not isinstance(v, torch.Tensor)
            }
        assert len(reads) == 2 + 1
        assert names == [1], "nor is the file looked for again"
