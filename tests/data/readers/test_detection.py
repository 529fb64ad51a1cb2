"""COCO and Visual Genome from their files."""

import functools

import numpy as np
import pytest
import torch

from tests.data_roots import (
    REAL,
    box,
    coco_file,
    coco_root,
    data,
    needs_real,
    opened,
    picture,
    task_config,
    whole_root,
    write,
)
from unit_fast.config import DataConfig
from unit_fast.data import BadImage, MissingSplit, collate, layout, open_dataset
from unit_fast.data.readers.visual_genome import read_vocabulary
from unit_fast.errors import UserError

COCO = task_config("coco")
VG = task_config("vg")


open_coco, open_vg = functools.partial(opened, "coco"), functools.partial(opened, "vg")


def test_coco_targets(tmp_path):
    dataset = open_coco(coco_root(tmp_path))
    assert len(dataset) == 2
    assert dataset.task.name == "detection_coco"
    assert dataset.split == "train"
    assert dataset.class_names == {1: "person", 2: "bicycle", 90: "toothbrush"}
    sample = dataset.get(0)
    assert sample["image"].shape == (3, 40, 60)
    assert sample["labels"].tolist() == [1, 90]  # the crowd is no target
    # the second box leaves the image at the right and at the bottom: clamped to x 40.5..60, y 10..40
    expected = [[15 / 60, 10 / 40, 30 / 60, 20 / 40], [50.25 / 60, 25 / 40, 19.5 / 60, 30 / 40]]
    torch.testing.assert_close(sample["boxes"], torch.tensor(expected))
    assert sample["orig_size"] == (40, 60)
    assert sample["sample_id"] == sample["image_id"] == dataset.sample_id(0) == 9
    assert sample["image_path"].endswith("000000000009.jpg")
    assert "attributes" not in sample
    empty = dataset.get(1)
    assert empty["image"].shape == (3, 66, 40)
    assert empty["labels"].shape == (0,)
    assert empty["boxes"].shape == (0, 4)
    batch = collate("coco", [sample, empty])
    assert batch.counts.tolist() == [2, 0]
    assert batch.image.shape == (2, 3, 66, 60)


def test_augmentation_needs_a_key_and_both_switches(tmp_path):
    root = coco_root(tmp_path)
    dataset = open_coco(root, augment=True, train_short_sides=(20, 24, 28))
    assert dataset.get(0).keys() == open_coco(root).get(0).keys()
    assert dataset.get(0)["image"].shape == (3, 40, 60)
    shapes = {dataset.get(0, key)["image"].shape for key in range(20)}
    assert len(shapes) > 3
    first, again = dataset.get(0, 5), dataset.get(0, 5)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["boxes"], again["boxes"])
    settings = data(root, short_side=40, max_side=100, augment=False)
    assert open_dataset("coco", "train", settings, COCO, augment=True).get(0, 5)["image"].shape == (3, 40, 60)


