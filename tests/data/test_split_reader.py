"""A pass over a split: every sample once, in batches of one size, by every engine."""

import collections
import dataclasses
import threading

import pytest
import torch

from tests.data_roots import coco_file, picture, whole_root, write
from unit_fast.config import DataConfig, default_tasks
from unit_fast.data import collate, open_dataset
from unit_fast.data.images.engine import has_dali
from unit_fast.data.images.transforms import STD
from unit_fast.data.split_reader import SplitReader, groups
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

ENGINES = (
    None,
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="DALI is not installed")),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The small data sets; twelve validation images of COCO of three sizes, two of them damaged."""
    root = whole_root(tmp_path_factory.mktemp("data"))
    content = coco_file()
    content["images"], content["annotations"] = [], []
    for i in range(12):
        w, h = ((60, 40), (44, 52), (60, 41))[i % 3]
        name = f"{100 + i:012d}.jpg"
        picture(root / "coco/images/val2017" / name, w, h, seed=i)
        content["images"].append({"id": 100 + i, "file_name": name, "width": w, "height": h})
        content["annotations"].append(
            {"id": i, "image_id": 100 + i, "bbox": [1, 5, 12, 15], "area": 180.0, "category_id": 1, "iscrowd": 0}
        )
    write(root / "coco/annotations/instances_val2017.json", content)
    (root / f"coco/images/val2017/{103:012d}.jpg").write_bytes(b"not an image")
    (root / f"coco/images/val2017/{107:012d}.jpg").unlink()
    return root


def opened(root, tmp_path, task="coco", split="val", **data):
    data = DataConfig(root=str(root), short_side=64, max_side=96, cache_dir=str(tmp_path / "cache"), **data)
    kind = dataclasses.replace(default_tasks(task)[get_task(task).name], **({"outputs": 4} if task == "vqa2" else {}))
    return open_dataset(task, split, data, kind, augment=False), data


def read(dataset, data, size, engine=None, window=100, labelled=lambda sample: True):
    indices = range(len(dataset))
    wanted = groups(dataset, dataset.task, indices, size, window)
    with SplitReader(
        dataset, dataset.task, wanted, size, labelled=labelled, data=data, device=CPU, engine=engine
    ) as reader:
        return list(reader)


def test_groups_hold_each_index_once_in_batches_of_one_size(root, tmp_path):
    dataset, _ = opened(root, tmp_path)
    whole = list(groups(dataset, dataset.task, range(12), 3, 12))
    assert whole == [(0, 3, 6), (9,), (1, 4, 7), (10,), (2, 5, 8), (11,)]
    assert list(groups(dataset, dataset.task, range(12), 3, 6)) == [(0, 3), (1, 4), (2, 5), (6, 9), (7, 10), (8, 11)]
    assert list(groups(dataset, dataset.task, [5, 2], 8, 6)) == [(5, 2)]
    # one at a time: nothing is asked for
    assert list(groups(object(), dataset.task, [5, 2], 1, 6)) == [(5,), (2,)]


def test_texts_are_grouped_by_their_length():
    class Lengths:
        def text_tokens(self, index):
            if index == 1:
                raise UserError("row 1: cannot be tokenised")
            return (9, 5, 3, 7)[index]

    assert list(groups(Lengths(), get_task("sst2"), range(4), 2, 4)) == [(1, 2), (3, 0)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("size", "workers"), [(1, 0), (3, 0), (3, 2)])
def test_every_readable_sample_comes_once_as_it_is(root, tmp_path, engine, size, workers):
    dataset, data = opened(root, tmp_path, workers=workers)
    parts = read(dataset, data, size, engine)
    seen, most = [], 0
    for part in parts:
        for batch, members, labelled in zip(part.batches, part.members, part.labelled, strict=True):
            assert labelled
            assert len(set(batch.sizes)) == 1
            assert not batch.pixel_mask.any()
            assert batch.sample_ids == [100 + index for index, _ in members]
            expected = collate("coco", [dataset.get(index) for index, _ in members])
            # two of 255 steps, see images/transforms.py; the reference engine gives the same bits
            limit = 2.01 / 255 / min(STD) if engine else 0.0
            assert (batch.image - expected.image).abs().max() <= limit
            assert torch.equal(batch.boxes, expected.boxes)
            assert all(sample.keys() & {"image", "picture"} == set() for _, sample in members)
            seen += [index for index, _ in members]
            most = max(most, len(members))
    assert sorted(seen) == [i for i in range(12) if i not in (3, 7)]
    assert most == size
    bad = {index: error.reason for part in parts for index, error in part.unreadable}
    assert bad.keys() == {3, 7}
    assert "not a JPEG or PNG image" in bad[3]
    assert "no such file" in bad[7]


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_without_labels_are_batches_of_their_own_without_targets(root, tmp_path, engine):
    dataset, data = opened(root, tmp_path)
    parts = read(dataset, data, 6, engine, labelled=lambda sample: sample["image_id"] % 2 == 0)
    rows = [row for part in parts for row in zip(part.batches, part.members, part.labelled, strict=True)]
    assert collections.Counter(labelled for *_, labelled in rows) == {True: 3, False: 3}
    for batch, members, labelled in rows:
        assert (batch.labels is not None) == labelled
        assert {index % 2 == 0 for index, _ in members} == {labelled}


def test_images_with_texts(root, tmp_path):
    dataset, data = opened(root, tmp_path, "vqa2")
    ((batch,),) = [part.batches for part in read(dataset, data, 4, "torchvision")]
    assert batch.image is not None
    assert torch.equal(batch.input_ids[0], dataset.get(0)["input_ids"])


@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_early_ends_the_threads(root, tmp_path, engine):
    before = threading.active_count()
    dataset, data = opened(root, tmp_path, workers=2)
    wanted = groups(dataset, dataset.task, range(12), 1, 1)
    with SplitReader(
        dataset, dataset.task, wanted, 1, labelled=lambda sample: True, data=data, device=CPU, engine=engine
    ) as reader:
        assert next(reader).batches
    assert threading.active_count() == before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_reading_is_the_readers(root, tmp_path, engine, workers, monkeypatch):
    dataset, data = opened(root, tmp_path, workers=workers)
    real = dataset._fields

    def broken(index, *more):
        if index == 5:
            raise UserError("row 5: is not what it was")
        return real(index, *more)

    monkeypatch.setattr(dataset, "_fields", broken)
    with pytest.raises(UserError, match="row 5"):
        read(dataset, data, 1, engine)
