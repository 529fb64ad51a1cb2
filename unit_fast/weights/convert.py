"""Weights of other projects <-> ours (SPEC 7): MMF's UniT, DETR, torchvision and Hugging Face BERT.

Every loader returns a ``LoadReport`` that says what was loaded, missing and unexpected. Nothing here executes code
from a file: checkpoints are read by ``checkpoint.load_weights``.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.config import (
    BackboneConfig,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    TaskConfig,
    TextConfig,
)
from unit_fast.errors import UserError, nearest
from unit_fast.model import UniT
from unit_fast.tasks import TASKS, get_task
from unit_fast.weights import checkpoint
from unit_fast.weights.names import (
    TRANSFORMER,
    as_tensor,
    bert_name,
    canonical_mmf,
    current_name,
    is_derived,
    mmf_name,
)

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ MMF models


_MMF_BERT_KEYS = ("hidden_size", "layers", "heads", "intermediate_size", "vocab_size", "max_position")
_MMF_KEYS = (
    *("enc_layers", "dec_layers", "dim_feedforward", "encoder_hidden_dim", "decoder_hidden_dim", "nheads", "dropout"),
    *("share_decoders", "task_embedding_image", "task_embedding_text", "bert", "datasets", "text_cls_only", "backbone"),
    *("dilation_stage4", "frozen_bn_eps", "pre_norm", "residual_in_encoder", "no_object_weight", "cost_class"),
    *("cost_bbox", "cost_giou", "bbox_loss_coef", "giou_loss_coef", "attr_loss_coef", "detection_loss_weight"),
    *("auxiliary_losses", "attribute_outputs", "max_attributes", "ce_normalisation", "use_bcl", "loss_on_all_hs"),
)


def model_config_from_mmf(mmf_config: Mapping) -> ModelConfig:
    """Our configuration of a model described by ``mmf_config``.

    Keys: enc_layers, dec_layers, dim_feedforward, encoder_hidden_dim, decoder_hidden_dim, nheads, share_decoders,
    task_embedding_image, task_embedding_text, dropout, bert {hidden_size, layers, heads, intermediate_size, vocab_size,
    max_position}, datasets {key: {queries, outputs}}, text_cls_only, residual_in_encoder, the loss coefficients,
    backbone, dilation_stage4, frozen_bn_eps. What the key does not say has its published value; a key that is not
    understood is a ``UserError``.
    """
    values = dict(mmf_config)
    published = {"backbone": "resnet50", "pre_norm": False}
    for key, only in published.items():
        if values.pop(key, only) != only:
            raise UserError(f"mmf_config.{key}: {mmf_config[key]!r} is not supported, only {only!r}")
    datasets, bert, cls_only = values.pop("datasets"), dict(values.pop("bert", {})), values.pop("text_cls_only", {})
    dropout, ffn, heads = values.pop("dropout", 0.1), values.pop("dim_feedforward", 2048), values.pop("nheads", 8)
    layer = {"heads": heads, "ffn_width": ffn, "dropout": dropout}
    tasks = {}
    for name, settings in datasets.items():
        task = get_task(name)
        tasks[task.name] = TaskConfig(
            queries=settings.get("queries", task.queries),
            outputs=settings.get("outputs", task.outputs),
            text_length=task.text_length,
            cls_only=cls_only.get(name, task.cls_only),
        )
    text = TextConfig(
        width=bert.pop("hidden_size", 768),
        layers=bert.pop("layers", 12),
        heads=bert.pop("heads", 12),
        ffn_width=bert.pop("intermediate_size", 3072),
        vocab_size=bert.pop("vocab_size", 30522),
        max_positions=bert.pop("max_position", 512),
        dropout=dropout,
        task_embedding=values.pop("task_embedding_text", True),
    )
    loss = LossConfig(
        cost_class=values.pop("cost_class", 1.0),
        cost_bbox=values.pop("cost_bbox", 5.0),
        cost_giou=values.pop("cost_giou", 2.0),
        weight_bbox=values.pop("bbox_loss_coef", 5.0),
        weight_giou=values.pop("giou_loss_coef", 2.0),
        weight_attr=values.pop("attr_loss_coef", 1.0),
        no_object_weight=values.pop("no_object_weight", 0.1),
        detection_loss_weight=values.pop("detection_loss_weight", 1.0),
        auxiliary=values.pop("auxiliary_losses", True),
        ce_normalisation=values.pop("ce_normalisation", "per_image"),
        attribute_outputs=values.pop("attribute_outputs", 401),
        max_attributes=values.pop("max_attributes", 16),
        balanced_class_loss=values.pop("use_bcl", False),
        on_all_hidden_states=values.pop("loss_on_all_hs", False),
    )
    config = ModelConfig(
        backbone=BackboneConfig(
            stride=16 if values.pop("dilation_stage4", True) else 32, norm_eps=values.pop("frozen_bn_eps", 1e-5)
        ),
        encoder=EncoderConfig(
            width=values.pop("encoder_hidden_dim", 256),
            layers=values.pop("enc_layers", 6),
            residual=values.pop("residual_in_encoder", True),
            task_embedding=values.pop("task_embedding_image", True),
            **layer,
        ),
        text=text,
        decoder=DecoderConfig(
            width=values.pop("decoder_hidden_dim", 768),
            layers=values.pop("dec_layers", 6),
            share=values.pop("share_decoders", True),
            classifier_dropout=dropout,
            **layer,
        ),
        loss=loss,
        tasks=tasks,
    )
    for rest, known, where in ((values, _MMF_KEYS, "mmf_config"), (bert, _MMF_BERT_KEYS, "mmf_config.bert")):
        for key in rest:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
    return config


def infer_mmf_config(state: Mapping[str, Tensor]) -> dict:
    """The ``mmf_config`` of an MMF state dict, read off names and shapes. Head counts are the published ones."""
    names = canonical_mmf(state)
    shape = {name: tuple(value.shape) for name, value in names.items()}

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for n in names if (m := re.search(pattern, n))), default=-1)

    try:
        datasets = {}
        for name in names:
            if match := re.fullmatch(r"unit_base_model\.query_embeds\.\w+\.(\w+)\.weight", name):
                task = get_task(match[1])
                head = f"class_embeds.{task.name}.bias" if task.is_detection else None
                head = head or f"classifiers.{task.kind}.{task.name}.1.bias"
                datasets[task.name] = {"queries": shape[name][0], "outputs": shape[head][0]}
        query = next(n for n in names if n.startswith("unit_base_model.query_embeds."))
        layer = "encoder.layers.0.linear1.weight"
        bert = "bert_model.module.embeddings."
        width = shape[f"{bert}word_embeddings.weight"][1]
        ordered = sorted(datasets, key=lambda n: list(TASKS).index(n))
        return {
            "enc_layers": count(r"transformer\.encoder\.layers\.(\d+)\."),
            "dec_layers": count(r"transformer\.decoders?\.(?:\w+\.\w+\.)?layers\.(\d+)\."),
            "dim_feedforward": shape[TRANSFORMER + layer][0],
            "encoder_hidden_dim": shape[TRANSFORMER + layer][1],
            "decoder_hidden_dim": shape[query][1],
            "share_decoders": any(n.startswith(f"{TRANSFORMER}decoder.") for n in names),
            "task_embedding_image": f"{TRANSFORMER}task_embeddings_enc.weight" in names,
            "task_embedding_text": "task_embeddings_lang.weight" in names,
            "bert": {
                "hidden_size": width,
                "layers": count(r"bert_model\.module\.encoder\.layer\.(\d+)\."),
                "heads": max(1, width // 64),
                "intermediate_size": shape["bert_model.module.encoder.layer.0.intermediate.dense.weight"][0],
                "vocab_size": shape[f"{bert}word_embeddings.weight"][0],
                "max_position": shape[f"{bert}position_embeddings.weight"][0],
            },
            "datasets": {name: datasets[name] for name in ordered},
        }
    except (KeyError, StopIteration) as error:
        raise UserError(f"not a UniT state dict of MMF: no tensor {error}; expected names as in SPEC 7.1") from None


def from_mmf(state_dict: Mapping[str, Tensor], mmf_config: Mapping | None = None, **loss_changes) -> UniT:
    """A model with the weights of MMF's UniT.

    state_dict: names and shapes of SPEC 7 (aliases, ``module.`` and ``detr_model.`` prefixes allowed). mmf_config: see
    ``model_config_from_mmf``; read off the state dict if None. loss_changes: fields of ``LossConfig``, e.g.
    ``ce_normalisation="per_process"``. ``UserError`` on missing, unexpected or misshapen tensors.
    """
    state = canonical_mmf(state_dict)
    config = model_config_from_mmf(infer_mmf_config(state) if mmf_config is None else mmf_config)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **loss_changes))
    model = UniT(config)
    report = _copy(model, state, {name: mmf_name(name) for name in model.state_dict()})
    if not report.complete or report.unexpected:
        raise UserError(f"MMF weights do not fit the model: {report}")
    _log.info("MMF weights: %s", report)
    return model


def to_mmf(model: UniT, what: str = "parameters") -> dict[str, Tensor | None]:
    """The model's tensors, or the gradients of its parameters (None where there is none), under MMF's names.

    what: ``parameters`` (buffers included) or ``gradients``. Aliases are not written out (SPEC 7.3).
    """
    if what == "parameters":
        return {mmf_name(name): value for name, value in model.state_dict().items()}
    if what == "gradients":
        return {mmf_name(name): parameter.grad for name, parameter in model.named_parameters()}
    raise UserError(f"to_mmf: what is {what!r}; choose 'parameters' or 'gradients'")


# ------------------------------------------------------------------------------------------ loading with a report


@dataclass
class LoadReport:
    """What happened to the tensors of a file."""

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Left out on request, or of another shape where that is allowed."""

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("skipped", self.skipped)):
            first = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            parts.append(f"{len(names)} {title}{first}")
        return (f"{self.source}: " if self.source else "") + ", ".join(parts)


