"""``--init-from`` with files of any origin: whole parts are taken, heads of other classes left out, others refused."""

import dataclasses
import re

import pytest
import torch
from torchvision.models import resnet50
from transformers import BertConfig, BertModel, DetrConfig, DetrForObjectDetection, ResNetConfig

from tests.models import random_batch, small_config
from unit_fast.config import BackboneConfig, DecoderConfig, EncoderConfig, default_tasks
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.weights import convert
from unit_fast.weights.loading import load_initial_weights
from unit_fast.weights.names import bert_name

DETR_LIKE = small_config(
    "coco",
    "sst2",
    backbone=BackboneConfig(depth=14, width=8, stride=32),
    encoder=EncoderConfig(width=32, layers=2, heads=4, ffn_width=48, residual=False, task_embedding=False),
    decoder=DecoderConfig(width=32, layers=2, heads=4, ffn_width=48),
)
"""A UniT that can have all of a small DETR's parts."""


def hugging_face() -> DetrForObjectDetection:
    """A DETR with the sizes of ``DETR_LIKE``; its values are random and not those of an initialisation."""
    torch.manual_seed(1)
    resnet = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder")
             for what, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet, d_model=32,
        num_queries=5, num_labels=91, **sizes,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                value.normal_(std=0.1)
    return model


def facebook(model: UniT) -> dict[str, torch.Tensor]:
    """The weights of ``DETR_LIKE`` under the names of DETR's own code."""
    beginnings = {
        "backbone.": "backbone.0.body.", "image_encoder.": "transformer.encoder.", "decoder.": "transformer.decoder.",
        "query_embeds.detection_coco.": "query_embed.", "class_embeds.detection_coco.": "class_embed.",
        "bbox_embeds.detection_coco.": "bbox_embed.", "input_proj.": "input_proj.",
    }  # fmt: skip
    return {
        theirs + name.removeprefix(ours): value
        for name, value in model.state_dict().items()
        for ours, theirs in beginnings.items()
        if name.startswith(ours)
    }


def other(**changes) -> UniT:
    """A freshly initialised model like ``DETR_LIKE``."""
    torch.manual_seed(2)
    return UniT(dataclasses.replace(DETR_LIKE, **changes))


