"""One's own classes from the command line to predictions: trained, evaluated by name, predicted, gone on with."""

import contextlib
import dataclasses
import io
import json
import shutil

import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import unit_fast
from tests.data_roots import write
from tests.own_folders import IDS, NAMES, plain, roboflow, scenes, voc, yolo
from unit_fast.commands.main import main
from unit_fast.config import DataConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.evaluation.evaluate import evaluate
from unit_fast.evaluation.labels import read_labels
from unit_fast.evaluation.metrics import coco_average_precision
from unit_fast.export.write import METADATA
from unit_fast.run.train import train as train_run

TINY = [
    "--recipe", "detect", "--progress", "none", "--threads", "1", "--log-every", "1", "--save-every", "0",
    "--eval-every", "0", "--batch", "4", "--model.backbone.width", "8", "--model.backbone.stride", "32",
    "--model.encoder.layers", "1", "--model.decoder.layers", "2", "--model.tasks.detect.queries", "8",
    "--data.short-side", "48", "--data.max-side", "64", "--data.train-short-sides", "40", "48",
    "--data.crop-short-sides", "48", "56", "--data.crop-min", "32", "--data.crop-max", "48",
    "--data.engine", "torchvision",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("world") / "world")


def train(root, out, *more, steps=2) -> int:
    return main(["train", *TINY, "--data-root", str(root), "--out", str(out), "--steps", str(steps), *more])


