"""The model: sizes, initialisation, shortcuts that must be exact, the parameters a task uses, bad input."""

import dataclasses

import pytest
import torch
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from tests.models import random_batch, small_config
from unit_fast.config import (
    ALL_TASKS,
    BackboneConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.model.backbone import Backbone
from unit_fast.model.positions import feature_mask, sine_positions
from unit_fast.model.transformer import Decoder, DropoutSeeds
from unit_fast.tasks import get_task

OFF = DropoutSeeds(False, torch.device("cpu"))


def _model(*tasks, **changes):
    torch.manual_seed(0)
    return UniT(small_config(*tasks, **changes))


# SPEC 1.12: tasks, shared decoder, task embeddings -> parameters, trainable, tensors, trainable tensors.
COUNTS = [
    (("coco",), False, True, 191_790_880, 191_568_480, 455, 444),
    (("vg",), False, True, 194_092_695, 193_870_295, 460, 449),
    (("vqa2",), False, True, 193_476_601, 193_254_201, 453, 442),
    (("coco", "vqa2"), True, True, 194_808_409, 194_586_009, 462, 451),
    (("coco", "vqa2"), False, True, 242_077_273, 241_854_873, 572, 561),
    (("vg", "vqa2"), True, True, 197_110_224, 196_887_824, 467, 456),
    (("vg", "vqa2"), False, True, 244_379_088, 244_156_688, 577, 566),
    (("coco", "vg", "vqa2"), True, True, 198_442_032, 198_219_632, 476, 465),
    (("coco", "vg", "vqa2"), False, True, 292_979_760, 292_757_360, 696, 685),
    (ALL_TASKS, True, True, 201_507_900, 201_285_500, 511, 500),
    (ALL_TASKS, False, True, 532_389_948, 532_167_548, 1281, 1270),
    (("coco",), False, False, 191_528_736, 191_306_336, 453, 442),
    (ALL_TASKS, True, False, 201_245_756, 201_023_356, 509, 498),
    (("coco", "snli_ve", "mnli"), True, True, 193_018_150, 192_795_750, None, None),
]


@pytest.mark.parametrize(("tasks", "share", "embedding", "total", "trainable", "tensors", "trained"), COUNTS)
def test_parameter_counts(tasks, share, embedding, total, trainable, tensors, trained):
    config = ModelConfig(
        encoder=EncoderConfig(task_embedding=embedding),
        text=TextConfig(task_embedding=embedding),
        decoder=DecoderConfig(share=share),
        tasks=default_tasks(*tasks),
    )
    with torch.device("meta"):
        model = UniT(config)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable
    if tensors is not None:
        assert (len(parameters), sum(p.requires_grad for p in parameters)) == (tensors, trained)


def test_equal_width_parameter_count():
    with torch.device("meta"):
        model = UniT(ModelConfig(encoder=EncoderConfig(width=768), tasks=default_tasks("coco", "snli_ve", "mnli")))
    assert sum(p.numel() for p in model.parameters()) == 218_997_030


def test_initialisation_follows_the_authors():
    model = _model()
    encoder, decoder = model.image_encoder.layers[0], model.decoder.layers[0]
    for attention in (encoder.self_attn, decoder.self_attn, decoder.multihead_attn):
        assert attention.in_proj_bias.eq(0).all()
        assert attention.out_proj.bias.eq(0).all()
    width = decoder.self_attn.in_proj_weight.shape[1]
    bound = (6 / (4 * width)) ** 0.5  # the packed matrix counts as one
    largest = decoder.self_attn.in_proj_weight.abs().max()
    assert 0.98 * bound < largest <= bound
    assert decoder.linear1.bias.abs().max() > 0
    head = model.attribute_heads["detection_visual_genome"]
    assert head.attr_linear1.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.attr_linear1.bias.eq(0).all()
    assert model.image_encoder.task_embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert not torch.equal(decoder.linear1.weight, model.decoder.layers[1].linear1.weight)


def test_separate_decoders_start_with_equal_layers_unless_xavier():
    base = small_config("coco", "sst2")
    model = UniT(dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, share=False)))
    first, second = (model.decoders[name] for name in ("detection_coco", "glue_sst2"))
    for a, b in zip(first.layers[0].parameters(), first.layers[2].parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(first.layers[0].linear1.weight, second.layers[0].linear1.weight)
    xavier = dataclasses.replace(base.decoder, share=False, separate_init="xavier")
    decoder = UniT(dataclasses.replace(base, decoder=xavier)).decoders["glue_sst2"]
    assert not torch.equal(decoder.layers[0].linear1.weight, decoder.layers[1].linear1.weight)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_shapes_of_every_task(name):
    model = _model().eval()
    batch = random_batch(name, model.config)
    task = get_task(name)
    out = model(batch)
    assert out.hidden_states.shape == (3, 2, 5, 48)
    outputs = model.config.tasks[task.name].outputs
    if task.is_detection:
        assert out.logits.shape == (3, 2, 5, outputs)
        assert out.boxes.shape == (3, 2, 5, 4)
        assert (out.attribute_logits is not None) == task.attributes
        terms = {"loss_ce", "loss_bbox", "loss_giou"} | ({"loss_attr"} if task.attributes else set())
        names = {f"val/{task.name}/{t}{s}" for t in terms for s in ("", "_0", "_1")}
    else:
        assert out.scores.shape == (2, outputs)
        names = {f"val/{task.name}/loss_0"}
    losses = model.losses(out, batch, split="val")
    assert set(losses) == names
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("name", ALL_TASKS)
def test_used_parameters_are_those_in_the_graph(name):
    model = _model().train()
    batch = random_batch(name, model.config)
    sum(model.losses(model(batch), batch).values()).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, used in model.used_parameters(name).items() if used}