def changed(model: UniT, before: dict) -> set[str]:
    """Modules of which any tensor is not what it was."""
    return {n.split(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def snapshot(model: UniT) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("names", ["memory", "disk"])
def test_hugging_faces_detr_gives_the_same_boxes(names, tmp_path):
    """Every part is where it belongs: transformers 5's names in memory, transformers 4's in files."""
    theirs = hugging_face()
    if names == "disk":
        from safetensors.torch import load_file

        theirs.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert any(name.endswith("fc1.weight") and ".mlp." not in name for name in state)
    else:
        state = theirs.state_dict()
    model = other().eval()
    report = load_initial_weights(model, state)
    assert not report.left
    assert not report.unexpected
    batch = random_batch("coco", model.config)
    with torch.no_grad():
        ours = model(batch)
        expected = theirs(batch.image, pixel_mask=(~batch.pixel_mask).long())
    torch.testing.assert_close(ours.logits[-1], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.boxes[-1], expected.pred_boxes, rtol=1e-4, atol=1e-5)


HEADS = {"query_embeds", "bbox_embeds", "class_embeds"}


@pytest.mark.parametrize(
    ("changes", "taken", "left"),
    [
        ({}, {"backbone", "input_proj", "image_encoder", "decoder", *HEADS}, []),
        (
            {"tasks": default_tasks("coco", "sst2", queries=5) | default_tasks("coco", queries=5, outputs=4)},
            {"backbone", "input_proj", "image_encoder", "decoder", *HEADS} - {"class_embeds"},
            [r"class head left out: class_embed.weight is \[92, 32\], the model's \[4, 32\]"],
        ),
        (
            {"decoder": DecoderConfig(width=48, layers=2, heads=4, ffn_width=48)},
            {"backbone", "input_proj", "image_encoder"},
            ["decoder, and queries, box head, class head with it left out: .* is .96, 32., the model's"],
        ),
        (
            {"encoder": EncoderConfig(width=32, layers=1, heads=4, ffn_width=48)},
            {"backbone", "input_proj"},
            ["image encoder, and decoder, queries, .* with it left out: the file has 12 tensors more"],
        ),
        ({"tasks": default_tasks("sst2")}, {"backbone", "input_proj", "image_encoder"}, []),
    ],
)
def test_parts_of_detr_are_taken_whole_or_not_at_all(changes, taken, left):
    source, model = UniT(DETR_LIKE), other(**changes)
    before = snapshot(model)
    report = load_initial_weights(model, facebook(source), source="detr.pth")
    assert changed(model, before) == taken
    assert len(report.left) == len(left)
    for line, expected in zip(report.left, left):
        assert re.search(expected, line)
    said = report.counts()
    assert said.startswith("detr.pth (DETR's): ")
    assert f"{len(report.loaded)} tensors taken (backbone " in said
    assert len(report.loaded) + len(report.missing) == len(model.state_dict())


def test_a_resnet_and_bert_fill_their_parts():
    model = UniT(small_config("vqa2", backbone=BackboneConfig()))
    torchvision = resnet50().state_dict()
    before = snapshot(model)
    for prefix in ("", "backbone.body.", "encoder."):
        report = load_initial_weights(model, {prefix + name: value for name, value in torchvision.items()})
        assert changed(model, before) == {"backbone"}
        assert len(report.loaded) == 265
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    theirs = BertModel(BertConfig(vocab_size=200, max_position_embeddings=140, **settings)).state_dict()
    report = load_initial_weights(model, {f"bert.{name}": value for name, value in theirs.items()})
    assert changed(model, before) == {"backbone", "text_encoder"}
    own = model.state_dict()["text_encoder.layers.1.output_norm.bias"]
    assert torch.equal(own, theirs[bert_name("layers.1.output_norm.bias")])
    no_pooler = {name: value + 1 for name, value in theirs.items() if not name.startswith("pooler")}
    assert len(load_initial_weights(model, no_pooler).loaded) == len(report.loaded) - 2


def _foreign_files():
    model = UniT(small_config("coco", "sst2"))
    own = model.state_dict()
    detr = facebook(UniT(DETR_LIKE))
    few = ("input_proj.weight", "input_proj.bias", "decoder.norm.weight", "decoder.norm.bias")
    accident = {name: own[name] + 1 for name in few}
    rt_detr = {
        "model.backbone.model.embedder.embedder.0.convolution.weight": torch.zeros(4, 3, 3, 3),
        "model.encoder_input_proj.0.0.weight": torch.zeros(8, 8, 1, 1),
        "model.decoder.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8),
    }
    wrong_layer = {**own, "image_encoder.layers.1.linear1.weight": torch.zeros(40, 32)}
    more_layers = {**own, "image_encoder.layers.2.linear1.weight": torch.zeros(48, 32)}
    lacking = {name: value for name, value in own.items() if name != "image_encoder.layers.0.norm1.bias"}
    mmf = convert.to_mmf(model)
    queries = {**own, "query_embeds.detection_coco.weight": torch.zeros(7, 48)}
    return {
        "accidental names": (accident, "has 2 of the .* tensors of decoder"),
        "accidental and foreign": ({**accident, "stem.weight": torch.zeros(1)}, "no weights of UniT, DETR, a ResNet"),
        "RT-DETR": (rt_detr, "no weights of UniT, DETR, a ResNet or BERT"),
        "DETR of other sizes": (detr, "none of whose parts fits.*backbone, and .* left out: the file has 34 tensors"),
        "nothing": ({"x": torch.zeros(1)}, "no weights of UniT"),
        "a layer of another width": (wrong_layer, r"linear1.weight has shape \(40, 32\).*--skip-load"),
        "more layers": (more_layers, "1 tensors more than the model.*--skip-load"),
        "a tensor is missing": (lacking, "of image_encoder, image_encoder.layers.0.norm1.bias is not among"),
        "MMF of another width": (
            {**mmf, "bert_projection.weight": torch.zeros(2, 2)}, r"bert_projection.weight has shape \(2, 2\)"
        ),
        "other queries": (queries, r"query_embeds.detection_coco.weight has shape \(7, 48\).*--skip-load"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_foreign_files()))
def test_nothing_is_taken_by_accident(name):
    state, text = _foreign_files()[name]
    model = UniT(small_config("coco", "sst2"))
    before = snapshot(model)
    with pytest.raises(UserError, match=text):
        load_initial_weights(model, state, source="file.pth")
    assert not changed(model, before)


@pytest.mark.parametrize("names", ["ours", "mmf", "ddp"])
def test_a_head_of_other_classes_is_left_out_with_one_line(names):
    torch.manual_seed(0)
    source = UniT(small_config("coco", "vg", "sst2"))
    tasks = {**source.config.tasks}
    for name, outputs in {"detection_coco": 4, "detection_visual_genome": 9, "glue_sst2": 5}.items():
        tasks[name] = dataclasses.replace(tasks[name], outputs=outputs)
    model = UniT(dataclasses.replace(source.config, tasks=tasks))
    state = convert.to_mmf(source) if names == "mmf" else source.state_dict()
    state = {f"module.{name}": value for name, value in state.items()} if names == "ddp" else state
    before = snapshot(model)
    report = load_initial_weights(model, state)
    assert [line.partition(":")[0] for line in report.left] == ["coco", "vg", "sst2", "vg"]
    assert "coco: the head of 92 outputs is left out, the model has 4" in report.left
    own, theirs = model.state_dict(), source.state_dict()
    for name, value in own.items():
        head = name.startswith(("class_embeds.", "attribute_heads.", "classifiers.glue_sst2.out."))
        assert torch.equal(value, before[name] if head else theirs[name]), name


def test_another_number_of_layers_can_be_left_out():
    source = UniT(small_config("coco"))
    model = UniT(small_config("coco", encoder=EncoderConfig(width=32, layers=1, heads=4, ffn_width=48)))
    before = snapshot(model)
    load_initial_weights(model, source.state_dict(), skip=("image_encoder.",))
    assert "image_encoder" not in changed(model, before)
    assert torch.equal(model.decoder.norm.weight, source.decoder.norm.weight)
