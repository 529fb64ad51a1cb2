"""Heads behind the decoder (SPEC 1.9): box MLP, Visual Genome attributes, classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unit_fast import ops


class BoxHead(nn.Module):
    """Three linear layers with ReLU and a sigmoid: [...,D] -> cx, cy, w, h in 0..1, relative to the un-padded image."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList((nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x))))).sigmoid()


class AttributeHead(nn.Module):
    """Attribute logits of a query given a class: two linear layers without activation, then a ReLU on the logits."""

    def __init__(self, width: int, classes: int, embedding: int, hidden: int, outputs: int, relu: bool):
        super().__init__()
        self.relu = relu
        self.cls_embed = nn.Embedding(classes, embedding)
        self.attr_linear1 = nn.Linear(width + embedding, hidden)
        self.attr_linear2 = nn.Linear(hidden, outputs)
        for module in (self.cls_embed, self.attr_linear1, self.attr_linear2):
            nn.init.normal_(module.weight, std=0.01)
        for module in (self.attr_linear1, self.attr_linear2):
            nn.init.zeros_(module.bias)

    def forward(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """hidden [...,D], classes [...] int64 -> logits [...,attributes]."""
        embedded = self.cls_embed(classes).to(hidden.dtype)
        logits = self.attr_linear2(self.attr_linear1(torch.cat((hidden, embedded), dim=-1)))
        return F.relu(logits) if self.relu else logits


class Classifier(nn.Module):
    """Pooled query [...,D] -> logits: dropout, dense, erf-GELU, LayerNorm (eps 1e-12), linear."""

    def __init__(self, width: int, outputs: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor, seeds) -> Tensor:
        x = ops.dropout(x, self.dropout if self.training else 0.0, seeds.next())
        return self.out(self.norm(F.gelu(self.dense(x))))
