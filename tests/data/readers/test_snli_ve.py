"""SNLI-VE: both spellings, rows that are wrong, names of images."""

import json

import numpy as np
import pytest

from tests.data_roots import REAL, REAL_DATA, needs_real, opened, picture, task_config, whole_root, write
from unit_fast.config import DataConfig
from unit_fast.data import BadImage, MissingSplit, open_dataset
from unit_fast.errors import UserError


def test_both_spellings_of_snli_ve(tmp_path):
    root = whole_root(tmp_path)
    for split in ("train", "val"):
        dataset = opened("snli_ve", root, split)
        assert len(dataset) == 2
        assert dataset.findings.count("row without a gold label") == 1
        assert [dataset.get(i)["label"] for i in range(2)] == [0, 2]
        sample = dataset.get(1)
        assert sample["image_path"].endswith("flickr30k_images/77.jpg")
        assert sample["text"] == "a cat 2"
        assert sample["sample_id"] == "77.jpg#2"
        assert sample["token_type_ids"].sum() == 0
    with pytest.raises(MissingSplit, match="snli_ve_test.jsonl"):
        opened("snli_ve", root, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not valid JSON"),
        ("[]", ":1: must be an object"),
        ('{"a": 1}', "key 'Flikr30kID' is missing"),
        (
            '{"Flikr30kID": "77.jpg", "sentence2": "x", "gold_label": "yes"}',
            "gold_label 'yes' is not one of entailment",
        ),
        ('{"Flikr30kID": "77.jpg", "sentence2": 3, "gold_label": "neutral"}', "sentence2 must be text"),
        ('{"Flikr30kID": "77.jpg", "sentence2": "\\ud800", "gold_label": "neutral"}', "lone surrogate"),
    ],
)
def test_wrong_snli_ve_rows(tmp_path, line, message):
    root = whole_root(tmp_path)
    write(root / "snli_ve/snli_ve_train.jsonl", line + "\n")
    with pytest.raises(UserError, match=r"snli_ve_train.jsonl:1") as info:
        opened("snli_ve", root)
    assert message in str(info.value)


def test_snli_ve_names_stay_inside(tmp_path):
    root = whole_root(tmp_path)
    row = {"Flikr30kID": "../../../secret.jpg", "sentence2": "x", "gold_label": "neutral"}
    write(root / "snli_ve/snli_ve_train.jsonl", json.dumps(row) + "\n")
    picture(tmp_path.parent / "secret.jpg", 10, 10)
    with pytest.raises(BadImage, match="leaves its folder"):
        opened("snli_ve", root).get(0)


@needs_real
def test_real_snli_ve():
    dataset = open_dataset("snli_ve", "train", REAL_DATA, task_config("snli_ve"), augment=False)
    assert np.bincount(dataset.labels).tolist() == [6, 6, 4]
    early = DataConfig(
        root=str(REAL), short_side=96, paths={"snli_ve.train": "snli_ve/snli_ve_train_early_release.jsonl"}
    )
    dataset = open_dataset("snli_ve", "train", early, task_config("snli_ve"), augment=False)
    assert np.bincount(dataset.labels, minlength=3).tolist() == [4, 1, 0]
    assert dataset.get(0)["image"].shape[0] == 3