def test_bert_positions_get_a_gradient_of_exactly_zero_on_glue():
    model = _model("qnli").train()
    batch = random_batch("qnli", model.config)
    sum(model.losses(model(batch), batch).values()).backward()
    for parameter in model.bert_pos_projection.parameters():
        assert parameter.grad.eq(0).all()


def _decoder(dropout):
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(width=48, layers=3, heads=4, ffn_width=56, dropout=dropout)).double()
    for parameter in decoder.parameters():  # biases too: with zero ones layer 0 is trivial
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def test_single_key_and_constant_first_layer_are_exact():
    """The shortcuts of SPEC 1.8 against the general path, with a dropout probability that rounds to nothing."""
    query, memory = torch.randn(5, 48).double(), torch.randn(2, 1, 48).double()
    positions, mask = torch.randn(2, 1, 48).double(), torch.zeros(2, 1, dtype=torch.bool)
    general = _decoder(dropout=1e-9).train()(query, memory, positions, mask, DropoutSeeds(True, torch.device("cpu")))
    short = _decoder(dropout=0.1).eval()(query, memory, None, None, OFF)
    torch.testing.assert_close(short, general, rtol=1e-11, atol=1e-11)
    many = torch.randn(2, 7, 48).double(), torch.randn(2, 7, 48).double(), torch.rand(2, 7) > 0.7
    general = _decoder(dropout=1e-9).train()(query, *many, DropoutSeeds(True, torch.device("cpu")))
    short = _decoder(dropout=0.1).eval()(query, *many, OFF)
    torch.testing.assert_close(short, general, rtol=1e-11, atol=1e-11)


def test_single_key_dropout_is_independent_per_batch_head_and_query():
    decoder = Decoder(DecoderConfig(width=48, layers=1, heads=4, ffn_width=56, dropout=0.4)).train()
    attention = decoder.layers[0].multihead_attn
    with torch.no_grad():  # output projection = identity, so that heads can be seen
        attention.out_proj.weight.copy_(torch.eye(48))
    memory = torch.randn(3, 1, 48)
    cross = decoder._single_key(memory)
    out = cross(decoder.layers[0], torch.zeros(3, 500, 48), DropoutSeeds(True, torch.device("cpu")))
    value = torch.nn.functional.linear(memory, attention.in_proj_weight[96:], attention.in_proj_bias[96:])
    ratio = (out / value).unflatten(-1, (4, 12))
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), atol=1e-4)  # a head is kept or dropped whole
    kept = ratio[..., 0] > 0.5
    assert torch.allclose(ratio[..., 0][kept], torch.tensor(1 / 0.6), rtol=1e-3)
    assert abs(kept.float().mean() - 0.6) < 4 * (0.24 / kept.numel()) ** 0.5
    correlation = torch.corrcoef(kept.float().transpose(0, 1).flatten(1).T)
    off_diagonal = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
    assert off_diagonal.abs().max() < 0.25


def test_dropout_follows_the_default_generator():
    model = _model("vqa2").train()
    batch = random_batch("vqa2", model.config)

    def scores(seed):
        torch.manual_seed(seed)
        return model(batch).scores

    assert torch.equal(scores(3), scores(3))
    assert not torch.equal(scores(3), scores(4))
    state = torch.get_rng_state()
    model.eval()(batch)
    assert torch.equal(state, torch.get_rng_state())  # evaluation draws nothing


def test_text_padding_changes_nothing():
    """Dynamic padding is exact (SPEC 4.4)."""
    model = _model("vqa2", "qnli").double().eval()
    for name in ("vqa2", "qnli"):
        batch = random_batch(name, model.config, dtype=torch.float64)
        longer = dataclasses.replace(
            batch,
            **{
                k: torch.nn.functional.pad(getattr(batch, k), (0, 6))
                for k in ("input_ids", "attention_mask", "token_type_ids")
            },
        )
        torch.testing.assert_close(model(batch).scores, model(longer).scores, rtol=1e-11, atol=1e-12)