@torch.no_grad()
def _copy(
    model: torch.nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    source: str = "",
    skip: Iterable[str] = (),
    other_shapes: bool = False,
) -> LoadReport:
    """Copy ``state[names[ours]]`` into ``model`` for every ``ours`` in ``names``.

    ``skip``: prefixes of our names to leave. ``other_shapes``: leave tensors of another shape instead of refusing.
    """
    report, own, skip = LoadReport(source), model.state_dict(), tuple(skip)
    taken = set()
    for name, foreign in names.items():
        if foreign not in state:
            report.missing.append(name)
            continue
        taken.add(foreign)
        value = as_tensor(state[foreign])
        if skip and name.startswith(skip):
            report.skipped.append(name)
        elif value.shape == own[name].shape:
            own[name].copy_(value)
            report.loaded.append(name)
        elif other_shapes:
            report.skipped.append(name)
        else:
            raise UserError(
                f"{source or 'weights'}: {foreign} has shape {tuple(value.shape)}, the model's {name} "
                f"{tuple(own[name].shape)}; give the configuration the file was made with"
            )
    report.unexpected = sorted(set(state) - taken)
    return report


def load_matching(
    model: UniT, state: Mapping[str, Tensor], *, skip: Iterable[str] = (), source: str = ""
) -> LoadReport:
    """COCO initialisation (SPEC 5.2, 7.4): every tensor of ``state`` whose name and shape fit, weights only.

    ``state``: ours or MMF's names. A single-task model's own decoder goes to a shared decoder.
    """
    if any(current_name(key).startswith("unit_base_model.") for key in state):
        state = canonical_mmf(state)
        names = {name: mmf_name(name) for name in model.state_dict()}
    else:
        names = {name: name for name in model.state_dict()}
    if model.config.decoder.share:
        own = f"decoders.{get_task('coco').name}."
        foreign = own if names["decoder.norm.weight"] == "decoder.norm.weight" else (
            f"{TRANSFORMER}decoders.detection.{get_task('coco').name}."
        )  # fmt: skip
        if f"{foreign}norm.weight" in state:
            names |= {n: foreign + n.removeprefix("decoder.") for n in names if n.startswith("decoder.")}
    report = _copy(model, state, names, source=source, skip=skip, other_shapes=True)
    if not report.loaded:
        raise UserError(f"{source or 'weights'}: no tensor fits the model; {report}")
    return report