def test_ground_truth_keeps_crowds_and_loads_in_pycocotools(tmp_path, capsys):
    from pycocotools.coco import COCO as Index
    from pycocotools.cocoeval import COCOeval

    truth = open_coco(coco_root(tmp_path)).coco_ground_truth()
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1]
    assert truth["annotations"][1]["bbox"] == [40.5, 10, 40, 40]
    assert [i["id"] for i in truth["images"]] == [9, 25]
    index = Index()
    index.dataset = truth
    index.createIndex()
    found = index.loadRes(
        [
            {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
            for a in truth["annotations"]
            if not a["iscrowd"]
        ]
    )
    evaluation = COCOeval(index, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def changed(**kwargs):
    content = coco_file()
    annotation = content["annotations"][0]
    for key, value in kwargs.items():
        annotation[key] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(bbox=[5, 5, -3, 4]), "annotations[0]: bbox [5.0, 5.0, -3.0, 4.0] has a negative width or height"),
        (changed(bbox=["1", 2, 3, 4]), "bbox must be a finite number, found '1'"),
        (changed(bbox=[1, 2, 3]), "bbox must have 4 numbers (x, y, w, h), found 3"),
        (changed(bbox=None), "bbox must be a list"),
        (changed(category_id=0), "category_id 0 is outside 1..90"),
        (changed(category_id=91), "category_id 91 is outside 1..90"),
        (changed(category_id=True), "category_id must be an integer, found True"),
        (changed(category_id="1"), "category_id must be an integer, found '1'"),
        (changed(image_id=404), "image_id 404 is not in images"),
        (changed(image_id=2**70), "image_id must be an integer"),
        ({**coco_file(), "images": coco_file()["images"] * 2}, "id 9 was used before"),
        ({**coco_file(), "categories": [{"id": 300, "name": "x"}]}, "category_id 300 is outside 1..90"),
        ({**coco_file(), "images": [{"id": 1}]}, "key 'file_name' is missing"),
        ({**coco_file(), "images": 3}, "images must be a list"),
        ({"annotations": []}, "key 'images' is missing"),
        ([], "not a COCO file"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_records_are_one_error_with_file_key_and_value(tmp_path, content, message):
    root = coco_root(tmp_path, content or "[]")
    with pytest.raises(UserError) as info:
        open_coco(root)
    assert message in str(info.value) or content == []
    assert "instances_train2017.json" in str(info.value)


def test_degenerate_boxes_are_left_out_and_counted(tmp_path):
    content = coco_file()
    content["annotations"] += [
        box(25, 10, 1, [5, 5, 0, 4]),
        box(25, 11, 1, [30, 5, 10, 4]),
        box(25, 12, 1, [-9, 5, 4, 4]),
        box(25, 13, 1, [-9, -9, 14, 19]),
        box(25, 13, 1, [0, 0, 1e308, 1e308], area=1),
    ]
    dataset = open_coco(coco_root(tmp_path, content))
    assert dataset.findings.count("box without area inside the image") == 3
    assert dataset.findings.count("box beyond the border, clipped") == 3
    assert dataset.findings.count("annotation id twice") == 1
    sample = dataset.get(1)
    torch.testing.assert_close(sample["boxes"], torch.tensor([[2.5 / 30, 5 / 50, 5 / 30, 10 / 50], [0.5, 0.5, 1, 1]]))
    assert dataset.facts["boxes"] == 5
    # who scores gets all of the file, in its order
    truth = dataset.coco_ground_truth()["annotations"]
    assert [a["id"] for a in truth] == list(range(1, 9))
    written = [a for i in (9, 25) for a in content["annotations"] if a["image_id"] == i]
    assert [(a["image_id"], a["bbox"], a["area"]) for a in truth] == [
        (a["image_id"], a["bbox"], a["area"]) for a in written
    ]


def test_names_that_lead_out_and_missing_images(tmp_path):
    content = coco_file()
    content["images"][0]["file_name"] = "../../../../etc/passwd"
    root = coco_root(tmp_path, content)
    dataset = open_coco(root)
    with pytest.raises(BadImage, match="leaves its folder"):
        dataset.get(0)
    (root / "coco/images/train2017/000000000025.jpg").unlink()
    with pytest.raises(BadImage, match="no such file") as info:
        dataset.get(1)
    assert info.value.path.endswith("000000000025.jpg")


def test_an_image_of_another_size_is_refused(tmp_path):
    root = coco_root(tmp_path)
    picture(root / "coco/images/train2017/000000000009.jpg", 40, 60)
    with pytest.raises(BadImage, match="is 40 x 60 pixels, its annotation says 60 x 40"):
        open_coco(root).get(0)


def test_missing_files(tmp_path):
    root = coco_root(tmp_path)
    with pytest.raises(MissingSplit, match=r"instances_val2017.json .*coco.val_annotations"):
        open_coco(root, "val")
    write(root / "coco/annotations/instances_val2017.json", coco_file())
    with pytest.raises(UserError, match="image folder not found") as info:
        open_coco(root, "val")
    assert not isinstance(info.value, MissingSplit)
    with pytest.raises(UserError, match="no such folder"):
        open_coco(tmp_path / "nothing")
    with pytest.raises(UserError, match="no data root"):
        open_dataset("coco", "train", DataConfig(), COCO, augment=False)
    with pytest.raises(UserError, match="split 'dev'"):
        open_coco(root, "dev")
    with pytest.raises(MissingSplit, match="no usable sample"):
        open_coco(coco_root(tmp_path / "empty", {**coco_file(), "images": [], "annotations": []}))


def test_paths_can_be_set_and_unknown_keys_are_named(tmp_path):
    root = coco_root(tmp_path / "a")
    moved = (root / "coco/images/train2017").rename(tmp_path / "photos")
    dataset = open_coco(root, paths={"coco.train_images": str(moved)})
    assert dataset.get(0)["image_path"].startswith(str(moved))
    with pytest.raises(UserError, match=r"unknown key 'coco.train_image'; nearest: coco.train_images"):
        open_coco(root, paths={"coco.train_image": "x"})
    with pytest.raises(UserError, match=r"coco.train_images: gone does not exist"):
        open_coco(root, paths={"coco.train_images": "gone"})


def test_the_other_folder_layout(tmp_path):
    root = coco_root(tmp_path)
    (root / "coco/images/train2017").rename(root / "coco/train2017")
    assert open_coco(root).get(0)["labels"].tolist() == [1, 90]


def test_the_test_split_has_images_only(tmp_path):
    content = {k: v for k, v in coco_file().items() if k != "annotations"}
    root = coco_root(tmp_path)
    write(root / "coco/annotations/image_info_test-dev2017.json", content)
    (root / "coco/images/train2017").rename(root / "coco/images/test2017")
    dataset = open_coco(root, "test")
    assert "labels" not in dataset.get(0)
    with pytest.raises(UserError, match="no annotations"):
        dataset.coco_ground_truth()


def test_scene_graphs_become_boxes_by_the_vocabularies(tmp_path):
    root = whole_root(tmp_path)
    train, val = open_vg(root), open_vg(root, "val")
    assert [train.sample_id(i) for i in range(len(train))] == [1]  # no coco_id: train
    assert [val.sample_id(i) for i in range(len(val))] == [2]  # coco_id 100 is in val2017
    assert [open_vg(root, "test").sample_id(0)] == [2]
    sample = train.get(0)  # named VG_100K_2/1.jpg, lies in VG_100K
    assert sample["labels"].tolist() == [3]
    assert sample["attributes"].tolist() == [[1, 3] + [-1] * 14]  # grey = gray, tall; "odd" is unknown
    torch.testing.assert_close(sample["boxes"], torch.tensor([[15 / 60, 10 / 40, 20 / 60, 10 / 40]]))
    assert train.findings.count("object outside the vocabulary") == 1
    assert train.class_names == {1: "yolk", 2: "car", 3: "tree"}
    assert train.coco_ground_truth()["annotations"][0]["category_id"] == 3


def test_objects_and_attributes_files_serve_as_well(tmp_path):
    root = whole_root(tmp_path)
    folder = root / "visual_genome"
    (folder / "scene_graphs.json").unlink()
    thing = {"object_id": 7, "names": ["automobile"], "x": 1, "y": 2, "w": 3, "h": 4}
    write(folder / "objects.json", [{"image_id": 1, "objects": [thing, {**thing, "object_id": 8, "w": -2}]}])
    write(folder / "attributes.json", [{"image_id": 1, "attributes": [{**thing, "attributes": ["green"]}, thing]}])
    dataset = open_vg(root)
    assert dataset.objects.labels.tolist() == [2]
    assert dataset.get(0)["attributes"][0, :2].tolist() == [2, -1]
    assert dataset.findings.count("negative box") == 1


def test_the_authors_files_come_first(tmp_path):
    root = whole_root(tmp_path)
    slots = [0, 400, *[-1] * 14]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 60, "height": 40}],
        "annotations": [box(1, 5, 1600, [0, 0, 6, 4], attribute_ids_max16=slots)],
    }
    name = "visual_genome/annotations/instances_{}_split_by_coco_2017.json"
    write(root / name.format("train"), content)
    dataset = open_vg(root)
    assert dataset.get(0)["labels"].tolist() == [1600]
    assert dataset.get(0)["attributes"][0].tolist() == slots
    for wrong, message in (
        ({"attribute_ids_max16": [401] + [-1] * 15}, "has 401, outside 0..400"),
        ({"attribute_ids_max16": [-2] + [-1] * 15}, "has -2"),
        ({"attribute_ids_max16": [1] * 15}, "must have 16 numbers, found 15"),
        ({"attribute_ids_max16": [1.5] + [-1] * 15}, "must be an integer, found 1.5"),
        ({"category_id": 1601}, "category_id 1601 is outside 1..1600"),
    ):
        bad = {**content, "annotations": [{**content["annotations"][0], **wrong}]}
        write(root / name.format("val"), bad)
        with pytest.raises(UserError) as info:
            open_vg(root, "val")
        assert message in str(info.value)
    with pytest.raises(UserError, match=r"outside 0..200"):
        open_vg(root, attribute_outputs=201)


