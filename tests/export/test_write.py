"""Exported files: run by onnxruntime and torch alone on other sizes than they were made with, with what they need to be
used. Nothing is left where they differ."""

import json

import onnxruntime
import pytest
import torch

from tests.models import random_batch
from tests.small_runs import make_world, small_config
from unit_fast.config import BackboneConfig, DecoderConfig
from unit_fast.data import open_dataset
from unit_fast.errors import UserError
from unit_fast.evaluation.labels import write_labels
from unit_fast.export import write
from unit_fast.export.examples import Sizes
from unit_fast.model import UniT
from unit_fast.weights import checkpoint

SMALLEST = {
    "backbone": BackboneConfig(depth=14, width=8),
    "decoder": DecoderConfig(width=16, layers=1, heads=2, ffn_width=32),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with weights and labels, its model, and the data set beside it."""
    root = make_world(tmp_path_factory.mktemp("world"))
    config = small_config(root, "vg", "vqa2", "sst2", model=SMALLEST)
    torch.manual_seed(0)
    model = UniT(config.model).eval()
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "checkpoints", "step_1", model.state_dict(), config)
    datasets = {n: open_dataset(n, "train", config.data, t, augment=False) for n, t in config.model.tasks.items()}
    write_labels(folder, config, datasets)
    return folder, model


def outputs(model: UniT, batch) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(batch)
    return [out.scores] if out.logits is None else [out.logits[-1], out.boxes[-1], out.attribute_logits]


def other_batch(model: UniT, task: str, size: int):
    batch = random_batch(task, model.config, batch=size, seed=7)
    if batch.image is not None:  # wide, odd, and mostly padding
        batch.image, batch.pixel_mask = torch.randn(size, 3, 45, 111), torch.zeros(size, 45, 111, dtype=torch.bool)
        batch.pixel_mask[-1, 20:] = batch.pixel_mask[-1, :, 50:] = True
    return batch


def test_onnx_of_any_size(run, tmp_path):
    folder, model = run
    said = write.export(folder, tmp_path / "vg.onnx", task="vg")
    assert "samples of vg's validation split in 3 batches" in said
    assert [path.name for path in tmp_path.iterdir()] == ["vg.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "vg.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3):
        batch = other_batch(model, "vg", size)
        found = session.run(None, {"image": batch.image.numpy(), "pixel_mask": batch.pixel_mask.numpy()})
        for name, theirs, ours in zip(("logits", "boxes", "attribute_logits"), found, outputs(model, batch)):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4, msg=name)
    about = json.loads(session.get_modelmeta().custom_metadata_map[write.METADATA])
    assert about["image"]["mean"] == [0.485, 0.456, 0.406]
    assert about["image"]["short_side"] == 48
    assert about["labels"] == json.loads((folder / "labels.json").read_text())["detection_visual_genome"]
    assert list(about["outputs"]) == [output.name for output in session.get_outputs()]
    with pytest.raises(UserError, match="vg.onnx: is there already"):
        write.export(folder, tmp_path / "vg.onnx", task="vg")


def test_onnx_of_fixed_sizes(run, tmp_path):
    folder, model = run
    write.export(folder, tmp_path / "a.onnx", task="vqa2", sizes=Sizes(batch=2, image=(64, 80), tokens=9))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [[2, 3, 64, 80], [2, 64, 80], [2, 9], [2, 9], [2, 9]]
    batch = random_batch("vqa2", model.config)
    found = session.run(None, {i.name: getattr(batch, i.name).numpy() for i in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(found[0]), outputs(model, batch)[0], rtol=1e-4, atol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map[write.METADATA])
    assert about["text"]["vocabulary"] == (folder / "vocab.txt").read_text().splitlines()
    assert about["image"]["size"] == [64, 80]


def test_an_archive_of_torch_and_a_file_that_differs(run, tmp_path, monkeypatch):
    folder, model = run
    write.export(folder, tmp_path / "a.pt2", format="torch-export", task="sst2")
    extra = {write.METADATA: ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra[write.METADATA])["labels"]["classes"]["0"] == "negative"
    batch = random_batch("sst2", model.config, batch=3)
    batch.input_ids %= model.config.text.vocab_size
    found = program.module()(batch.input_ids, batch.attention_mask, batch.token_type_ids)
    torch.testing.assert_close(found[0], outputs(model, batch)[0], rtol=1e-5, atol=1e-5)
    assert not any("vqa2" in name or "backbone" in name for name in program.state_dict)

    def off(*given):
        module = write_archive(*given)
        return lambda inputs: tuple(x + 0.01 for x in module(inputs))

    write_archive = write._write_archive
    monkeypatch.setattr(write, "_write_archive", off)
    with pytest.raises(UserError, match="b.pt2: not written: scores differs from PyTorch by 1.0e-02"):
        write.export(folder, tmp_path / "b.pt2", format="torch-export", task="sst2")
    assert not list(tmp_path.glob("b.pt2*"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "--task NAME: the file has one task; known: vg, vqa2, sst2"),
        ({"task": "vqa"}, "--task vqa: .*nearest: vqa2"),
        ({"task": "sst2", "format": "onx"}, "format: 'onx' is not known; nearest: onnx"),
        ({"task": "sst2", "sizes": Sizes(image=(64, 64))}, "--size: sst2 has no image"),
        ({"task": "vg", "sizes": Sizes(tokens=9)}, "--tokens: vg has no text"),
        ({"task": "vg", "sizes": Sizes(image=(8, 64))}, "--size: give at least 16"),
        ({"task": "sst2", "sizes": Sizes(tokens=1000)}, "--tokens 1000: give 2 to"),
        ({"task": "sst2", "sizes": Sizes(batch=0)}, "--batch 0"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(run, tmp_path, settings, text):
    with pytest.raises(UserError, match=text):
        write.export(run[0], tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())
