"""Metrics by hand; average precision is the official tool's on the same files, whatever their ids and gaps."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.data_roots import coco_file, coco_root
from unit_fast.batch import Output
from unit_fast.config import DataConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.errors import UserError
from unit_fast.evaluation.metrics import (
    AP_KEYS,
    Accuracy,
    VqaAccuracy,
    best_answer,
    coco_average_precision,
    find_scorer,
)
from unit_fast.evaluation.task_results import detections

scorers = pytest.mark.parametrize("scorer", ["pycocotools", "faster-coco-eval"])


def test_vqa_accuracy_is_the_soft_target_at_the_best_known_answer():
    metric = VqaAccuracy()
    # the first question's best logit is <unk>, which is never given: answer 2 counts
    for scores, targets in (
        ([[9.0, 1.0, 2.0], [0.0, 3.0, -1.0]], [[0.0, 0.3, 0.6], [0.0, 1.0, 0.0]]),
        ([[0.0, 5.0, 1.0]], [[0.0, 0.0, 0.9]]),
    ):
        metric.count_answers(best_answer(torch.tensor(scores)), torch.tensor(targets))
    result = metric.result()
    assert result["count"] == 3
    assert result["vqa_accuracy"] == pytest.approx((0.6 + 1.0 + 0.0) / 3)
    assert result["chance"] == pytest.approx(max(0.3 + 1.0, 0.6 + 0.9) / 3)


def test_accuracy_counts_samples_and_not_batches():
    metric = Accuracy()
    metric.count_classes(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), classes=2)
    metric.count_classes(torch.tensor([1]), torch.tensor([0]), classes=2)
    # the mean of the batch means would be 1/3
    assert metric.result() == {"accuracy": 0.5, "chance": 0.75, "count": 4}


@pytest.mark.parametrize("metric", [Accuracy, VqaAccuracy])
def test_no_samples_have_no_metric(metric):
    assert metric().result() == {"count": 0}


def test_detections_leave_no_object_out_but_count_it_in_the_probability():
    logits = torch.tensor([[[[0.0, 1.0, 5.0], [2.0, 0.0, 0.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.5, 0.2], [0.25, 0.5, 0.5, 1.0]]]])
    out = Output(hidden_states=torch.zeros(1, 1, 2, 4), logits=logits, boxes=boxes)
    scores, classes, xywh = detections(out, torch.tensor([[100, 200]]))
    assert classes.tolist() == [[1, 0]]
    expected = logits[0, 0].softmax(-1)
    assert scores[0].tolist() == pytest.approx([expected[0, 1].item(), expected[1, 0].item()])
    assert xywh[0, 0].tolist() == pytest.approx([50, 40, 100, 20])
    assert xywh[0, 1].tolist() == pytest.approx([0, 0, 100, 100])


def official(truth: dict, results: list[dict], ids=None) -> dict:
    """The figures of pycocotools itself on a COCO file's content, that is not touched before."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.imgIds = sorted(ids or coco.imgs)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {key: float(value) for key, value in zip(AP_KEYS, evaluation.stats) if value > -1}


def world(seed: int = 0, images: int = 12) -> tuple[dict, list[dict]]:
    """A ground truth with crowds, objects without area and objects beyond the border; results with many equal scores,
    whose order decides."""
    draw = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(draw.integers(1, 6)):
            box = [round(float(v), 2) for v in draw.uniform((0, 0, 5, 5), (300, 300, 200, 200))]
            if draw.random() < 0.2:
                box[int(draw.integers(2, 4))] = 0.0
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image, "bbox": box, "area": box[2] * box[3],
                    "category_id": int(draw.choice([1, 3, 7])), "iscrowd": int(draw.random() < 0.1),
                }
            )  # fmt: skip
            near = [v + float(draw.normal()) * 4 for v in box]
            score = round(float(draw.random()), 1)
            results.append({"image_id": image, "category_id": annotations[-1]["category_id"], "bbox": near})
            results[-1]["score"] = score
    return {
        "images": [{"id": i, "width": 500, "height": 500} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 3, 7)],
    }, results


