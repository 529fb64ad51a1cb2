"""Weights of MMF, DETR, torchvision and Hugging Face <-> ours."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet50
from transformers import BertConfig, BertModel

from tests import parity
from tests.models import random_batch, small_config
from unit_fast.config import BackboneConfig, DecoderConfig, TextConfig, default_tasks
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.model.text import TextEncoder
from unit_fast.model.transformer import DropoutSeeds
from unit_fast.weights import convert, pretrained
from unit_fast.weights.loading import load_matching
from unit_fast.weights.names import bert_name

OFF = DropoutSeeds(False, torch.device("cpu"))


def _kit(model):
    return json.loads((parity.FIXTURES / "models" / f"{model}.json").read_text())


def _state(kit):
    rng = torch.Generator().manual_seed(0)
    return {n: torch.rand(shape, generator=rng) for n, shape, _ in kit["tensors"]}


@pytest.mark.parametrize("name", ["small_separate", "small_no_task", "small_equal_width"])
def test_names_are_mmfs_and_the_way_back_is_exact(name):
    kit = _kit(name)
    state = _state(kit)
    model = convert.from_mmf(state, kit["config"])
    back = convert.to_mmf(model)
    assert set(back) == {n for n in state if not n.endswith(".empty_weight")}
    assert all(torch.equal(back[n], state[n]) for n in back)
    gradients = convert.to_mmf(model, what="gradients")
    assert set(gradients) == {n for n, _, kind in kit["tensors"] if kind == "parameter"}
    assert all(g is None for g in gradients.values())
    with pytest.raises(UserError, match="'parameters' or 'gradients'"):
        convert.to_mmf(model, what="weights")


@pytest.mark.parametrize("name", ["small_separate", "small_no_task", "small_equal_width"])
def test_configuration_is_read_off_the_shapes(name):
    kit = _kit(name)
    inferred = convert.infer_mmf_config(_state(kit))
    expected = kit["config"]
    for key in set(inferred) - {"bert", "datasets"}:
        assert inferred[key] == expected[key], key
    for key in set(inferred["bert"]) - {"heads"}:
        assert inferred["bert"][key] == expected["bert"][key], key
    for task, settings in inferred["datasets"].items():
        assert all(expected["datasets"][task][key] == value for key, value in settings.items())


def test_aliases_and_prefixes_are_collapsed():
    """SPEC 7.3 and 7.4: nine copies of a shared decoder, two of BERT's embeddings, old prefixes."""
    kit = _kit("small_no_task")
    state = _state(kit)
    raw = {}
    for name, value in state.items():
        raw["module." + name.replace("unit_base_model.", "detr_model.", 1)] = value
        if ".transformer.decoder." in name:
            for kind, dataset in (("vl", "vqa2"), ("detection", "detection_coco")):
                raw["module." + name.replace(".decoder.", f".decoders.{kind}.{dataset}.")] = value.clone()
        if "module.embeddings" in name:
            raw["module." + name.replace("module.", "")] = value.clone()
    raw["module.bert_model.module.embeddings.position_ids"] = torch.arange(40)[None]
    model = convert.from_mmf({"model": raw}, kit["config"])
    assert all(torch.equal(v, state[n]) for n, v in convert.to_mmf(model).items())
    raw["module.unit_base_model.transformer.decoders.vl.vqa2.norm.bias"] += 1
    with pytest.raises(UserError, match="decoders.vl.vqa2.norm.bias: differs from another copy"):
        convert.from_mmf(raw, kit["config"])


def test_a_state_that_does_not_fit_is_refused_by_name():
    kit = _kit("small_separate")
    state = _state(kit)
    missing = {k: v for k, v in state.items() if k != "bert_projection.bias"}
    with pytest.raises(UserError, match=r"1 missing \(bert_projection.bias\)"):
        convert.from_mmf(missing, kit["config"])
    with pytest.raises(UserError, match=r"1 unexpected \(extra.weight\)"):
        convert.from_mmf({**state, "extra.weight": torch.zeros(2)}, kit["config"])
    with pytest.raises(UserError, match=r"bert_projection.bias has shape \(3,\), the model's"):
        convert.from_mmf({**state, "bert_projection.bias": torch.zeros(3)}, kit["config"])
    with pytest.raises(UserError, match="unknown key 'dec_layer'; nearest: dec_layers"):
        convert.from_mmf(state, {**kit["config"], "dec_layer": 3})
    with pytest.raises(UserError, match="mmf_config.pre_norm"):
        convert.from_mmf(state, {**kit["config"], "pre_norm": True})
    with pytest.raises(UserError, match="not a UniT state dict"):
        convert.from_mmf({"weight": torch.zeros(1)})


