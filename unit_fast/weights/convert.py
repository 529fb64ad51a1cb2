"""Whole models of MMF's UniT <-> ours (SPEC 7): configuration and weights."""

import dataclasses
import logging
import re
from collections.abc import Mapping

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
from unit_fast.weights.loading import copy_tensors
from unit_fast.weights.names import TRANSFORMER, canonical_mmf, mmf_name

_log = logging.getLogger(__name__)

_SUPPORTED = {"backbone": "resnet50", "pre_norm": False}
"""Keys of ``mmf_config`` that can have one value only."""

_FIELDS = {
    "enc_layers": ("encoder.layers",),
    "dec_layers": ("decoder.layers",),
    "dim_feedforward": ("encoder.ffn_width", "decoder.ffn_width"),
    "encoder_hidden_dim": ("encoder.width",),
    "decoder_hidden_dim": ("decoder.width",),
    "nheads": ("encoder.heads", "decoder.heads"),
    "dropout": ("encoder.dropout", "text.dropout", "decoder.dropout", "decoder.classifier_dropout"),
    "share_decoders": ("decoder.share",),
    "task_embedding_image": ("encoder.task_embedding",),
    "task_embedding_text": ("text.task_embedding",),
    "bert": (),
    "datasets": (),
    "text_cls_only": (),
    "backbone": (),
    "dilation_stage4": (),
    "frozen_bn_eps": ("backbone.norm_eps",),
    "pre_norm": (),
    "residual_in_encoder": ("encoder.residual",),
    "no_object_weight": ("loss.no_object_weight",),
    "cost_class": ("loss.cost_class",),
    "cost_bbox": ("loss.cost_bbox",),
    "cost_giou": ("loss.cost_giou",),
    "bbox_loss_coef": ("loss.weight_bbox",),
    "giou_loss_coef": ("loss.weight_giou",),
    "attr_loss_coef": ("loss.weight_attr",),
    "detection_loss_weight": ("loss.detection_loss_weight",),
    "auxiliary_losses": ("loss.auxiliary",),
    "attribute_outputs": ("loss.attribute_outputs",),
    "max_attributes": ("loss.max_attributes",),
    "ce_normalisation": ("loss.ce_normalisation",),
    "use_bcl": ("loss.balanced_class_loss",),
    "loss_on_all_hs": ("loss.on_all_hidden_states",),
}
"""Key of ``mmf_config`` -> the fields of ``ModelConfig`` that it sets, whose defaults are the published values. Keys
without fields are read apart."""

_BERT_FIELDS = {
    "hidden_size": "width", "layers": "layers", "heads": "heads", "intermediate_size": "ffn_width",
    "vocab_size": "vocab_size", "max_position": "max_positions",
}  # fmt: skip
"""Key of ``mmf_config["bert"]`` -> field of ``TextConfig``."""


def model_config_from_mmf(mmf_config: Mapping) -> ModelConfig:
    """Our configuration of a model described by ``mmf_config``.

    Keys: those of ``_FIELDS``; ``bert`` {hidden_size, layers, heads, intermediate_size, vocab_size, max_position};
    ``datasets`` {key: {queries, outputs}}; ``text_cls_only`` {key: bool}; ``dilation_stage4``; ``backbone`` and
    ``pre_norm``, whose published values alone are supported. What is not given has its published value; a key that is
    not understood is a ``UserError``.
    """
    values = dict(mmf_config)
    for key, only in _SUPPORTED.items():
        if values.pop(key, only) != only:
            raise UserError(f"mmf_config.{key}: {mmf_config[key]!r} is not supported, only {only!r}")
    datasets, bert, cls_only = values.pop("datasets"), values.pop("bert", {}), values.pop("text_cls_only", {})
    tasks = {}
    for name, settings in datasets.items():
        task = get_task(name)
        tasks[task.name] = TaskConfig(
            queries=settings.get("queries", task.queries),
            outputs=settings.get("outputs", task.outputs),
            text_length=task.text_length,
            cls_only=cls_only.get(name, task.cls_only),
        )
    parts = {"backbone": {}, "encoder": {}, "text": {}, "decoder": {}, "loss": {}}
    parts["backbone"]["stride"] = 16 if values.pop("dilation_stage4", True) else 32
    for key, value in values.items():
        if key not in _FIELDS:
            raise UserError(f"mmf_config: unknown key {key!r}; {nearest(key, _FIELDS)}")
        for place in _FIELDS[key]:
            part, _, field = place.partition(".")
            parts[part][field] = value
    for key, value in bert.items():
        if key not in _BERT_FIELDS:
            raise UserError(f"mmf_config.bert: unknown key {key!r}; {nearest(key, _BERT_FIELDS)}")
        parts["text"][_BERT_FIELDS[key]] = value
    return ModelConfig(
        backbone=BackboneConfig(**parts["backbone"]),
        encoder=EncoderConfig(**parts["encoder"]),
        text=TextConfig(**parts["text"]),
        decoder=DecoderConfig(**parts["decoder"]),
        loss=LossConfig(**parts["loss"]),
        tasks=tasks,
    )


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
    report = copy_tensors(model, state, {name: mmf_name(name) for name in model.state_dict()})
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