@scorers
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ids", [None, range(1, 9)], ids=["all", "some_images"])
def test_the_figures_are_the_official_tools(seed, ids, scorer):
    truth, results = world(seed)
    expected = official(truth, results, ids)
    assert 0.1 < expected["AP50"] < 1.0
    found = coco_average_precision(truth, results, ids, scorer)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12 if scorer == "pycocotools" else 1e-9)


@scorers
@pytest.mark.parametrize("first_id", [0, 1])
def test_perfect_boxes_have_an_average_precision_of_one_and_others_none(scorer, first_id):
    truth, _ = world()
    truth["annotations"] = [a for a in truth["annotations"] if a["area"]]
    for number, annotation in enumerate(truth["annotations"], first_id):  # 0 would be taken for a missed one
        annotation["id"] = number
    perfect = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.3 + a["id"] / 1000}
        for a in truth["annotations"] if not a["iscrowd"]
    ]  # fmt: skip
    figures = coco_average_precision(truth, perfect, scorer=scorer)
    assert figures["detection_mean_ap"] == pytest.approx(1.0)
    assert figures["AP50"] == pytest.approx(1.0)
    some = [r for r in perfect if r["image_id"] <= 4]
    assert coco_average_precision(truth, some, scorer=scorer)["AP50"] < 0.9, "images without results count"
    assert coco_average_precision(truth, some, range(1, 5), scorer)["AP50"] == pytest.approx(1.0)
    elsewhere = [{**r, "image_id": r["image_id"] % 12 + 1, "bbox": [v + 900 for v in r["bbox"]]} for r in perfect]
    for found in (elsewhere, []):
        assert coco_average_precision(truth, found, scorer=scorer)["detection_mean_ap"] == 0.0


@scorers
def test_half_of_the_objects_found_is_fifty_one_of_101_recall_points(scorer):
    truth, _ = world()
    box = {"image_id": 1, "category_id": 1, "area": 1600.0, "iscrowd": 0}
    truth["annotations"] = [{**box, "id": 5, "bbox": [0, 0, 40, 40]}, {**box, "id": 6, "bbox": [100, 100, 40, 40]}]
    result = {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 40.0, 40.0], "score": 0.3}
    figures = coco_average_precision(truth, [result], scorer=scorer)
    assert figures["AP50"] == pytest.approx(51 / 101)
    # 32 x 32 < 1600 < 96 x 96: medium only, the other sizes are undefined
    assert figures["APm"] == pytest.approx(51 / 101)
    assert not {"APs", "APl"} & figures.keys()


@scorers
@pytest.mark.parametrize(
    "rename",
    [lambda i: 2**53 + i, lambda i: 2**63 + i, lambda i: -(2**70) + i, lambda i: f"{i:04d}.jpg"],
    ids=["2**53", "2**63", "negative", "texts"],
)
def test_ids_of_any_size_and_kind_give_the_same_figures(rename, scorer):
    truth, results = world()
    expected = coco_average_precision(truth, results, range(1, 9), scorer)
    images = {i: rename(i) for i in range(1, 13)}
    categories = {i: 2**60 + i for i in (1, 3, 7)}
    for record in (*truth["images"], *truth["categories"]):
        record["id"] = (images if "width" in record else categories)[record["id"]]
    for record in (*truth["annotations"], *results):
        record["image_id"] = images[record["image_id"]]
        record["category_id"] = categories[record["category_id"]]
    before = copy.deepcopy((truth, results))
    assert coco_average_precision(truth, results, [images[i] for i in range(1, 9)], scorer) == expected
    assert before == (truth, results), "the arguments are left alone"


