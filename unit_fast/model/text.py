"""BERT text encoder with a task token (SPEC 1.6). The pooler is part of the authors' model but never called."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unit_fast import ops
from unit_fast.config import TextConfig

LAYER_NORM_EPS = 1e-12


class TextLayer(nn.Module):
    """One post-norm BERT layer; the three input projections are stored apart, as BERT has them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.intermediate = nn.Linear(width, config.ffn_width)
        self.output = nn.Linear(config.ffn_width, width)
        self.output_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def _residual(self, norm, x, branch, seeds):
        p = self.dropout if self.training else 0.0
        return ops.residual_norm(x, branch, norm.weight, norm.bias, norm.eps, p, None, seeds.next())[0]

    def forward(self, x_BTC: Tensor, mask_BT: Tensor, seeds) -> Tensor:
        q, k, v = (proj(x_BTC).unflatten(-1, (self.heads, -1)) for proj in (self.query, self.key, self.value))
        attended = ops.attention(q, k, v, mask_BT, self.dropout if self.training else 0.0, seeds.next())
        x = self._residual(self.attention_norm, x_BTC, self.attention_output(attended.flatten(-2)), seeds)
        hidden = ops.bias_act_dropout(self.intermediate(x), None, "gelu")
        return self._residual(self.output_norm, x, self.output(hidden), seeds)


class TextEncoder(nn.Module):
    """ids, attention mask (1 = real), segments [B,T] -> token features [B,T,C]."""

    def __init__(self, config: TextConfig, task_rows: int):
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.task_embedding = nn.Embedding(task_rows, width) if task_rows else None
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(width, width)
        self._init()

    def _init(self) -> None:
        """BERT's own initialisation, N(0, 0.02) and zero biases; pretrained weights usually replace it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if self.task_embedding is not None:
            nn.init.normal_(self.task_embedding.weight)

    def forward(self, input_ids, attention_mask, token_type_ids, task_index: int, seeds) -> Tensor:
        length = input_ids.shape[1]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings.weight[:length]
        norm = self.embedding_norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = ops.dropout(x, self.dropout if self.training else 0.0, seeds.next())
        mask = attention_mask != 1
        if self.task_embedding is not None:  # after the embedding block: no position, segment, norm or dropout
            token = self.task_embedding.weight[task_index].to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat((token, x), dim=1)
            mask = F.pad(mask, (1, 0), value=False)
        for layer in self.layers:
            x = layer(x, mask, seeds)
        return x if self.task_embedding is None else x[:, 1:]
