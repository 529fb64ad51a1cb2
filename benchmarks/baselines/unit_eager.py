"""UniT in the authors' formulation and the field's usual eager style: what our step is measured against.

Independent of ``unit_fast``: torchvision's ResNet-50-DC5 with ``FrozenBatchNorm2d``, sequence-first
``nn.MultiheadAttention`` that also averages its weights, keys and values projected anew in every decoder layer,
Hugging Face's eager ``BertModel``, dropout by ``F.dropout``; criterion and optimiser in ``unit_eager_training.py``.
Parameter names are those of the authors' state dict, aliases collapsed, so that their weights load by name.

Shapes: B batch, H W pixels, h w feature cells, S tokens, T text tokens, Q queries, C encoder width, D decoder width,
L decoder layers, K classes.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.baselines.unit_eager_training import DetectionLoss


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One data set of the model."""

    kind: str
    """``detection``, ``vl`` or ``glue``."""
    index: int
    """Row of the task tables."""
    queries: int
    outputs: int
    cls_only: bool = False
    """Only ``[CLS]`` reaches the decoder."""


@dataclass(frozen=True, kw_only=True)
class EagerConfig:
    """The sizes of the model; the defaults are the published ones."""

    tasks: dict[str, TaskSpec]
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 2048
    encoder_width: int = 256
    decoder_width: int = 768
    heads: int = 8
    share_decoders: bool = True
    task_token_image: bool = True
    task_token_text: bool = True
    dropout: float = 0.1
    bert: dict = field(default_factory=dict)
    """Arguments of ``transformers.BertConfig``."""
    norm_eps: float = 1e-5
    attributes: int = 401
    no_object_weight: float = 0.1
    fused_attention: bool = False
    """``scaled_dot_product_attention`` everywhere, no averaged weights: the usual library choice, not the authors'."""

    @classmethod
    def from_mmf(cls, config: dict, **changes) -> "EagerConfig":
        """From a model configuration in the keys of the parity files' ``config``; ``changes`` override fields."""
        bert = config["bert"]
        tasks = {
            name: TaskSpec(
                kind=value["task_type"],
                index=value["task_index"],
                queries=value["queries"],
                outputs=value["outputs"],
                cls_only=config["text_cls_only"].get(name, False),
            )
            for name, value in config["datasets"].items()
        }
        published = cls(
            tasks=tasks,
            encoder_layers=config["enc_layers"],
            decoder_layers=config["dec_layers"],
            ffn=config["dim_feedforward"],
            encoder_width=config["encoder_hidden_dim"],
            decoder_width=config["decoder_hidden_dim"],
            heads=config["nheads"],
            share_decoders=config["share_decoders"],
            task_token_image=config["task_embedding_image"],
            task_token_text=config["task_embedding_text"],
            dropout=config["dropout"],
            bert={
                "vocab_size": bert["vocab_size"],
                "hidden_size": bert["hidden_size"],
                "num_hidden_layers": bert["layers"],
                "num_attention_heads": bert["heads"],
                "intermediate_size": bert["intermediate_size"],
                "max_position_embeddings": bert["max_position"],
            },
            norm_eps=config["frozen_bn_eps"],
            attributes=config["attribute_outputs"],
            no_object_weight=config["no_object_weight"],
        )
        return dataclasses.replace(published, **changes)


def put(table: nn.ModuleDict, kind: str, name: str, module: nn.Module) -> None:
    """table[kind][name] = module, the two levels of names of the authors' state dict."""
    if kind not in table:
        table[kind] = nn.ModuleDict()
    table[kind][name] = module


# ---------------------------------------------------------------------------------------------------- image side


class Backbone(nn.Module):
    """ResNet-50 with a dilated last stage and constant batch norms; [B,3,H,W] -> [B,2048,ceil(H/16),ceil(W/16)]."""

    def __init__(self, eps: float):
        super().__init__()
        net = resnet50(
            weights=None,
            replace_stride_with_dilation=[False, False, True],
            norm_layer=lambda channels: FrozenBatchNorm2d(channels, eps=eps),
        )
        children = [(name, child) for name, child in net.named_children() if name not in ("avgpool", "fc")]
        self.body = nn.Module()
        for name, child in children:
            self.body.add_module(name, child)
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.body.children():
            x = child(x)
        return x