def test_one_unsplit_file_is_split_by_coco_id(tmp_path):
    root = whole_root(tmp_path)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in (1, 2, 3)]
    images[0]["coco_id"] = 101
    content = {"images": images, "annotations": [box(i, i, 1, [0, 0, 6, 4]) for i in (1, 2, 3)]}
    write(root / "visual_genome/annotations/instances_from_scene_graphs.json", content)
    assert open_vg(root, "val").objects.ids.tolist() == [1, 2]  # its own coco_id, and image_data.json's
    train = open_vg(root)
    assert train.objects.ids.tolist() == [3]
    assert len(train.objects.labels) == 1
    (root / "coco/annotations/instances_val2017.json").unlink()
    assert open_vg(root).objects.ids.tolist() == [1, 2, 3]
    with pytest.raises(MissingSplit, match="no list of COCO val2017"):
        open_vg(root, "val")


def test_vocabularies_that_do_not_fit(tmp_path):
    root = whole_root(tmp_path)
    with pytest.raises(UserError, match=r"3 classes, but the task's 4 outputs allow 2"):
        open_vg(root, config=task_config("vg", outputs=4))
    with pytest.raises(UserError, match=r"3 attributes, but the model has 3"):
        open_vg(root, attribute_outputs=3)
    (root / "visual_genome/1600-400-20/attributes_vocab.txt").unlink()
    with pytest.raises(UserError, match="scene graphs need also .*attributes_vocab.txt"):
        open_vg(root)


