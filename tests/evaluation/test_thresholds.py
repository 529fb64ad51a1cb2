"""The score threshold with the best F1, against all thresholds tried one by one with COCOeval's own matching."""

import json
import random

import pytest

from unit_fast.errors import UserError
from unit_fast.evaluation.thresholds import FILE, best_threshold, read_thresholds, write_thresholds


def box(x, y=0.0, side=10.0):
    return [float(x), float(y), side, side]


def truth_of(*annotations):
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in sorted({a[0] for a in annotations})],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": kind, "bbox": b, "iscrowd": crowd, "area": b[2] * b[3]}
            for n, (image, kind, b, crowd) in enumerate(annotations, 1)
        ],
    }


def result(image, kind, b, score):
    return {"image_id": image, "category_id": kind, "bbox": b, "score": score}


TRUTH = truth_of((1, 1, box(0), 0), (1, 2, box(50), 0), (2, 1, box(0), 0))
CASES = {
    "all found": ([result(1, 1, box(0), 0.9), result(1, 2, box(50), 0.8), result(2, 1, box(0), 0.6)], 0.3, 1.0),
    "a second box of one object is wrong": (
        [result(1, 1, box(0), 0.9), result(1, 2, box(50), 0.8), result(1, 1, box(1), 0.7), result(1, 1, box(2), 0.6)],
        0.75, 0.8,
    ),
    "another category is wrong": ([result(1, 1, box(0), 0.9), result(1, 1, box(50), 0.5)], 0.7, 0.5),
    "another place is wrong": ([result(1, 1, box(0), 0.9), result(2, 1, box(6), 0.5)], 0.7, 0.5),
    "a wrong one before a right one": ([result(1, 1, box(80), 0.9), result(1, 1, box(0), 0.5)], 0.25, 0.4),
    "equal scores stay together": (
        [result(1, 1, box(0), 0.5), result(1, 1, box(80), 0.5), result(1, 2, box(50), 0.5)], 0.25, 2 / 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("results", "threshold", "f1"), CASES.values(), ids=CASES)
def test_the_threshold_lies_where_f1_is_best(results, threshold, f1):
    found = best_threshold(TRUTH, results)
    assert found.score == pytest.approx(threshold)
    assert found.f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("truth", "results"),
    [(TRUTH, []), (TRUTH, [result(1, 1, box(80), 0.9)]), (truth_of((1, 1, box(0), 1)), [result(1, 1, box(0), 0.9)])],
    ids=["no result", "none right", "a crowd alone"],
)
def test_without_anything_right_there_is_none(truth, results):
    assert best_threshold(truth, results) is None


def test_a_box_in_a_crowd_counts_neither_way():
    truth = truth_of((1, 1, box(0), 0), (1, 1, box(40, side=40.0), 1))
    found = best_threshold(truth, [result(1, 1, box(50), 0.9), result(1, 1, box(0), 0.8)])
    assert found.f1 == 1.0


def test_only_the_images_asked_for_count():
    results = [result(1, 1, box(0), 0.9), result(1, 2, box(50), 0.8), result(2, 1, box(70), 0.85)]
    assert best_threshold(TRUTH, results, [1]).f1 == 1.0
    assert best_threshold(TRUTH, results).f1 == pytest.approx(2 * 2 / (3 + 3))


def test_it_counts_as_cocoeval_matches():
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = random.Random(4)
    annotations, results = [], []
    for image in range(1, 9):
        for _ in range(4):
            kind, b = rng.choice((1, 2)), box(rng.uniform(0, 60), rng.uniform(0, 60), 20.0)
            annotations.append((image, kind, b, 0))
            for _ in range(rng.randrange(3)):
                near = [b[0] + rng.gauss(0, 4), b[1] + rng.gauss(0, 4), 20.0, 20.0]
                results.append(result(image, rng.choice((kind, kind, 3 - kind)), near, rng.random()))
            results += [result(image, 1, box(rng.uniform(0, 60), 90), rng.random() / 4) for _ in range(3)]
    truth = truth_of(*annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox")
        scored.params.areaRng, scored.params.areaRngLbl = [[0, 1e10]], ["all"]
        scored.evaluate()
    matched = sorted(
        (
            (score, hit > 0)
            for image in scored.evalImgs
            if image is not None
            for score, hit in zip(image["dtScores"], image["dtMatches"][0])
        ),
        reverse=True,
    )
    right, best = 0, (0.0, 0.0)
    for number, (score, hit) in enumerate(matched, 1):
        right += hit
        best = max(best, (2 * right / (number + len(annotations)), score))
    found = best_threshold(truth, results)
    assert found.f1 == pytest.approx(best[0])
    below = max((r["score"] for r in results if r["score"] < best[1]), default=0.0)
    assert below < found.score <= best[1]


def test_a_run_keeps_those_of_its_validation_split(tmp_path):
    figures = {"coco": {"threshold": 0.4, "f1": 0.6, "detection_mean_ap": 0.2}, "vqa2": {"vqa_accuracy": 0.5}}
    assert read_thresholds(tmp_path) == {}
    write_thresholds(tmp_path, figures, split="train", step=3)
    assert not (tmp_path / FILE).exists(), "predictions are not shown by what was trained on"
    write_thresholds(tmp_path, figures, split="val", step=3)
    write_thresholds(tmp_path, {"vg": {"threshold": 0.3, "f1": 0.1}}, split="val", step=5)
    found = json.loads((tmp_path / FILE).read_text())
    assert found["detection_coco"] == {"threshold": 0.4, "f1": 0.6, "iou": 0.5, "split": "val", "step": 3}
    assert found["detection_visual_genome"]["step"] == 5
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=r"thresholds\.json: cannot be read .* delete it"):
        read_thresholds(tmp_path)