class SinePositions(nn.Module):
    """DETR's sine embedding of the non-padded cells, float32; mask [B,h,w] -> [B,2 features,h,w]."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, mask: Tensor) -> Tensor:
        inside = ~mask
        rows, columns = inside.cumsum(1, dtype=torch.float32), inside.cumsum(2, dtype=torch.float32)
        rows = rows / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
        columns = columns / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)
        k = torch.arange(self.features, dtype=torch.float32, device=mask.device)
        period = 10000 ** (2 * torch.div(k, 2, rounding_mode="floor") / self.features)
        halves = []
        for place in (rows, columns):
            angle = place[..., None] / period
            halves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
        return torch.cat(halves, dim=3).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float, averaged: bool):
        super().__init__()
        self.averaged = averaged  # nn.MultiheadAttention's default: also return the weights averaged over the heads
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = dropout

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        query = x + positions
        attended = self.self_attn(query, query, value=x, key_padding_mask=mask, need_weights=self.averaged)[0]
        x = self.norm1(x + self.drop(attended))
        inner = self.linear2(self.drop(F.relu(self.linear1(x))))
        return self.norm2(x + self.drop(inner))


class DecoderLayer(EncoderLayer):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float, averaged: bool):
        super().__init__(width, heads, ffn, dropout, averaged)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, positions: Tensor, queries: Tensor) -> Tensor:
        query = x + queries
        x = self.norm1(x + self.drop(self.self_attn(query, query, value=x, need_weights=self.averaged)[0]))
        attended = self.multihead_attn(
            x + queries, memory + positions, value=memory, key_padding_mask=mask, need_weights=self.averaged
        )[0]
        x = self.norm2(x + self.drop(attended))
        inner = self.linear2(self.drop(F.relu(self.linear1(x))))
        return self.norm3(x + self.drop(inner))


class Encoder(nn.Module):
    def __init__(self, layer: EncoderLayer, count: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, positions)
        return x


class Decoder(nn.Module):
    """Target zero, queries as positions; returns the normalised output of every layer [layers,B,Q,D]."""

    def __init__(self, layer: DecoderLayer, count: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        queries = queries[:, None, :].repeat(1, memory.shape[1], 1)
        x = torch.zeros_like(queries)
        states = []
        for layer in self.layers:
            x = layer(x, memory, mask, positions, queries)
            states.append(self.norm(x))
        return torch.stack(states).transpose(1, 2)


class Transformer(nn.Module):
    """Image encoder, projections to decoder width, decoders, image task table."""

    def __init__(self, config: EagerConfig):
        super().__init__()
        c, width_in, width = config, config.encoder_width, config.decoder_width
        layer = (c.heads, c.ffn, c.dropout, not c.fused_attention)
        self.encoder = Encoder(EncoderLayer(width_in, *layer), c.encoder_layers)
        if width_in != width:
            self.enc2dec_proj, self.pos_embed_proj = nn.Linear(width_in, width), nn.Linear(width_in, width)
        else:
            self.enc2dec_proj, self.pos_embed_proj = nn.Identity(), nn.Identity()
        if c.task_token_image:
            self.task_embeddings_enc = nn.Embedding(256, width_in)

        def decoder():
            return Decoder(DecoderLayer(width, *layer), c.decoder_layers, width)

        if c.share_decoders:
            self.decoder = decoder()
        else:
            self.decoders = nn.ModuleDict()
            for name, task in c.tasks.items():
                put(self.decoders, task.kind, name, decoder())
        self.share_decoders, self.task_token = c.share_decoders, c.task_token_image

    def encode(self, x: Tensor, mask: Tensor, positions: Tensor, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, positions [B,C,h,w], mask [B,h,w] -> memory [S,B,D], positions [S,B,D], mask [B,S]."""
        tokens = x.flatten(2).permute(2, 0, 1)
        positions = positions.flatten(2).permute(2, 0, 1)
        mask = mask.flatten(1)
        if self.task_token:
            index = torch.full((tokens.shape[1],), task, dtype=torch.long, device=x.device)
            token = self.task_embeddings_enc(index)[None]
            encoded = self.encoder(
                torch.cat([token, tokens]),
                F.pad(mask, (1, 0), value=False),
                torch.cat([torch.zeros_like(positions[:1]), positions]),
            )[1:]
        else:
            encoded = self.encoder(tokens, mask, positions)
        return self.enc2dec_proj(tokens + encoded), self.pos_embed_proj(positions), mask

    def decoder_of(self, name: str, kind: str) -> Decoder:
        return self.decoder if self.share_decoders else self.decoders[kind][name]