@needs_real
def test_real_coco():
    config = DataConfig(root=str(REAL))
    for split, images, boxes, crowd in (("train", 60, 571, 5), ("val", 40, 442, 7)):
        dataset = open_dataset("coco", split, config, COCO, augment=split == "train")
        assert (len(dataset), len(dataset.objects.labels), dataset.objects.crowd.sum()) == (images, boxes, crowd)
        assert not dataset.findings.found
    sample = dataset.get(0)
    assert min(sample["image"].shape[1:]) == 800 or max(sample["image"].shape[1:]) >= 1332
    ids = dataset.objects.ids.tolist()
    assert dataset.get(ids.index(226111))["labels"].numel() == 0


@needs_real
def test_real_visual_genome_two_ways(monkeypatch):
    """The derived file and our own conversion of the scene graphs agree, box by box."""
    config = DataConfig(root=str(REAL), short_side=96, max_side=160)
    derived = open_dataset("vg", "train", config, VG, augment=False)
    assert (len(derived), len(derived.objects.labels)) == (4, 111)
    assert (derived.objects.attributes >= 0).sum() == 101
    monkeypatch.setitem(layout.PLACES, "vg.annotations", ())
    ours = open_dataset("vg", "train", config, VG, augment=False)
    assert ours.objects.ids.tolist() == derived.objects.ids.tolist()
    assert ours.findings.count("object outside the vocabulary") == 14
    assert ours.objects.labels.tolist() == derived.objects.labels.tolist()
    assert np.array_equal(ours.objects.attributes, derived.objects.attributes)
    ids, _ = read_vocabulary(REAL / "visual_genome/1600-400-20/objects_vocab.txt")
    assert max(ids.values()) == 1600
    for i in range(4):
        torch.testing.assert_close(ours.get(i)["boxes"], derived.get(i)["boxes"])
