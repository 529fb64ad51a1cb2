"""Other projects' files under our names: DETR (facebookresearch's and Hugging Face's), ResNets, BERT.

What a file is follows from the names of whole parts, never from single tensors: a file that shares a few names with
ours by accident has no part of ours.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unit_fast.model import UniT
from unit_fast.weights.names import as_tensor, bert_name, is_derived

_RESNET_MARK = "layer1.0.conv1.weight"
_HF_RESNET_MARK = "encoder.stages.0.layers.0.layer.0.convolution.weight"
_DETR_MARK = "transformer.encoder.layers.0.linear1.weight"
_HF_DETR_MARK = "query_position_embeddings.weight"
_BERT_MARK = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Foreign:
    """A file of another project, as far as its names are known."""

    kind: str
    """Whose names they are."""
    tensors: dict[str, Tensor]
    """By our names. A decoder and its heads are ``decoder.*``, ``query_embed.*``, ``class_embed.*``, ``bbox_embed.*``,
    without a data set."""
    unknown: list[str]
    """Names that no part of ours has."""


def recognise(state: Mapping[str, Tensor]) -> Foreign | None:
    """``state`` under our names; None where it has no part that we know."""
    state = {name: value for name, value in state.items() if not is_derived(name)}
    names, kinds = {}, []
    if (start := _start(state, _DETR_MARK)) is not None:
        names |= _facebook_names(state, start)
        kinds.append("DETR's")
    elif (start := _start(state, _HF_DETR_MARK)) is not None:
        state, names = _hugging_face(state, start)
        kinds.append("Hugging Face DETR's")
    elif (start := _start(state, _BERT_MARK)) is not None and _start(state, _RESNET_MARK) is None:
        return _bert(state, start)
    backbone = _backbone_names(state)
    if backbone and not kinds:
        kinds.append("a ResNet's")
    names |= backbone
    if not names:
        return None
    tensors = {ours: as_tensor(state[theirs]) for theirs, ours in names.items()}
    return Foreign(kinds[0], tensors, sorted(set(state) - set(names)))


def _start(state: Iterable[str], mark: str) -> str | None:
    """What stands before ``mark`` in the first name that ends in it."""
    return next((n.removesuffix(mark) for n in state if n == mark or n.endswith(f".{mark}")), None)


def _backbone_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Their name -> ours of a ResNet in ``state``, wherever it is."""
    if (start := _start(state, _RESNET_MARK)) is not None:
        pattern = re.compile(r"(conv1|bn1|layer[1-4])\..+")
        rest = {n: n.removeprefix(start) for n in state if n.startswith(start)}
        return {n: f"backbone.{r}" for n, r in rest.items() if pattern.fullmatch(r)}
    if (start := _start(state, _HF_RESNET_MARK)) is not None:
        rest = {n: n.removeprefix(start) for n in state if n.startswith(start)}
        return {n: ours for n, r in rest.items() if (ours := _hugging_face_resnet(r))}
    return {}


def _hugging_face_resnet(name: str) -> str | None:
    kinds = {"convolution": "conv", "normalization": "bn"}
    if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"backbone.{kinds[match[1]]}1.{match[2]}"
    block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
    if match := re.fullmatch(block + r"layer\.(\d+)\.(convolution|normalization)\.(\w+)", name):
        stage, number, place, kind, what = match.groups()
        return f"backbone.layer{int(stage) + 1}.{number}.{kinds[kind]}{int(place) + 1}.{what}"
    if match := re.fullmatch(block + r"shortcut\.(convolution|normalization)\.(\w+)", name):
        stage, number, kind, what = match.groups()
        return f"backbone.layer{int(stage) + 1}.{number}.downsample.{0 if kind == 'convolution' else 1}.{what}"
    return None


_PREFIXES = {
    "transformer.encoder.layers.": "image_encoder.layers.",
    "transformer.decoder.": "decoder.",
    "input_proj.": "input_proj.",
    "query_embed.": "query_embed.",
    "class_embed.": "class_embed.",
    "bbox_embed.": "bbox_embed.",
}
"""Beginnings of DETR's names -> of ours."""


def _facebook_names(state: Iterable[str], start: str) -> dict[str, str]:
    names = {}
    for name in state:
        for theirs, ours in _PREFIXES.items():
            if name.startswith(start + theirs):
                names[name] = ours + name.removeprefix(start + theirs)
    return names


_HF_MODULES = {
    "input_projection": "input_proj",
    "query_position_embeddings": "query_embed",
    "decoder.layernorm": "decoder.norm",
}
_HF_NORMS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"},
}
_HF_HEADS = {"class_labels_classifier.": "class_embed.", "bbox_predictor.": "bbox_embed."}


