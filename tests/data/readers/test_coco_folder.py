"""Folders in COCO's format as labelling tools export them: found, numbered, read, and written with their own ids."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data_roots import picture, write
from tests.own_folders import FORMS, IDS, IMAGES, NAMES, content, place, plain, roboflow, scenes
from unit_fast.config import DataConfig, RunConfig, TaskConfig, default_tasks, load_config, to_dict, to_json
from unit_fast.data import MissingSplit, open_dataset
from unit_fast.data.check import check
from unit_fast.data.outputs import resolved, resolved_task
from unit_fast.data.readers.by_hash import held_out
from unit_fast.errors import UserError
from unit_fast.recipes import recipe

DETECT = default_tasks("detect")["detect"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("world") / "world")


def settings(root, **paths) -> DataConfig:
    return DataConfig(root=str(root), short_side=48, max_side=64, paths=paths)


def opened(root, split="train", task=DETECT, **paths):
    return open_dataset("detect", split, settings(root, **paths), task, augment=False)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_boxes(form, found, tmp_path):
    root = FORMS[form](tmp_path, found)
    train, val = opened(root), opened(root, "val")
    assert train.class_names == dict(enumerate(NAMES))
    assert len(train) + len(val) == IMAGES
    assert (len(val) == 8) == (form != "cvat")
    wanted = sorted((label, *box) for images in found.values() for i in images for label, *box in i["boxes"])
    boxes = []
    for dataset in (train, val):
        o = dataset.objects
        boxes += [(label, *xywh) for label, xywh in zip(o.labels.tolist(), o.xywh.tolist())]
        assert dataset.get(0)["image"].shape[0] == 3
        ids = {a["category_id"] for a in dataset.coco_ground_truth()["annotations"]}
        assert ids <= set(IDS if form == "plain" else (1, 2, 3))
    assert np.allclose(sorted(boxes), wanted)
    report = check(root)
    assert report.ok, str(report)
    assert {s.task for s in report.splits} == {"detect"}
    assert "3 classes by their order" in str(report)
    assert ("no validation file: one image in 10" in str(report)) == (form == "cvat")


PLACES = [
    ("train/_annotations.coco.json", "train"),
    ("annotations/instances_default.json", "images"),
    ("annotations/instances_default.json", "images/default"),
    ("annotations/instances_Train.json", "images/Train"),
    ("annotations/instances_train2017.json", "train2017"),
    ("coco/annotations/instances_train2017.json", "coco/images/train2017"),
    ("annotations/train.json", "images/train"),
    ("train/annotations.json", "train/images"),
    ("result.json", "images"),
    ("train.json", "."),
    ("_annotations.coco.json", "."),
    ("my labels.json", "data"),
]


@pytest.mark.parametrize(("file", "folder"), PLACES, ids=[f"{a}-{b}" for a, b in PLACES])
def test_files_and_images_are_found(file, folder, found, tmp_path):
    write(tmp_path / file, content(found["train"][:4]))
    place(found["train"][:4], tmp_path / folder)
    dataset = opened(tmp_path)
    assert dataset.image_path(0).is_file()
    assert dataset.facts["file"] == str(tmp_path / file)


def test_what_is_not_found_is_told_with_the_remedy(found, tmp_path):
    with pytest.raises(MissingSplit, match="no annotations in COCO's format under .*_annotations.coco.json.*prepare"):
        opened(tmp_path)
    write(tmp_path / "train.json", {"questions": []})  # another data set's
    with pytest.raises(MissingSplit, match="no annotations in COCO's format"):
        opened(tmp_path)
    for name in ("a_train.json", "b_train.json"):
        write(tmp_path / name, content(found["train"][:2]))
    with pytest.raises(UserError, match="2 files could be detect.train_annotations .a_train.json, b_train.json.; say"):
        opened(tmp_path)
    given = {"detect.train_annotations": "b_train.json"}
    with pytest.raises(UserError, match="its images are not found, e.g. '0.*jpg'; .*--data.paths detect.train_images="):
        opened(tmp_path, **given)
    place(found["train"][:2], tmp_path / "pictures")
    dataset = opened(tmp_path, **given, **{"detect.train_images": "pictures"})
    assert dataset.image_path(0).parent.name == "pictures"
    with pytest.raises(MissingSplit, match="no annotations of split test"):
        opened(tmp_path, "test", **given)


NAMINGS = {
    "folders of another machine": "/home/someone/pictures/{}",
    "of Windows": "C:\\pictures\\{}",
    "a folder that is not there": "upload/1/{}",
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_images_are_found_by_the_last_part_of_their_names(naming, found, tmp_path):
    made = content(found["train"][:4])
    for image in made["images"]:
        image["file_name"] = NAMINGS[naming].format(image["file_name"])
    write(tmp_path / "result.json", made)
    place(found["train"][:4], tmp_path / "images")
    dataset = opened(tmp_path)
    assert [dataset.image_path(i).parent.name for i in range(len(dataset))] == ["images"] * len(dataset)
    assert dataset.findings.count("images found by the last part of their names") == 1


def test_ids_of_images_may_be_texts(found, tmp_path):
    made = content(found["train"])
    for rows, key in ((made["images"], "id"), (made["annotations"], "image_id")):
        for row in rows:
            row[key] = f"image-{row[key]}" if row[key] % 2 else row[key]
    for split in ("train", "valid"):
        write(tmp_path / split / "_annotations.coco.json", made)
        place(found["train"], tmp_path / split)
    dataset = opened(tmp_path)
    assert [dataset.sample_id(i) for i in range(3)] == ["image-1", 2, "image-3"]
    truth = dataset.coco_ground_truth()
    assert [i["id"] for i in truth["images"]] == [i["id"] for i in made["images"]]
    assert {(a["image_id"], *a["bbox"]) for a in truth["annotations"]} == {
        (a["image_id"], *a["bbox"]) for a in made["annotations"]
    }
    assert len(truth["annotations"]) == len(made["annotations"])


TOP = {"id": 0, "name": "hardware", "supercategory": "none"}


def _category(i, name, parent="hardware"):
    return {"id": i, "name": name, "supercategory": parent}


CLASSES = {
    "gaps": ([_category(5, "a"), _category(17, "b"), _category(900, "c")], (5, 900), ("a", "b", "c"), (5, 17, 900)),
    "from 0": ([_category(0, "a"), _category(1, "b")], (0, 1), ("a", "b"), (0, 1)),
    "huge": ([_category(2**40, "a"), _category(3, "b")], (2**40,), ("a", "b"), (2**40, 3)),
    "negative": ([_category(-1, "a"), _category(-7, "b")], (-7,), ("a", "b"), (-1, -7)),
    "super-category": ([TOP, _category(1, "a"), _category(2, "b")], (1,), ("a", "b"), (1, 2)),
    "super-category last": ([_category(1, "a"), TOP], (1,), ("a",), (1,)),
    "super-category with boxes": ([TOP, _category(1, "a")], (0, 1), ("hardware", "a"), (0, 1)),
    "its own super-category": ([_category(1, "a", "a"), _category(2, "b")], (2,), ("a", "b"), (1, 2)),
    "longer than used": ([_category(i, str(i)) for i in range(1, 81)], (7, 80), tuple(map(str, range(1, 81))), None),
    "floats": ([_category(1.0, "a"), _category(2.0, "b")], (2,), ("a", "b"), (1, 2)),
    "none listed": (None, (4, 9), ("4", "9"), (4, 9)),
    "listed twice": ([_category(1, "a"), _category(1, "a")], (1,), ("a",), (1,)),
    "one name twice": ([_category(1, "a"), _category(2, "a")], (1, 2), ("a", "a"), (1, 2)),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_are_numbered_by_their_order(case, tmp_path):
    categories, used, names, ids = CLASSES[case]
    ids = ids or tuple(range(1, len(names) + 1))
    made = {
        "images": [{"id": n, "file_name": "a.jpg", "width": 60, "height": 40} for n in (1, 2)],
        "annotations": [{"id": n, "image_id": 1, "category_id": i, "bbox": [1, 2, 30, 20]} for n, i in enumerate(used)],
    } | ({} if categories is None else {"categories": categories})
    write(tmp_path / "_annotations.coco.json", made)
    picture(tmp_path / "a.jpg", 60, 40)
    task, lines = resolved_task("detect", settings(tmp_path), DETECT)
    assert (task.classes, task.class_ids, task.outputs) == (names, ids, len(names) + 1)
    assert any(f"{len(names)} classes by their order" in line for line in lines)
    dataset = opened(tmp_path, task=task, **{"detect.val_annotations": "_annotations.coco.json"})
    assert [ids[label] for label in dataset.objects.labels] == list(used)
    assert [a["category_id"] for a in dataset.coco_ground_truth()["annotations"]] == list(used)
    assert resolved_task("detect", settings("/nowhere"), task) == (task, []), "a run's classes are not derived again"


ROWS = {
    "crowd true": ({"iscrowd": True}, 0),
    "crowd 1": ({"iscrowd": 1}, 0),
    "crowd false": ({"iscrowd": False}, 1),
    "crowd null": ({"iscrowd": None}, 1),
    "crowd absent": ({}, 1),
    "crowd 0.0": ({"iscrowd": 0.0}, 1),
    "id a text": ({"id": "0f8fad5b-d9cb-469f-a165-70867728950e"}, 1),
    "id null": ({"id": None}, 1),
    "id absent": ({"id": "absent"}, 1),
    "no segmentation": ({"segmentation": None}, 1),
    "id a list": ({"id": [1]}, "id must be an integer, found"),
    "crowd a text": ({"iscrowd": "no"}, "iscrowd must be an integer, found 'no'"),
    "class unlisted": ({"category_id": 3}, 0),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_as_exporters_write_them(case, tmp_path):
    """The targets of a file with one box, or what is refused."""
    changes, targets = ROWS[case]
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]} | changes
    other = {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1, 2, 30, 20]}
    made = {
        "images": [{"id": n, "file_name": "a.jpg", "width": 60, "height": 40} for n in (1, 2)],
        "annotations": [{k: v for k, v in row.items() if v != "absent"}, other],
        "categories": [{"id": 1, "name": "bolt"}],
    }
    write(tmp_path / "train/_annotations.coco.json", made)
    write(tmp_path / "valid/_annotations.coco.json", made)
    for folder in ("train", "valid"):
        picture(tmp_path / folder / "a.jpg", 60, 40)
    if isinstance(targets, str):
        with pytest.raises(UserError, match=targets):
            opened(tmp_path)
    else:
        assert len(opened(tmp_path).get(0)["labels"]) == targets


def test_another_export_of_the_same_classes_is_read_by_their_names(found, tmp_path):
    task, _ = resolved_task("detect", settings(plain(tmp_path / "a", found)), DETECT)
    other = roboflow(tmp_path / "b", found)
    path = other / "valid/_annotations.coco.json"
    turned = json.loads(path.read_text())
    turned["categories"].reverse()
    write(path, turned)
    ours, theirs = opened(tmp_path / "a", "val", task), opened(other, "val", task)
    assert ours.objects.labels.tolist() == theirs.objects.labels.tolist()
    assert theirs.category_ids == {0: 1, 1: 2, 2: 3}
    assert {c["id"]: c["name"] for c in theirs.coco_ground_truth()["categories"]} == dict(zip((1, 2, 3), NAMES))
    assert ours.meaning() == theirs.meaning()

    turned["categories"] = [c for c in turned["categories"] if c["name"] != "nut"]
    turned["annotations"] = [a for a in turned["annotations"] if a["category_id"] != 2]
    write(path, turned)
    fewer = opened(other, "val", task)
    assert fewer.class_names == ours.class_names, "a file without a class does not renumber the others"
    assert fewer.category_ids == {0: 1, 1: 17, 2: 3}

    turned["categories"].append({"id": 2, "name": "screw"})
    turned["annotations"].append({"id": 99, "image_id": 0, "category_id": 2, "bbox": [1, 1, 5, 5]})
    write(path, turned)
    with pytest.raises(UserError, match=r"category 2 \(screw\) is not one of the 3 classes of the model .*rename it"):
        opened(other, "val", task)


def test_chosen_classes_in_a_chosen_order(found, tmp_path):
    root = plain(tmp_path, found)
    config = TaskConfig(queries=5, outputs=0, classes=("washer", "bolt", "nut"))
    task, _ = resolved_task("detect", settings(root), config)
    assert (task.class_ids, task.outputs) == ((900, 5, 17), 4)
    with pytest.raises(UserError, match="has no category 'wascher' .*nearest: washer"):
        resolved_task("detect", settings(root), TaskConfig(queries=5, outputs=0, classes=("wascher",)))


def test_one_id_with_two_names_is_refused(tmp_path):
    made = content([]) | {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}
    write(tmp_path / "train.json", {**made, "file_name": ""})
    with pytest.raises(UserError, match="category id 1 is 'a' and 'b'; give each category an id of its own"):
        resolved_task("detect", settings(tmp_path), DETECT)


@pytest.mark.parametrize(
    ("ids", "outputs", "classes"),
    [
        ((1, 2, 90), 92, ()),  # published: the class is the id
        ((5, 17, 900), 902, ()),
        ((5, 17, 900), 92, NAMES),
        ((0, 1, 2), 92, NAMES),
        ((5, 17, 900), 0, NAMES),
        ((1, 2, 3), 0, NAMES),
    ],
)
def test_cocos_own_layout_is_numbered_by_id_where_that_fits(ids, outputs, classes, found, tmp_path):
    write(tmp_path / "coco/annotations/instances_train2017.json", content(found["train"], ids))
    place(found["train"], tmp_path / "coco/images/train2017")
    task, _ = resolved_task("detection_coco", settings(tmp_path), TaskConfig(queries=5, outputs=outputs))
    assert task.classes == classes
    assert task.outputs == (outputs or 4)
    dataset = open_dataset("coco", "train", settings(tmp_path), task, augment=False)
    labels = [label for image in found["train"] for label, *_ in image["boxes"]]
    wanted = labels if classes else [ids[label] for label in labels]
    assert dataset.objects.labels.tolist() == wanted
    assert check(tmp_path).ok


def test_published_classes_are_not_derived(tmp_path):
    with pytest.raises(UserError, match="outputs: is 0, but vg has its published classes; give their number, 1602"):
        resolved_task("detection_visual_genome", settings(tmp_path), TaskConfig(queries=5, outputs=0))


def test_the_configuration_tells_the_classes_only_where_there_are(found, tmp_path):
    assert "classes" not in to_dict(RunConfig())["model"]["tasks"]["vqa2"]
    config = dataclasses.replace(recipe("detect"), data=settings(plain(tmp_path / "root", found)))
    config, lines = resolved(config)
    assert len(lines) == 1
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(tmp_path / "config.json") == config
    assert config.model.tasks["detect"].class_ids == IDS


@pytest.mark.parametrize("count", [1, 2, 3, 10, 500])
def test_held_out_samples_are_few_and_stay(count):
    keys = [f"image {i}.jpg" for i in range(count)]
    chosen = held_out(keys)
    assert sum(chosen) in ({0} if count == 1 else range(1, max(2, count // 5 + 1)))
    more = held_out([*keys, *(f"later {i}" for i in range(50))])
    if count >= 100:  # where the share alone decides
        assert more[:count] == chosen, "what is added changes nothing"
    assert held_out(keys * 2) == chosen * 2, "equal keys stay together"
