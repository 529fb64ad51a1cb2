"""What the readers leave out is heard in training, and what leaves nothing to learn is refused."""

import functools
import json
import logging
import sys

import pytest

from tests.data_roots import box, coco_file, coco_root, task_config, whole_root, write
from tests.data_roots import opened as opened_set
from tests.small_runs import log_of, small_config
from unit_fast.data.check import check
from unit_fast.errors import UserError
from unit_fast.run.train import train

opened = functools.partial(opened_set, "coco")


def coco(*annotations, **changes):
    return coco_file() | {"annotations": list(annotations)} | changes


def kinds(root):
    """Severity and kind of what a check of the COCO train split finds."""
    report = check(root, tasks={"detection_coco": task_config("coco")})
    return {(f.severity, f.kind): f.count for s in report.splits if s.split == "train" for f in s.findings}


def test_notes_are_logged_once_a_kind_with_counts(tmp_path, caplog):
    content = coco(box(9, 1, 1, [5, 5, 10, 10]), box(9, 2, 1, [5, 5, 0, 3]), box(9, 3, 1, [99, 5, 3, 3]))
    root = coco_root(tmp_path, content)
    with caplog.at_level(logging.WARNING, "unit_fast"):
        opened(root)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("coco train: 2 x box without area inside the image (first: ")
    assert "annotations[1]: bbox [5.0, 5.0, 0.0, 3.0] in 60 x 40" in line


def test_training_says_them_once(tmp_path):
    world = whole_root(tmp_path / "world")
    config = small_config(world, "mnli", steps=2)
    train(config, tmp_path / "run", progress="none")
    assert log_of(tmp_path / "run").count("mnli train: 1 x row without a label (first: ") == 1


@pytest.mark.parametrize(
    ("annotations", "why"),
    [
        ([], r"\(0 boxes, 0 of them crowd regions\)"),
        ([box(9, 1, 1, [5, 5, 10, 10], iscrowd=1)], r"\(1 boxes, 1 of them crowd regions\)"),
        ([box(9, 1, 1, [5, 5, 0, 0])], "1 x box without area inside the image"),
        ([box(9, 1, 1, [500, 5, 9, 9]), box(9, 2, 1, [1, 1, 9, 9], iscrowd=1)], "1 of them crowd .* 1 x box without"),
    ],
    ids=["none", "crowd", "no area", "outside and crowd"],
)
def test_a_training_set_without_any_box_is_refused(tmp_path, annotations, why):
    root = coco_root(tmp_path, coco(*annotations))
    with pytest.raises(UserError, match=f"no box is left to train on in 2 images .*{why}"):
        opened(root)
    assert kinds(root)["error", "no box to train on"] == 1
    coco_root(root, coco(*annotations), split="val")
    assert len(opened(root, "val")) == 2, "nothing is trained on val"


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_relative_to_the_image_are_named(tmp_path, split):
    relative = [box(9, 1, 1, [0.125, 0.2, 0.3, 0.33]), box(9, 2, 2, [0.5, 0.4, 0.5, 0.6])]
    root = coco_root(tmp_path, coco(*relative), split=split)
    with pytest.raises(UserError, match=r"all 2 boxes lie within 0\.\.1 .*COCO's are in pixels"):
        opened(root, split)
    with_one = coco_root(tmp_path / "one", coco(*relative, box(9, 3, 1, [0.5, 0.5, 20.5, 3])), split=split)
    assert len(opened(with_one, split)) == 2


def test_an_area_that_is_not_given_is_that_of_the_box(tmp_path):
    missing = box(9, 1, 1, [1, 1, 10, 6])
    del missing["area"]
    given = [missing, box(9, 2, 1, [1, 1, 10, 7], area=0), box(9, 3, 1, [1, 1, 10, 8], area=None)]
    root = coco_root(tmp_path, coco(*given, box(9, 4, 1, [1, 1, 10, 9], area=33.5)))
    assert [a["area"] for a in opened(root).coco_ground_truth()["annotations"]] == [60, 70, 80, 33.5]
    assert kinds(root)["note", "no area given, that of the box is taken"] == 3


def test_classes_without_categories_are_called_by_their_numbers(tmp_path, caplog):
    content = coco(box(9, 1, 7, [1, 1, 10, 6]), box(9, 2, 3, [1, 1, 10, 6]))
    del content["categories"]
    root = coco_root(tmp_path, content)
    dataset = opened(root)
    assert dataset.class_names == {3: "3", 7: "7"}
    assert [c["id"] for c in dataset.coco_ground_truth()["categories"]] == [3, 7]
    assert "has no categories; its classes are called by their numbers" in caplog.text


@pytest.mark.parametrize("key", ["width", "height"])
@pytest.mark.parametrize("value", [0, -5, 2**31, 2**40, 2**62])
def test_sides_of_images(tmp_path, key, value):
    root = whole_root(tmp_path)
    content = coco_file()
    content["images"][0][key] = value
    write(root / "coco/annotations/instances_train2017.json", content)
    with pytest.raises(UserError, match=rf"images\[0\]: {key} is {value}; a side of an image must be from 1 to"):
        opened(root)
    record = {"image_id": 1, "url": "https://example.org/VG_100K_2/1.jpg", "width": 60, "height": 40, "coco_id": None}
    write(root / "visual_genome/image_data.json", [record | {key: value}])
    with pytest.raises(UserError, match=rf"image_data.json: \[0\]: {key} is {value}; a side of an image"):
        opened_set("vg", root)


@pytest.mark.parametrize("value", [10**400, -(10**5000), 2**1000], ids=["400", "-5000", "2^1000"])
@pytest.mark.parametrize("field", ["bbox", "area", "id"])
def test_numbers_beyond_a_float(tmp_path, value, field):
    changed = box(9, 1, 1, [1, 1, 10, 6])
    changed[field] = "NUMBER" if field != "bbox" else [1, 1, "NUMBER", 6]
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(coco(changed)).replace('"NUMBER"', str(value))
    finally:
        sys.set_int_max_str_digits(limit)
    root = coco_root(tmp_path)
    write(root / "coco/annotations/instances_train2017.json", text)
    with pytest.raises(UserError, match="must be|not valid JSON"):
        opened(root)