@scorers
@pytest.mark.parametrize("area", [0, 0.0, -1, None, float("nan"), "absent"])
def test_an_area_that_says_nothing_is_the_boxs(area, scorer):
    truth, results = world()
    truth["annotations"] = [a for a in truth["annotations"] if a["area"]]
    expected = coco_average_precision(truth, results, scorer=scorer)
    assert {"APs", "APm", "APl"} & expected.keys()
    for annotation in truth["annotations"]:
        annotation["area"] = area
        if area == "absent":
            del annotation["area"]
    assert coco_average_precision(truth, results, scorer=scorer) == expected


@scorers
@pytest.mark.parametrize("categories", [[], None, "absent"])
def test_without_categories_the_annotations_ids_are_scored_and_it_is_said(categories, scorer, caplog):
    truth, results = world()
    expected = coco_average_precision(truth, results, scorer=scorer)
    truth["categories"] = categories
    if categories == "absent":
        del truth["categories"]
    assert coco_average_precision(truth, results, scorer=scorer) == expected
    assert "the ground truth has no categories: scored by the 3 category ids of its annotations" in caplog.text


@scorers
def test_what_the_official_tool_does_not_score_is_said(scorer, caplog):
    truth, results = world()
    truth["categories"].pop()
    truth["images"].pop()
    results = [r for r in results if r["image_id"] != 12]
    expected = official(truth, results)
    found = coco_average_precision(truth, results, scorer=scorer)
    assert found == pytest.approx(expected, abs=1e-9)
    unnamed = sum(a["category_id"] == 7 for a in truth["annotations"])
    strangers = sum(a["image_id"] == 12 for a in truth["annotations"])
    assert unnamed
    assert strangers
    assert f"{unnamed} annotations are left out of the average precision" in caplog.text
    assert "their categories (7)" in caplog.text
    assert f"{strangers} annotations are of images that the ground truth does not list" in caplog.text


def test_what_cannot_be_scored_is_refused():
    truth, results = world()
    with pytest.raises(UserError, match="image_ids has image 99, which the ground truth does not have"):
        coco_average_precision(truth, results, [1, 99])
    with pytest.raises(UserError, match="image 77, which the ground truth does not have"):
        coco_average_precision(truth, [{**results[0], "image_id": 77}])
    with pytest.raises(UserError, match="nearest: pycocotools"):
        find_scorer("pycocotool")
    for change in ({"score": float("nan")}, {"bbox": [0.0, 0.0, float("inf"), 1.0]}):
        with pytest.raises(UserError, match=r"results\[0\]: box .* is not finite"):
            coco_average_precision(truth, [{**results[0], **change}])


def test_a_data_sets_ground_truth_is_the_file(tmp_path):
    content = coco_file()
    content["annotations"] += [
        {"id": 90, "image_id": 9, "bbox": [5, 5, 0, 4], "area": 0, "category_id": 1, "iscrowd": 0},
        {"id": 91, "image_id": 25, "bbox": [900, 5, 10, 4], "area": 40, "category_id": 2, "iscrowd": 0},
        {"id": 92, "image_id": 9, "bbox": [2, 3, 12, 9], "area": 0, "category_id": 1, "iscrowd": 0},
    ]
    root = coco_root(tmp_path, content)
    dataset = open_dataset(
        "coco", "train", DataConfig(root=str(root)), default_tasks("coco")["detection_coco"], augment=False
    )
    written = json.loads((root / "coco/annotations/instances_train2017.json").read_text())
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [float(v) for v in a["bbox"]], "score": s}
        for a, s in zip(written["annotations"], (0.9, 0.9, 0.8, 0.8, 0.7, 0.6))
    ]
    figures = coco_average_precision(dataset.coco_ground_truth(), results, scorer="pycocotools")
    expected = official(written, results)
    for key in ("detection_mean_ap", "AP50", "AP75"):  # by size the area of 0 tells
        assert figures[key] == pytest.approx(expected[key], abs=1e-12)
    assert figures["AP50"] < 1.0, "objects without area cannot be found"
