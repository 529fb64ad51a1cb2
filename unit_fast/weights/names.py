"""Names of tensors: ours -> MMF's UniT and Hugging Face's BERT, and MMF state dicts without aliases (SPEC 7)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unit_fast.errors import UserError
from unit_fast.tasks import get_task

_BERT = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_CLASSIFIER = {"dense": "0.dense", "norm": "0.LayerNorm", "out": "1"}
TRANSFORMER = "unit_base_model.transformer."


def bert_name(name: str) -> str:
    """Hugging Face's name (inside ``BertModel``) of our text-encoder tensor ``name``."""
    if match := re.fullmatch(r"layers\.(\d+)\.(\w+)\.(weight|bias)", name):
        return f"encoder.layer.{match[1]}.{_BERT_LAYER[match[2]]}.{match[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_BERT[module]}.{kind}"


def mmf_name(name: str) -> str:
    """MMF's name, after alias collapsing (SPEC 7.3), of our tensor ``name``."""
    head, _, rest = name.partition(".")
    dataset, _, tail = rest.partition(".")
    if head == "backbone":
        return f"unit_base_model.backbone.0.body.{rest}"
    if name.startswith("image_encoder.task_embedding."):
        return f"{TRANSFORMER}task_embeddings_enc.weight"
    if head == "image_encoder":
        return f"{TRANSFORMER}encoder.{rest}"
    if head in ("enc2dec_proj", "pos_embed_proj", "decoder"):
        return f"{TRANSFORMER}{name}"
    if head == "decoders":
        return f"{TRANSFORMER}decoders.{get_task(dataset).kind}.{dataset}.{tail}"
    if head == "input_proj":
        return f"unit_base_model.{name}"
    if head == "query_embeds":
        return f"unit_base_model.query_embeds.{get_task(dataset).kind}.{rest}"
    if name.startswith("text_encoder.task_embedding."):
        return "task_embeddings_lang.weight"
    if head == "text_encoder":
        return f"bert_model.module.{bert_name(rest)}"
    if head == "classifiers":
        module, _, kind = tail.partition(".")
        return f"classifiers.{get_task(dataset).kind}.{dataset}.{_CLASSIFIER[module]}.{kind}"
    if head == "attribute_heads":
        return f"det_losses.{dataset}.attribute_head.{tail}"
    return name  # bert_projection, bert_pos_projection, class_embeds, bbox_embeds


def is_derived(name: str) -> bool:
    """Tensors of a foreign file that we compute ourselves: position ids, class weights, batch counts."""
    return name.endswith((".position_ids", ".empty_weight", ".num_batches_tracked"))


def canonical_mmf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An MMF state dict without prefixes, aliases and derived tensors (SPEC 7.4, rules 1 and 2).

    ``UserError`` when two aliases of one tensor differ.
    """
    state = state.get("model", state) if isinstance(state.get("model"), Mapping) else state
    names = {key: current_name(key) for key in state}
    shared = any(name.startswith(f"{TRANSFORMER}decoder.") for name in names.values())
    out: dict[str, Tensor] = {}
    for key, name in names.items():
        value = state[key]
        if name.startswith("bert_model.embeddings."):
            name = "bert_model.module." + name.removeprefix("bert_model.")
        if shared:
            name = re.sub(r"^(unit_base_model\.transformer\.)decoders\.\w+\.\w+\.", r"\1decoder.", name)
        if is_derived(name):
            continue
        if name in out and out[name] is not value and not torch.equal(as_tensor(out[name]), as_tensor(value)):
            raise UserError(f"{key}: differs from another copy of the same tensor; the file is not a shared decoder's")
        out[name] = value
    return out


def current_name(name: str) -> str:
    """``name`` without a leading ``module.`` and with the present name of the base model."""
    name = name.removeprefix("module.")
    return "unit_base_model." + name.removeprefix("detr_model.") if name.startswith("detr_model.") else name


def as_tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)