def _hugging_face(state: Mapping[str, Tensor], start: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``state`` with the three projections of every attention packed into one, and its names -> ours. Names as of
    transformers 4 (``out_proj``, ``fc1``) and of transformers 5 (``o_proj``, ``mlp.fc1``)."""
    names, packed, out = {}, {}, {}
    outer = start.removesuffix("model.")  # the heads stand beside the model
    for name, value in state.items():
        rest = name.removeprefix(start)
        module, _, kind = rest.rpartition(".")
        if match := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", module if name.startswith(start) else ""):
            half, number, inner = match.groups()
            layer = f"{'image_encoder' if half == 'encoder' else 'decoder'}.layers.{number}"
            if attention := re.fullmatch(r"(self_attn|encoder_attn)\.([qkv])_proj", inner):
                ours = "self_attn" if attention[1] == "self_attn" else "multihead_attn"
                packed.setdefault((f"{layer}.{ours}.in_proj_{kind}", name[: -len(inner + kind) - 1]), {})[
                    attention[2]
                ] = name
                continue
            inner = re.sub(r"(self_attn|encoder_attn)\.(?:out|o)_proj", r"\1.out_proj", inner)
            inner = inner.replace("encoder_attn.out_proj", "multihead_attn.out_proj").removeprefix("mlp.")
            inner = {"fc1": "linear1", "fc2": "linear2", **_HF_NORMS[half]}.get(inner, inner)
            names[name] = f"{layer}.{inner}.{kind}"
        elif name.startswith(start) and module in _HF_MODULES:
            names[name] = f"{_HF_MODULES[module]}.{kind}"
        else:
            for theirs, ours in _HF_HEADS.items():
                if name.startswith(outer + theirs):
                    names[name] = ours + name.removeprefix(outer + theirs)
        out[name] = value
    for (ours, _), parts in packed.items():
        if sorted(parts) == ["k", "q", "v"]:
            joined = torch.cat([as_tensor(state[parts[key]]) for key in "qkv"])
            out[ours], names[ours] = joined, ours
        else:
            out |= {name: state[name] for name in parts.values()}
    return out, names


def _bert(state: Mapping[str, Tensor], start: str) -> Foreign:
    renamed = {}
    for name, value in state.items():
        if name.startswith(start):
            new = name.removeprefix(start).replace("LayerNorm.gamma", "LayerNorm.weight")
            renamed[new.replace("LayerNorm.beta", "LayerNorm.bias")] = as_tensor(value)
    names = {theirs: ours for theirs in renamed if (ours := _ours_of_bert(theirs))}
    tensors = {f"text_encoder.{ours}": renamed[theirs] for theirs, ours in names.items()}
    unknown = [n for n in renamed if n not in names] + [n for n in state if not n.startswith(start)]
    return Foreign("BERT's", tensors, sorted(unknown))


_OURS_OF_BERT_LAYER = {
    bert_name(f"layers.0.{ours}.weight").removeprefix("encoder.layer.0.").removesuffix(".weight"): ours
    for ours in (
        "query", "key", "value", "attention_output", "attention_norm", "intermediate", "output", "output_norm"
    )
}  # fmt: skip
_OURS_OF_BERT = {
    bert_name(f"{ours}.weight").removesuffix(".weight"): ours
    for ours in ("word_embeddings", "position_embeddings", "token_type_embeddings", "embedding_norm", "pooler")
}


def _ours_of_bert(name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module):
        ours = _OURS_OF_BERT_LAYER.get(match[2])
        return f"layers.{match[1]}.{ours}.{kind}" if ours else None
    ours = _OURS_OF_BERT.get(module)
    return f"{ours}.{kind}" if ours else None


# ------------------------------------------------------------------------------------------------- parts of a model


@dataclass(frozen=True)
class Part:
    """A part of the model that a foreign file fills as a whole or not at all."""

    title: str
    names: dict[str, str]
    """Name in the model -> in ``Foreign.tensors``."""
    optional: tuple[str, ...] = ()
    """Beginnings of names that the file need not have."""
    needs: str = ""
    """Title of the part without which this one means nothing."""


def parts_of(model: UniT) -> list[Part]:
    """The parts of ``model`` that foreign files have, in an order in which a part follows those it needs.

    DETR's decoder and heads go to COCO, else to the first detection task.
    """
    own = list(model.state_dict())

    def part(title: str, ours: str, theirs: str, **settings) -> Part:
        named = {n: theirs + n.removeprefix(ours) for n in own if n.startswith(ours) and ".task_embedding." not in n}
        return Part(title, named, **settings)

    found = [
        part("backbone", "backbone.", "backbone."),
        part("input projection", "input_proj.", "input_proj.", needs="backbone"),
        part("image encoder", "image_encoder.layers.", "image_encoder.layers.", needs="input projection"),
        part("text encoder", "text_encoder.", "text_encoder.", optional=("text_encoder.pooler.",)),
    ]
    detection = [name for name, task in model.tasks.items() if task.is_detection]
    if detection:
        task = "detection_coco" if "detection_coco" in detection else detection[0]
        decoder = "decoder." if model.config.decoder.share else f"decoders.{task}."
        found += [
            part("decoder", decoder, "decoder.", needs="image encoder"),
            part("queries", f"query_embeds.{task}.", "query_embed.", needs="decoder"),
            part("box head", f"bbox_embeds.{task}.", "bbox_embed.", needs="decoder"),
            part("class head", f"class_embeds.{task}.", "class_embed.", needs="decoder"),
        ]
    return [p for p in found if p.names]


ABSENT = "not in the file"


def why_not(part: Part, own: Mapping[str, Tensor], foreign: Foreign) -> str | None:
    """Why ``part`` does not fit into the model whose tensors are ``own``; None where it does."""
    have = foreign.tensors
    starts = {name.split(".")[0] + "." for name in part.names.values()}
    theirs = {name for name in have if name.startswith(tuple(starts))}
    if not theirs:
        return ABSENT
    for ours, name in part.names.items():
        if name in have and have[name].shape != own[ours].shape:
            return f"{name} is {list(have[name].shape)}, the model's {list(own[ours].shape)}"
    lacking = [n for ours, n in part.names.items() if n not in have and not ours.startswith(part.optional or ("\0",))]
    if lacking:
        return f"the file lacks {len(lacking)} of {len(part.names)} tensors, {lacking[0]} first"
    if more := sorted(theirs - set(part.names.values())):
        return f"the file has {len(more)} tensors more, {more[0]} first"
    return None