# ------------------------------------------------------------------------------------------- pretrained parts


def _part(model: UniT, prefix: str) -> list[str]:
    return [name for name in model.state_dict() if name.startswith(prefix)]


def load_detr_backbone(model: UniT, state: Mapping[str, Tensor], source: str = "DETR") -> LoadReport:
    """The 265 ``backbone.0.body.*`` tensors of a DETR checkpoint (SPEC 7.4, rule 4); the rest is left."""
    state = state.get("model", state) if isinstance(state.get("model"), Mapping) else state
    state = {n: v for n, v in state.items() if n.startswith("backbone.0.body.") and not is_derived(n)}
    names = {n: f"backbone.0.body.{n.removeprefix('backbone.')}" for n in _part(model, "backbone.")}
    return _require(_copy(model, state, names, source=source))


def load_torchvision_backbone(model: UniT, state: Mapping[str, Tensor], source: str = "torchvision") -> LoadReport:
    """torchvision's ResNet weights; ``fc.*`` and batch counts are dropped."""
    state = {n: v for n, v in state.items() if not n.startswith("fc.") and not is_derived(n)}
    names = {n: n.removeprefix("backbone.") for n in _part(model, "backbone.")}
    return _require(_copy(model, state, names, source=source))


def load_bert(model: UniT, state: Mapping[str, Tensor], source: str = "BERT") -> LoadReport:
    """Hugging Face BERT weights, with or without ``bert.`` prefix, old ``gamma``/``beta`` names, pooler optional."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith("cls.") and not is_derived(name):
            renamed[name] = value
    ours = [n for n in _part(model, "text_encoder.") if not n.startswith("text_encoder.task_embedding.")]
    names = {n: bert_name(n.removeprefix("text_encoder.")) for n in ours}
    report = _copy(model, renamed, names, source=source)
    report.missing = [n for n in report.missing if not n.startswith("text_encoder.pooler.")]
    return _require(report)


def _require(report: LoadReport) -> LoadReport:
    if not report.complete:
        raise UserError(f"the file lacks tensors of the model: {report}")
    return report


_PRETRAINED = (
    ("backbone", "detr-r50-dc5-f0fb7ef5.pth", "DETR's R50-DC5 checkpoint", load_detr_backbone),
    ("backbone", "resnet50*.pth", "torchvision's ResNet-50 ImageNet weights", load_torchvision_backbone),
    ("text encoder", "bert-base-uncased/model.safetensors", "Hugging Face's bert-base-uncased", load_bert),
)


def load_pretrained(
    model: UniT, folder: str | Path, *, require: bool = False, parts: Iterable[str] = ("backbone", "text encoder")
) -> dict[str, str]:
    """Load the backbone (DETR's, else torchvision's) and BERT, or those of them in ``parts``, from ``folder``.

    Returns part -> what it starts from, for the run's config. A missing file leaves the part at its random initial
    values with one warning that names file and source; ``require`` makes it a ``UserError``.
    """
    folder, found, parts = Path(folder), {}, set(parts)
    for part, pattern, _, load in _PRETRAINED:
        if part not in parts:
            continue
        paths = sorted(folder.glob(pattern)) if part not in found else []
        if paths:
            report = load(model, checkpoint.load_weights(paths[0]), source=str(paths[0]))
            _log.info("%s: %s", part, report)
            found[part] = str(paths[0])
    for part in dict.fromkeys(p for p, *_ in _PRETRAINED):
        if part in found or part not in parts:
            continue
        wanted = " or ".join(f"{folder / pattern} ({source})" for p, pattern, source, _ in _PRETRAINED if p == part)
        if require:
            raise UserError(f"{part}: no pretrained weights; put {wanted} there, or drop --require-weights")
        _log.warning("%s starts from random weights: there is no %s", part, wanted)
        found[part] = "random"
    return found