class BaseModel(nn.Module):
    def __init__(self, config: EagerConfig):
        super().__init__()
        self.backbone = nn.ModuleList([Backbone(config.norm_eps), SinePositions(config.encoder_width // 2)])
        self.input_proj = nn.Conv2d(2048, config.encoder_width, 1)
        self.transformer = Transformer(config)
        self.query_embeds = nn.ModuleDict()
        for name, task in config.tasks.items():
            table = nn.Embedding(task.queries, config.decoder_width)
            put(self.query_embeds, task.kind, name, table)


# --------------------------------------------------------------------------------------------------------- heads


class BoxHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).sigmoid()


class ClassifierTransform(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


# ------------------------------------------------------------------------------------------------------ whole model


class Bert(nn.Module):
    """Holds the text encoder under the authors' name ``bert_model.module``."""

    def __init__(self, arguments: dict, dropout: float, fused_attention: bool):
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **arguments)
        config._attn_implementation = "sdpa" if fused_attention else "eager"
        self.module = BertModel(config)


class UniTEager(nn.Module):
    """The model. ``forward`` gives hidden states, ``heads`` the task's outputs, ``losses`` the weighted terms."""

    def __init__(self, config: EagerConfig):
        super().__init__()
        self.config, self.dropout, width = config, config.dropout, config.decoder_width
        self.unit_base_model = BaseModel(config)
        self.bert_model = Bert(config.bert, config.dropout, config.fused_attention)
        hidden = self.bert_model.module.config.hidden_size
        self.bert_projection, self.bert_pos_projection = nn.Linear(hidden, width), nn.Linear(hidden, width)
        if config.task_token_text:
            self.task_embeddings_lang = nn.Embedding(256, hidden)
        self.classifiers = nn.ModuleDict()
        self.class_embeds, self.bbox_embeds, self.det_losses = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, task in config.tasks.items():
            if task.kind == "detection":
                self.class_embeds[name] = nn.Linear(width, task.outputs)
                self.bbox_embeds[name] = BoxHead(width)
                attributes = config.attributes if name == "detection_visual_genome" else 0
                self.det_losses[name] = DetectionLoss(task.outputs, config.no_object_weight, width, attributes)
            else:
                head = nn.Sequential(ClassifierTransform(width), nn.Linear(width, task.outputs))
                put(self.classifiers, task.kind, name, head)

    def encode_text(self, inputs: dict, task: TaskSpec) -> tuple[Tensor, Tensor, Tensor]:
        """Text memory [T,B,D], its positions [T,B,D], its mask [B,T] (True = ignore)."""
        ids, mask = inputs["ids"], inputs["input_mask"]
        bert = self.bert_model.module
        x = bert.embeddings(input_ids=ids, token_type_ids=inputs["segment_ids"])
        seen = mask
        if self.config.task_token_text:
            index = torch.full((len(ids), 1), task.index, dtype=torch.long, device=ids.device)
            x = torch.cat([self.task_embeddings_lang(index), x], dim=1)
            seen = F.pad(mask, (1, 0), value=1)
        additive = (1.0 - seen[:, None, None, :].to(x.dtype)) * -10000.0
        x = bert.encoder(x, attention_mask=additive).last_hidden_state
        if self.config.task_token_text:
            x = x[:, 1:]
        x = self.bert_projection(x)
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        positions = self.bert_pos_projection(bert.embeddings.position_embeddings(places))
        ignore = mask != 1
        if task.cls_only:
            x, positions, ignore = x[:, :1], positions[:, :1], ignore[:, :1]
        return x.transpose(0, 1), positions.transpose(0, 1), ignore

    def forward(self, name: str, inputs: dict, stages: dict | None = None) -> Tensor:
        """Hidden states [L,B,Q,D] of data set ``name``.

        inputs: image [B,3,H,W] and mask [B,H,W] bool (True = padding); ids, input_mask, segment_ids [B,T] int64; as far
        as the data set has them. ``stages`` receives intermediate results.
        """
        task, base = self.config.tasks[name], self.unit_base_model
        memory, positions, masks = [], [], []
        if task.kind != "glue":
            features = base.backbone[0](inputs["image"])
            small = F.interpolate(inputs["mask"][None].float(), size=features.shape[-2:])[0].to(torch.bool)
            sine = base.backbone[1](small).to(features.dtype)
            image = base.transformer.encode(base.input_proj(features), small, sine, task.index)
            for whole, part in zip((memory, positions, masks), image, strict=True):
                whole.append(part)
            if stages is not None:
                stages.update(features=features, sine=sine)
        if task.kind != "detection":
            for whole, part in zip((memory, positions, masks), self.encode_text(inputs, task), strict=True):
                whole.append(part)
        memory, positions, mask = torch.cat(memory), torch.cat(positions), torch.cat(masks, dim=1)
        if stages is not None:
            stages.update(memory=memory.transpose(0, 1), positions=positions.transpose(0, 1), memory_mask=mask)
        decoder = base.transformer.decoder_of(name, task.kind)
        return decoder(base.query_embeds[task.kind][name].weight, memory, mask, positions)

    def heads(self, name: str, hidden: Tensor) -> dict[str, Tensor]:
        """Detection: logits [L,B,Q,K], boxes [L,B,Q,4]. Otherwise: scores [B,K] of the last layer's first query."""
        task = self.config.tasks[name]
        if task.kind == "detection":
            return {"logits": self.class_embeds[name](hidden), "boxes": self.bbox_embeds[name](hidden)}
        pooled = F.dropout(hidden[-1][:, -task.queries], self.dropout, self.training)
        return {"scores": self.classifiers[task.kind][name](pooled)}

    def attribute_logits(self, name: str, hidden: Tensor, logits: Tensor) -> Tensor:
        """[B,Q,attributes] of the last layer, its most likely real class as the condition."""
        return self.det_losses[name].attribute_head(hidden[-1], logits[-1][..., :-1].argmax(-1))

    def losses(self, name: str, hidden: Tensor, outputs: dict, targets, split: str = "train", matched=None):
        """(weighted terms by their logged name, matching per layer or None).

        targets: detection a list of dicts (labels [n], boxes [n,4], attributes [n,16]); VQA [B,A] float; else
        [B] int64. matched: a matching per layer to take instead of one made here.
        """
        matching = None
        if "logits" in outputs:
            terms, matching = self.det_losses[name](outputs["logits"], outputs["boxes"], hidden, targets, matched)
        elif name == "vqa2":
            scores = outputs["scores"]
            terms = {"loss_0": F.binary_cross_entropy_with_logits(scores, targets) * scores.shape[1]}
        else:
            terms = {"loss_0": F.cross_entropy(outputs["scores"], targets)}
        return {f"{split}/{name}/{key}": value for key, value in terms.items()}, matching

    def parameter_groups(self, lr: float, lr_backbone: float) -> list[dict]:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in named if "backbone" not in n], "lr": lr},
            {"params": [p for n, p in named if "backbone" in n], "lr": lr_backbone},
        ]