def official(truth, results) -> tuple[float, dict[str, float]]:
    """AP and AP by class name of pycocotools on the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = [coco.cats[i]["name"] for i in evaluation.params.catIds]
    values = {name: evaluation.eval["precision"][:, :, k, 0, -1] for k, name in enumerate(names)}
    return evaluation.stats[0], {name: value.mean() for name, value in values.items() if value.max() > -1}


FORMS = {
    "plain": (plain, None, "annotations/instances_val2017.json", IDS),
    "roboflow": (roboflow, None, "valid/_annotations.coco.json", (1, 2, 3)),
    "yolo": (yolo, "yolo", "annotations/instances_val.json", (1, 2, 3)),
    "voc": (voc, "voc", "annotations/instances_val.json", (1, 2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_thirty_images_of_three_classes(form, found, tmp_path, capsys):
    make, converted, truth, ids = FORMS[form]
    root, out = make(tmp_path / "data", found), tmp_path / "run"
    if converted:
        assert main(["data", "prepare", "--from", converted, str(root), str(tmp_path / "coco")]) == 0
        assert "3 classes; train 22 images with 27 boxes, val 8 images with 9 boxes" in capsys.readouterr().out
        root = tmp_path / "coco"
    assert main(["data", "check", str(root)]) == 0
    assert train(root, out) == 0
    config = json.loads((out / "config.json").read_text())["model"]["tasks"]["detect"]
    assert (config["outputs"], config["classes"], config["class_ids"]) == (4, list(NAMES), list(ids))
    labels = read_labels(out)["detect"]
    assert labels.classes == dict(enumerate(NAMES))
    assert labels.category_ids == dict(enumerate(ids))

    capsys.readouterr()
    for scorer in ("pycocotools", "faster-coco-eval"):
        assert main(["evaluate", str(out), "--json", "--scorer", scorer]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]["detect"]
        results = out / "predictions/detect_val.json"
        value, by_class = official(root / truth, results)
        assert metrics["detection_mean_ap"] == pytest.approx(value, abs=1e-12)
        rows = {row["name"]: row for row in metrics["by_class"]}
        assert {name: rows[name]["AP"] for name in by_class} == pytest.approx(by_class, abs=1e-12)
        assert {row["category_id"] for row in rows.values()} == set(ids)
        assert sum(row["objects"] for row in rows.values()) == 9
    assert {r["category_id"] for r in json.loads(results.read_text())} <= set(ids)
    assert json.loads((out / "predictions/detect_val_by_class.json").read_text()) == metrics["by_class"]
    assert main(["evaluate", str(out)]) == 0
    assert "detect by class" in capsys.readouterr().out
    samples = json.loads((out / "examples.json").read_text())["detect"]["samples"]
    named = {box["label"] for s in samples for kind in ("truth", "prediction") for box in s[kind]}
    assert named <= set(NAMES)
    assert "by class, step 2" in (out / "report.html").read_text()

    image = found["val"][1]["path"]
    assert {i["label"] for i in unit_fast.load(out).predict("detect", image=image, threshold=0).items} <= set(NAMES)


@pytest.mark.parametrize("results", ["exact", "shifted", "one class less"])
def test_the_average_precision_of_good_results_is_pycocotools(results, found, tmp_path):
    """As above, of boxes that are mostly right: what a run of two steps finds is nearly nothing."""
    root = plain(tmp_path, found)
    dataset = open_dataset(
        "detect", "val", DataConfig(root=str(root)), default_tasks("detect")["detect"], augment=False
    )
    truth = dataset.coco_ground_truth()
    rows = []
    for n, a in enumerate(truth["annotations"]):
        x, y, w, h = a["bbox"]
        if results == "one class less" and a["category_id"] == 17:
            continue
        x += w * 0.04 * n * (results == "shifted")
        rows.append({**{k: a[k] for k in ("image_id", "category_id")}, "bbox": [x, y, w, h], "score": 1 - n / 100})
    value, by_class = official(root / "annotations/instances_val2017.json", write(tmp_path / "found.json", rows))
    figures = coco_average_precision(truth, rows, scorer="pycocotools", by_class=True)
    assert figures["detection_mean_ap"] == pytest.approx(value, abs=1e-12)
    assert 0.3 < value <= 1
    ours = {dict(zip(IDS, NAMES))[i]: row["AP"] for i, row in figures["by_class"].items()}
    assert ours == pytest.approx(by_class, abs=1e-12)


def test_a_run_goes_on_with_its_classes_alone(found, tmp_path, capsys):
    root, out = plain(tmp_path / "data", found), tmp_path / "run"
    assert train(root, out, "--stop-at", "1", "--eval-every", "-1", steps=3) == 75
    resumed = ["train", "--resume", "auto", "--out", str(out), "--progress", "none"]
    for path in (root / "annotations").iterdir():  # classes in another order, and other ids: the same names
        content = json.loads(path.read_text())
        ids = {5: 30, 17: 20, 900: 10}
        for category in content["categories"]:
            category["id"] = ids[category["id"]]
        content["categories"].reverse()
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
        write(path, content)
    assert main([*resumed, "--stop-at", "2"]) == 75
    capsys.readouterr()
    assert main([*resumed, *TINY, "--data-root", str(root), "--steps", "3"]) == 2
    assert "model.tasks.detect.classes was ('bolt', 'nut', 'washer'), is " in capsys.readouterr().err

    for path in (root / "annotations").iterdir():
        write(path, path.read_text().replace('"bolt"', '"screw"'))
    assert main(resumed) == 2
    assert "category 30 (screw) is not one of the 3 classes of the model (bolt, nut, washer)" in capsys.readouterr().err


def test_other_classes_start_from_a_run_without_its_head(found, tmp_path, capsys):
    root, first = plain(tmp_path / "data", found), tmp_path / "first"
    assert train(root, first, "--eval-every", "-1") == 0
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 1, "name": "thing"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        write(path, content)
    assert train(root, tmp_path / "second", "--eval-every", "-1", "--init-from", str(first)) == 0
    log = (tmp_path / "second/log.txt").read_text()
    assert "the head of 4 outputs is left out, the model has 2" in log


def test_own_classes_on_a_photograph_of_a_telephone_and_for_other_programs(found, tmp_path, capsys):
    root, out, photo = roboflow(tmp_path / "data", found), tmp_path / "run", tmp_path / "phone.jpg"
    assert train(root, out, "--eval-every", "-1") == 0
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.open(found["val"][1]["path"]).resize((64, 40)).save(photo, exif=turned)
    capsys.readouterr()
    assert main(["predict", str(out), "--image", str(photo), "--threshold", "0", "--task", "detect", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["width"], said["height"]) == (40, 64), "upright"
    assert said["predictions"]
    for item in said["predictions"]:
        assert item["box"][2] <= 40
        assert item["box"][3] <= 64
    assert main(["export", str(out), "--format", "torch-export", "--out", str(tmp_path / "detect.pt2")]) == 0
    assert "of detect's validation split" in capsys.readouterr().out
    extra = {METADATA: ""}
    torch.export.load(tmp_path / "detect.pt2", extra_files=extra)
    assert list(json.loads(extra[METADATA])["labels"]["classes"].values()) == list(NAMES)


def test_ten_lines_of_python(found, tmp_path):
    config = dataclasses.replace(unit_fast.recipe("detect"), steps=1, batch_per_process=2, eval_limit=2)
    small = dataclasses.replace(config.data, root=str(roboflow(tmp_path / "data", found)), short_side=64, max_side=80,
                                train_short_sides=(64,), crop_short_sides=(64,), crop_min=48, crop_max=64)  # fmt: skip
    run = train_run(dataclasses.replace(config, data=small), tmp_path / "run", progress="none")
    assert run.config.model.tasks["detect"].classes == NAMES
    metrics = evaluate(run.model, run.config, progress=False)["detect"]
    assert [row["name"] for row in metrics["by_class"]] == list(NAMES)
    said = unit_fast.load(run.folder).predict("detect", image=found["val"][0]["path"], threshold=0)
    assert {item["label"] for item in said.items} <= set(NAMES)


def test_a_dry_run_tells_the_classes(found, tmp_path, capsys):
    root = plain(tmp_path / "data", found)
    assert main(["train", *TINY, "--data-root", str(root), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "3 classes by their order" in said.out
    assert '"outputs": 4' in said.out
    shutil.rmtree(root)
    root.mkdir()
    assert main(["train", *TINY, "--data-root", str(root), "--dry-run"]) == 2
    assert "no annotations in COCO's format" in capsys.readouterr().err
