"""Other projects' whole models become checkpoints that predict, with the names of their outputs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import small_config
from tests.weights.test_initial_weights import DETR_LIKE, facebook, hugging_face
from unit_fast.batch import Batch
from unit_fast.commands.main import main
from unit_fast.evaluation.known_labels import COCO, write_known_labels
from unit_fast.model import UniT
from unit_fast.prediction.predictor import load
from unit_fast.weights import checkpoint


def names(folder) -> dict:
    return json.loads((folder / "labels.json").read_text())


def test_a_hugging_face_folder_predicts_what_it_predicted(tmp_path, capsys):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--format", "detr", "--whole"]) == 0
    said = capsys.readouterr().out
    assert "Hugging Face DETR's): 158 tensors taken (backbone " in said
    assert "a feature cell has 32 pixels" in said
    assert "no names" not in said
    assert names(tmp_path / "out") == {"detection_coco": {"classes": COCO}}
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    found = load(tmp_path / "out").predict("coco", image=Image.fromarray(pixels), threshold=0.0)
    assert found.items[0]["label"] in COCO.values()
    image = load(tmp_path / "out").model  # the same numbers as theirs, on an image that needs no resize
    batch = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = image(Batch(task="detection_coco", image=batch))
        expected = theirs(batch, pixel_mask=torch.ones(1, 64, 96, dtype=torch.int64))
    torch.testing.assert_close(ours.logits[-1], expected.logits, rtol=1e-4, atol=1e-5)


def test_facebooks_file_says_its_stride_and_takes_names(tmp_path, capsys):
    source = tmp_path / "detr-dc5.pth"
    torch.save({"model": facebook(UniT(DETR_LIKE))}, source)
    labels = tmp_path / "coco.json"
    labels.write_text(json.dumps({"categories": [{"id": 5, "name": "bolt"}, {"id": 900, "name": "nut"}]}))
    arguments = ["convert", str(source), str(tmp_path / "out"), "--format", "detr", "--whole", "--labels", str(labels)]
    assert main(arguments) == 0
    model, config = checkpoint.load_model(tmp_path / "out")
    assert (config.model.backbone.depth, config.model.backbone.stride) == (14, 16)
    assert names(tmp_path / "out")["detection_coco"]["classes"] == {"5": "bolt"}
    assert torch.equal(model.backbone.conv1.weight, torch.load(source)["model"]["backbone.0.body.conv1.weight"])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--format", "bert", "--whole"], "--whole: goes with --format detr"),
        (["--format", "detr", "--stride", "16"], "--stride: goes with --whole"),
        (["--format", "detr", "--whole", "--labels", "x.json"], "--labels x.json: neither"),
        (["--format", "detr", "--whole"], "no whole DETR: class_embed.weight is missing"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tmp_path, monkeypatch, capsys, more, text):
    monkeypatch.chdir(tmp_path)
    tensors = facebook(UniT(DETR_LIKE))
    if "missing" in text:
        del tensors["class_embed.weight"]
    torch.save(tensors, "a.pth")
    (tmp_path / "x.json").write_text("{}")
    assert main(["convert", "a.pth", "out", *more]) == 2
    assert text in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "x.json"]


def test_names_that_are_known_and_those_that_are_asked_for(tmp_path):
    config = small_config("coco", "vqa2", "sst2", "mnli")
    missing = write_known_labels(tmp_path, config)
    found = names(tmp_path)
    assert missing == ["vqa2"]
    assert found["glue_sst2"]["classes"] == {"0": "negative", "1": "positive"}
    assert found["detection_coco"]["classes"]["90"] == "toothbrush"
    separate = small_config("sst2", "coco")
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"glue_sst2": {"classes": {"0": "bad", "1": "good"}}}))
    write_known_labels(tmp_path, separate, labels=str(kept))
    assert names(tmp_path)["glue_sst2"]["classes"]["1"] == "good"
