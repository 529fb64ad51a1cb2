"""The evaluation loop over small data sets in the real formats."""

import contextlib
import dataclasses
import io
import json
import random

import numpy as np
import pytest
import torch

from tests.data_roots import whole_root
from tests.evaluation.common import Oracle, coco_images, whole_config
from unit_fast.errors import UserError
from unit_fast.evaluation.evaluate import describe, evaluate
from unit_fast.evaluation.metrics import coco_average_precision
from unit_fast.evaluation.task_run import pick, spread
from unit_fast.model import UniT
from unit_fast.tasks import TASKS, get_task


def test_spread_takes_different_indices_over_the_whole_range():
    assert spread(10, 3) == [0, 3, 6]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(0, 8) == []


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The small data sets with more validation images, of unequal sizes."""
    sizes = [(60, 40) if i < 4 else (40 + 9 * i, 60 - 5 * i) for i in range(7)]
    return coco_images(whole_root(tmp_path_factory.mktemp("data")), sizes, lambda number: number % 3, first=100)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniT(whole_config("").model)


def test_a_model_that_knows_everything_reaches_the_top_of_every_metric(root):
    config = whole_config(root, eval_batch=2)
    oracle = Oracle(config.model)
    results = evaluate(oracle, config)
    assert set(oracle.seen) == {1, 2}
    assert list(results) == [t.short for t in TASKS.values()]
    assert results["coco"]["detection_mean_ap"] == pytest.approx(1.0)
    assert results["coco"]["count"] == 7
    assert results["coco"]["chance"] == 0.0
    assert results["vg"]["AP50"] == pytest.approx(1.0)
    # 8 of 10 annotators said yes, 1 no: soft score 1 for yes; every other constant answer is worse
    assert results["vqa2"]["vqa_accuracy"] == pytest.approx(1.0)
    assert results["vqa2"]["chance"] == pytest.approx(1.0)
    assert results["snli_ve"]["accuracy"] == 1.0
    assert results["snli_ve"]["chance"] == 0.5
    assert all(m["loss"] == pytest.approx(3.0) for m in results.values())
    assert "chance 0.5000" in describe(get_task("snli_ve"), results["snli_ve"])


def test_the_figures_do_not_depend_on_the_batch(root, model, tmp_path):
    runs = []
    for size in (1, 3):
        out = tmp_path / str(size)
        results = evaluate(
            model, whole_config(root, eval_batch=size), tasks=["coco", "vqa2", "snli_ve", "mnli"], out=out
        )
        found = json.loads((out / "predictions/coco_val.json").read_text())
        runs.append((results, sorted(found, key=lambda r: (r["image_id"], r["score"], r["bbox"]))))
    (one, one_found), (other, other_found) = runs
    for task in one:
        for key in set(one[task]) - {"seconds"}:
            assert other[task][key] == pytest.approx(one[task][key], rel=1e-4, abs=1e-5), (task, key)
    assert len(one_found) == len(other_found) == 7 * 5
    for a, b in zip(one_found, other_found):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert b["bbox"] == pytest.approx(a["bbox"], abs=2e-2)


def test_reading_ahead_in_threads_changes_nothing(root, model):
    config = whole_config(root, eval_batch=2)
    threaded = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=3, prefetch=1))
    one, other = (evaluate(model, c, tasks=["coco", "snli_ve"]) for c in (config, threaded))
    for results in (one, other):
        for figures in results.values():
            figures.pop("seconds")
    assert one == other


def test_random_states_and_modes_are_as_before(root, model):
    model.train()
    model.backbone.eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()
    evaluate(model, whole_config(root), tasks=["coco", "vqa2"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert modes == [m.training for m in model.modules()]
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    model.train()


def test_prediction_files_load_where_they_are_wanted(root, model, tmp_path):
    from pycocotools.coco import COCO

    config = whole_config(root, eval_batch=2)
    results = evaluate(model, config, out=tmp_path, attributes=True)
    assert set(results) == {t.short for t in TASKS.values()}
    found = json.loads((tmp_path / "predictions/coco_val.json").read_text())
    assert len(found) == 7 * 5, "all queries of all images"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "coco/annotations/instances_val2017.json"))
        loaded = truth.loadRes(str(tmp_path / "predictions/coco_val.json"))
    assert len(loaded.anns) == len(found)
    content = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    again = coco_average_precision(content, found)
    assert again["detection_mean_ap"] == results["coco"]["detection_mean_ap"], "the file gives the reported figure"
    boxes = json.loads((tmp_path / "predictions/vg_val.json").read_text())
    assert all(0 <= b["attr_label"] <= 400 and b["attr_score"] >= 0 for b in boxes)
    assert "attr_label" not in found[0]
    answers = json.loads((tmp_path / "predictions/vqa2_val.json").read_text())
    assert [a["question_id"] for a in answers] == [100000]
    assert answers[0]["answer"] in ("yes", "no", "2")
    rows = [json.loads(line) for line in (tmp_path / "predictions/mnli_val.jsonl").read_text().splitlines()]
    assert rows[0]["label"] in get_task("mnli").labels
    assert rows[0]["truth"] == "neutral"
    assert sum(rows[0]["scores"]) == pytest.approx(1.0, abs=1e-4)


def test_attributes_are_left_out_unless_asked_for(root, model, tmp_path):
    evaluate(model, whole_config(root), tasks=["vg"], out=tmp_path)
    assert "attr_label" not in json.loads((tmp_path / "predictions/vg_val.json").read_text())[0]


def test_examples_are_the_same_samples_each_time_with_a_copy_of_the_image(root, model, tmp_path):
    config = whole_config(root)
    evaluate(model, config, tasks=["coco", "vqa2"], out=tmp_path)
    first = json.loads((tmp_path / "examples.json").read_text())
    evaluate(Oracle(config.model), config, tasks=["coco"], out=tmp_path)
    second = json.loads((tmp_path / "examples.json").read_text())
    assert second["vqa2"] == first["vqa2"], "tasks that were not evaluated stay"
    ids = [[s["id"] for s in e["coco"]["samples"]] for e in (first, second)]
    assert ids[0] == ids[1] == [100 + i for i in range(7)]
    for sample in second["coco"]["samples"]:
        assert (tmp_path / sample["image"]).is_file()
        shown = [(p["label"], p["bbox"]) for p in sample["prediction"] if p["score"] > 0.5]
        assert sorted(shown) == sorted((t["label"], pytest.approx(t["bbox"], abs=0.02)) for t in sample["truth"])
    question = first["vqa2"]["samples"][0]
    assert question["text"] == "is it?"
    assert question["truth"][0] == {"label": "yes", "score": 1.0}
    assert len(question["prediction"]) == 3


def test_a_limit_takes_samples_from_the_whole_split_and_scores_only_these(root):
    config = whole_config(root)
    oracle = Oracle(config.model)
    results = evaluate(oracle, config, tasks=["coco"], limit=3)
    assert sum(oracle.seen) == 3
    assert results["coco"]["count"] == 3
    assert results["coco"]["AP50"] == pytest.approx(1.0)
    oracle = Oracle(config.model)
    evaluate(oracle, dataclasses.replace(config, eval_limit=2), tasks=["coco"])
    assert sum(oracle.seen) == 2


def test_open_data_sets_are_used_again(root):
    config, kept = whole_config(root), {}
    evaluate(Oracle(config.model), config, tasks=["sst2"], datasets=kept)
    assert list(kept) == [("glue_sst2", "val")]
    kept["glue_sst2", "val"].layout = None
    evaluate(Oracle(config.model), config, tasks=["sst2"], datasets=kept)


def test_samples_without_labels_are_predicted_and_not_counted(root, tmp_path):
    config, kept = whole_config(root), {}
    evaluate(Oracle(config.model), config, tasks=["sst2"], datasets=kept)
    dataset = kept["glue_sst2", "val"]

    class Unlabelled:
        def __init__(self, keep):
            self.keep = keep

        def __len__(self):
            return 4

        def sample_id(self, index):
            return index

        def get(self, index, key):
            sample = {**dataset.get(0, None), "sample_id": index}
            return sample if index < self.keep else {**sample, "label": -1}

    for keep in (1, 0):
        kept["glue_sst2", "val"] = Unlabelled(keep)
        results = evaluate(Oracle(config.model), config, tasks=["sst2"], datasets=kept, out=tmp_path)["sst2"]
        assert results["count"] == keep
        assert ("accuracy" in results) == ("loss" in results) == bool(keep)
        rows = [json.loads(line) for line in (tmp_path / "predictions/sst2_val.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        assert [row["truth"] for row in rows].count(None) == 4 - keep
    assert describe(get_task("sst2"), results).startswith("no labels")


def test_a_missing_split_is_one_line_and_left_out(root, caplog):
    config = whole_config(root)
    with caplog.at_level("WARNING", "unit_fast"):
        results = evaluate(Oracle(config.model), config, tasks=["sst2", "qnli"], split="test")
    assert results == {}
    assert len(caplog.records) == 2
    assert "sst2: not evaluated" in caplog.text


def test_an_error_names_the_task(root):
    config = whole_config(root)
    with pytest.raises(RuntimeError, match="evaluation of vqa2 on val failed: RuntimeError: out of ideas"):
        evaluate(Oracle(config.model, fail_on="vqa2"), config)
    with pytest.raises(UserError, match="'cocoo'"):
        evaluate(Oracle(config.model), config, tasks=["cocoo"])
    single = whole_config(root, "sst2")
    with pytest.raises(UserError, match="task 'coco': this model does not have it; known: sst2"):
        evaluate(Oracle(single.model), single, tasks=["coco"])


def test_unreadable_images_are_counted_and_too_many_are_an_error(tmp_path, caplog):
    root = whole_root(tmp_path)
    (root / "coco/images/val2017/000000000100.jpg").write_bytes(b"not an image")
    config = whole_config(root)
    results = evaluate(Oracle(config.model), config, tasks=["coco"])["coco"]
    assert results["unreadable"] == 1
    assert results["count"] == 2, "its objects stay in the ground truth"
    assert results["detection_mean_ap"] == 0.0
    assert "000000000100.jpg: not a JPEG or PNG image" in caplog.text
    config = whole_config(root, data={"max_bad_share": 0.0})
    with pytest.raises(UserError, match=r"evaluation of coco on val: 1 of 2 images.*000000000100.jpg"):
        evaluate(Oracle(config.model), config, tasks=["coco"])


def test_pick_takes_one_sample_of_everything(model):
    from tests.models import random_batch

    batch = random_batch("coco", model.config, batch=3)
    model.eval()
    with torch.no_grad():
        out = model(batch)
        query = model.match(out, batch)
        whole = model.losses(out, batch, query)
        parts = [model.losses(*pick(out, batch, i), query[:, i : i + 1]) for i in range(3)]
    # the class loss is a mean over images, box losses are divided by the number of boxes of the batch: 3 + 1 + 1
    key = "train/detection_coco/loss_ce"
    assert sum(p[key] for p in parts).item() / 3 == pytest.approx(whole[key].item(), rel=1e-5)
    key = "train/detection_coco/loss_bbox"
    total = (3 * parts[0][key] + parts[1][key] + parts[2][key]) / 5
    assert total.item() == pytest.approx(whole[key].item(), rel=1e-5)