def test_text_encoder_is_hugging_faces_bert():
    torch.manual_seed(0)
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    theirs = BertModel(BertConfig(vocab_size=200, max_position_embeddings=140, **settings)).double().eval()
    model = UniT(small_config("vqa2")).double().eval()
    report = pretrained.load_bert(model, {f"bert.{k}": v for k, v in theirs.state_dict().items()})
    assert len(report.loaded) == len([n for n in theirs.state_dict() if not n.endswith("position_ids")])
    batch = random_batch("vqa2", model.config)
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    encoder = TextEncoder(model.config.text, task_rows=0).double().eval()
    encoder.load_state_dict({k: v for k, v in model.text_encoder.state_dict().items() if "task" not in k})
    ours = encoder(*inputs, task_index=0, seeds=OFF)
    expected = theirs(inputs[0], attention_mask=inputs[1], token_type_ids=inputs[2]).last_hidden_state
    real = batch.attention_mask == 1
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-10, atol=1e-12)


def test_old_bert_names_and_an_absent_pooler():
    model = UniT(small_config("sst2"))
    state = {
        bert_name(n.removeprefix("text_encoder.")): v + 1
        for n, v in model.state_dict().items()
        if n.startswith("text_encoder.") and "task" not in n and "pooler" not in n
    }
    state = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()}
    state["cls.predictions.bias"] = torch.zeros(3)
    before = model.text_encoder.embedding_norm.weight.clone()
    assert pretrained.load_bert(model, state).complete
    assert torch.equal(model.text_encoder.embedding_norm.weight, before + 1)
    del state["encoder.layer.0.output.dense.weight"]
    with pytest.raises(UserError, match="text_encoder.layers.0.output.weight"):
        pretrained.load_bert(model, state)


def test_pretrained_folder(tmp_path, caplog):
    config = small_config("vqa2", backbone=BackboneConfig())
    torchvision = resnet50()
    torch.save(torchvision.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    model = UniT(config)
    assert pretrained.load_pretrained(model, tmp_path) == {
        "backbone": str(tmp_path / "resnet50-0676ba61.pth"),
        "text encoder": "random",
    }
    assert torch.equal(model.backbone.layer4[2].conv3.weight, torchvision.layer4[2].conv3.weight)
    assert caplog.text.count("starts from random weights") == 1
    assert "bert-base-uncased/model.safetensors" in caplog.text
    with pytest.raises(UserError, match="text encoder: no pretrained weights.*--require-weights"):
        pretrained.load_pretrained(model, tmp_path, require=True)
    # DETR's file is preferred, and its transformer is not loaded.
    detr = {f"backbone.0.body.{k}": v * 2 for k, v in torchvision.state_dict().items() if not k.startswith("fc.")}
    torch.save({"model": {**detr, "transformer.x": torch.zeros(1)}}, tmp_path / "detr-r50-dc5-f0fb7ef5.pth")
    (tmp_path / "bert-base-uncased").mkdir()
    bert = {
        f"bert.{bert_name(n.removeprefix('text_encoder.'))}": v.contiguous()
        for n, v in model.state_dict().items()
        if n.startswith("text_encoder.") and "task" not in n
    }
    save_file(bert, tmp_path / "bert-base-uncased" / "model.safetensors")
    found = pretrained.load_pretrained(model, tmp_path, require=True)
    assert found["backbone"].endswith("detr-r50-dc5-f0fb7ef5.pth")
    assert torch.equal(model.backbone.conv1.weight, torchvision.conv1.weight * 2)


def test_coco_initialisation():
    """SPEC 5.2: a single-task COCO model's weights, non-strictly, into a shared and into a separate model."""
    torch.manual_seed(0)
    separate = DecoderConfig(width=48, layers=3, heads=4, ffn_width=56, share=False)
    single = UniT(small_config("coco", decoder=separate))
    for parameter in single.parameters():
        torch.nn.init.normal_(parameter)
    shared = UniT(small_config("coco", "vqa2"))
    before = shared.classifiers["vqa2"].dense.weight.clone()
    for state in (single.state_dict(), convert.to_mmf(single)):
        report = load_matching(shared, state)
        assert torch.equal(shared.decoder.norm.weight, single.decoders["detection_coco"].norm.weight)
        box, expected = (m.bbox_embeds["detection_coco"].layers[2].bias for m in (shared, single))
        assert torch.equal(box, expected)
        assert torch.equal(shared.classifiers["vqa2"].dense.weight, before)
        assert not report.unexpected
    other = UniT(small_config("coco", "vqa2", decoder=separate))
    own = other.decoders["vqa2"].norm.weight.clone()
    load_matching(other, single.state_dict())
    assert torch.equal(other.decoders["detection_coco"].norm.weight, single.decoders["detection_coco"].norm.weight)
    assert torch.equal(other.decoders["vqa2"].norm.weight, own)
    skipped = UniT(small_config("coco"))
    head = skipped.class_embeds["detection_coco"].weight.clone()
    report = load_matching(skipped, single.state_dict(), skip=["class_embeds.", "bbox_embeds."])
    assert torch.equal(skipped.class_embeds["detection_coco"].weight, head)
    assert len(report.skipped) == 8
    with pytest.raises(UserError, match="no tensor fits"):
        load_matching(skipped, {"x": torch.zeros(1)}, source="file.pth")


def test_small_text_config_is_not_a_default():
    """Guard: the fixtures above would prove nothing if they used the published widths."""
    assert small_config("sst2").text != TextConfig()
    assert list(default_tasks("sst2")) == ["glue_sst2"]