def test_backbone_is_torchvisions_resnet50_dc5():
    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[False, False, True], norm_layer=FrozenBatchNorm2d)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.bias.normal_(std=0.1)
    ours = Backbone(BackboneConfig())
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert set(state) == set(ours.state_dict())
    ours.load_state_dict(state)
    theirs, ours = theirs.double(), ours.double()
    image = torch.randn(2, 3, 70, 101).double()
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    got = ours(image)
    assert got.shape == (2, 2048, 5, 7)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [14, 26])
@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_backbone_variants(depth, stride, norm):
    config = BackboneConfig(depth=depth, width=8, stride=stride, norm=norm, first_trained_stage=1)
    backbone = Backbone(config)
    out = backbone(torch.randn(1, 3, 96, 65))
    assert out.shape == (1, config.out_channels, -(-96 // stride), -(-65 // stride))
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer1", "layer2", "layer3", "layer4"}


def test_basic_blocks():
    assert Backbone(BackboneConfig(depth=18, stride=32, width=16))(torch.randn(1, 3, 64, 64)).shape == (1, 128, 2, 2)


def test_positions_of_a_fully_padded_column_are_those_of_zero():
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, :, 3:] = True
    positions = sine_positions(mask, 16).unflatten(1, (4, 5))
    assert positions.shape == (1, 4, 5, 16)
    rows = positions[0, :, 4, :8]
    assert torch.equal(rows[:, 0::2], torch.zeros(4, 4))
    assert torch.equal(rows[:, 1::2], torch.ones(4, 4))
    pixel = torch.zeros(1, 64, 80, dtype=torch.bool)
    pixel[:, 33:] = True
    assert feature_mask(pixel, 4, 5)[0, :, 0].tolist() == [False, False, False, True]


def test_losses_on_all_hidden_states():
    base = small_config("vqa2", "sst2")
    model = UniT(dataclasses.replace(base, loss=dataclasses.replace(base.loss, on_all_hidden_states=True)))
    for name in ("vqa2", "sst2"):
        batch = random_batch(name, model.config)
        out = model(batch)
        assert torch.equal(out.scores, out.layer_scores[-1])
        assert set(model.losses(out, batch)) == {f"train/{batch.task}/loss_{i}" for i in range(3)}


def test_without_auxiliary_losses_only_the_last_layer_counts():
    base = small_config("coco")
    model = UniT(dataclasses.replace(base, loss=dataclasses.replace(base.loss, auxiliary=False)))
    batch = random_batch("coco", model.config)
    out = model(batch)
    assert model.match(out, batch).shape == (1, 2, 3)
    assert {k.rsplit("/", 1)[1] for k in model.losses(out, batch)} == {"loss_ce", "loss_bbox", "loss_giou"}


def test_bad_batches_are_named():
    model = _model("coco", "vqa2")
    with pytest.raises(UserError, match="no task 'glue_qnli'.*known"):
        model(random_batch("qnli", small_config("qnli")))
    batch = random_batch("vqa2", model.config)
    with pytest.raises(UserError, match="vqa2: the batch has no image"):
        model(dataclasses.replace(batch, image=None))
    with pytest.raises(UserError, match="vqa2: the batch has no text"):
        model(dataclasses.replace(batch, input_ids=None))


def test_parameter_groups_leave_out_what_is_not_trained():
    model = _model("coco")
    groups = model.parameter_groups(1e-3, 1e-4)
    assert [g["name"] for g in groups] == ["main", "backbone"]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert [g["name"] for g in model.parameter_groups(1e-3, 0.0)] == ["main"]


@pytest.mark.parametrize(("least", "expected"), [(4, [2, 8, 16, 32, 32]), (16, [1, 2, 4, 8, 16])])
def test_group_norm_has_groups_of_at_least_so_many_channels(least, expected):
    config = BackboneConfig(depth=14, width=8, norm="group", group_channels=least, first_trained_stage=0)
    backbone = Backbone(config)
    last = [getattr(backbone, f"layer{i}")[0].bn3 for i in (1, 2, 3, 4)]
    assert [norm.num_groups for norm in (backbone.bn1, *last)] == expected  # of 8, 32, 64, 128 and 256 channels


def test_dropout_places_have_no_limit():
    """Each place has its own seed, the first ones those that there were with a limit."""
    torch.manual_seed(5)
    base = torch.randint(-(2**62), 2**62, (2,))
    torch.manual_seed(5)
    seeds = DropoutSeeds(True, torch.device("cpu"))
    for place in range(1100):
        assert torch.equal(seeds.next(), base + torch.tensor([0, place]))
