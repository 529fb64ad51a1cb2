"""Post-norm transformer layers of the image encoder and the decoder, written once (SPEC 1.5 and 1.8).

Shapes: B batch, S tokens, Q queries, C width, H heads, D = C / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unit_fast import ops
from unit_fast.config import DecoderConfig, EncoderConfig
from unit_fast.model.short import Short

LAYER_NORM_EPS = 1e-5


class DropoutSeeds:
    """One seed a dropout place: a base drawn once a step from the default generator, plus the place's number.

    The seeds live on the device, so that a captured step can hold them. Without active dropout nothing is drawn.
    """

    BLOCK = 512
    """Seeds made at once; a model with more places makes another block, so there is no limit."""

    def __init__(self, active: bool, device: torch.device):
        self._base, self._rows, self._place = None, None, 0
        if active:
            self._base = torch.randint(-(2**62), 2**62, (2,), device=device)

    def next(self) -> Tensor | None:
        """int64[2] for the next place in call order; None when dropout is off."""
        if self._base is None:
            return None
        block, row = divmod(self._place, self.BLOCK)
        if row == 0:
            place = torch.arange(block * self.BLOCK, (block + 1) * self.BLOCK, device=self._base.device)
            self._rows = self._base + torch.stack((torch.zeros_like(place), place), dim=1)
        self._place += 1
        return self._rows[row]


class Attention(nn.Module):
    """Parameters of multi-head attention: packed query, key, value projection and the output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, x: Tensor) -> Tensor:
        """[B,S,C] -> [B,S,H,D]."""
        return x.unflatten(-1, (self.heads, -1))

    def value_only(self, x: Tensor) -> Tensor:
        """The attention's output where every query sees one and the same value: projected value of x [B,S,C]."""
        weight, bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(x, weight, bias))

    def self_attention(self, x, x_pos, mask, dropout_p, seed) -> Tensor:
        """Query and key from x_pos = x + positions, value from x, both [B,S,C]; mask [B,S] True = ignore."""
        width = x.shape[-1]
        weight_qk, weight_v = self.in_proj_weight.split([2 * width, width])
        bias_qk, bias_v = self.in_proj_bias.split([2 * width, width])
        q, k = F.linear(x_pos, weight_qk, bias_qk).chunk(2, dim=-1)
        v = F.linear(x, weight_v, bias_v)
        out = ops.attention(self.split(q), self.split(k), self.split(v), mask, dropout_p, seed)
        return self.out_proj(out.flatten(-2))


def linear_act_dropout(linear: nn.Linear, x: Tensor, act: str, dropout_p: float = 0.0, seed: Tensor | None = None):
    """dropout(act(linear(x))), act "relu" or "gelu": the first half of a feed-forward net."""
    if not ops.fuses("bias_act_dropout", x):
        return ops.bias_act_dropout(linear(x), None, act, dropout_p, seed)
    hidden = F.linear(x, linear.weight)
    return ops.bias_act_dropout(hidden, linear.bias.to(hidden.dtype), act, dropout_p, seed)


class _Layer(nn.Module):
    """Self-attention, feed-forward net and norms of a layer, and its dropout probability."""

    def __init__(self, config: EncoderConfig | DecoderConfig, norms: int):
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.self_attn = Attention(width, config.heads)
        self.linear1 = nn.Linear(width, config.ffn_width)
        self.linear2 = nn.Linear(config.ffn_width, width)
        for i in range(1, norms + 1):
            setattr(self, f"norm{i}", nn.LayerNorm(width, eps=LAYER_NORM_EPS))

    @property
    def p(self) -> float:
        return self.dropout if self.training else 0.0

    def residual(self, norm: nn.LayerNorm, x, branch, seeds, pos=None):
        """LayerNorm(x + dropout(branch)), and the same plus pos."""
        return ops.residual_norm(x, branch, norm.weight, norm.bias, norm.eps, self.p, pos, seeds.next())

    def ffn(self, x, seeds) -> Tensor:
        return self.linear2(linear_act_dropout(self.linear1, x, "relu", self.p, seeds.next()))


class EncoderLayer(_Layer):
    def __init__(self, config: EncoderConfig):
        super().__init__(config, norms=2)

    def forward(self, x, x_pos, pos, mask, seeds) -> tuple[Tensor, Tensor]:
        attended = self.self_attn.self_attention(x, x_pos, mask, self.p, seeds.next())
        x, _ = self.residual(self.norm1, x, attended, seeds)
        return self.residual(self.norm2, x, self.ffn(x, seeds), seeds, pos)


class ImageEncoder(Short, nn.Module):
    """Transformer over image tokens with an optional task token in front (SPEC 1.5)."""

    def __init__(self, config: EncoderConfig, task_rows: int):
        super().__init__()
        self.task_embedding = nn.Embedding(task_rows, config.width) if task_rows else None
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x_BSC: Tensor, pos_BSC: Tensor, mask_BS: Tensor, task_index: int, seeds) -> Tensor:
        x, pos, mask = x_BSC, pos_BSC, mask_BS
        if self.task_embedding is not None:  # at position zero, visible to all
            token = self.task_embedding.weight[task_index].to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat((token, x), dim=1)
            pos = F.pad(pos, (0, 0, 1, 0))
            mask = F.pad(mask, (1, 0), value=False)
        x_pos = x + pos
        for layer in self.layers:
            x, x_pos = layer(x, x_pos, pos, mask, seeds)
        return x if self.task_embedding is None else x[:, 1:]


class DecoderLayer(_Layer):
    def __init__(self, config: DecoderConfig):
        super().__init__(config, norms=3)
        self.multihead_attn = Attention(config.width, config.heads)

    def forward(self, t, t_pos, query, cross, seeds, identical: bool) -> tuple[Tensor, Tensor]:
        """One layer. t, t_pos = t + query: [B,Q,C]; cross(layer, t_pos, seed) attends to the memory.

        ``identical``: every query sees the same values (the value input is zero, or all queries are equal), so that
        self-attention returns the projected value itself. Only without dropout.
        """
        if identical:
            attended = self.self_attn.value_only(t)
        else:
            attended = self.self_attn.self_attention(t, t_pos, None, self.p, seeds.next())
        t, t_pos = self.residual(self.norm1, t, attended, seeds, query)
        t, _ = self.residual(self.norm2, t, cross(self, t_pos, seeds), seeds)
        return self.residual(self.norm3, t, self.ffn(t, seeds), seeds, query)


class Decoder(Short, nn.Module):
    """Six layers over the memory; the final norm is applied to the output of every layer (SPEC 1.8)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, query_QC: Tensor, memory_BSC: Tensor, pos_BSC: Tensor | None, mask_BS: Tensor | None, seeds):
        """Hidden states [L,B,Q,C]. ``pos`` None: the memory is one token that is never masked (GLUE)."""
        batch, queries = memory_BSC.shape[0], query_QC.shape[0]
        exact = all(layer.p == 0.0 for layer in self.layers)
        single_key = pos_BSC is None
        cross = self._single_key(memory_BSC) if single_key else self._many_keys(memory_BSC, pos_BSC, mask_BS)
        # With one key and no dropout all queries stay equal: one stands for all of them.
        rows = 1 if exact and single_key else queries
        query = query_QC[:rows].to(memory_BSC.dtype).expand(batch, -1, -1)
        t = torch.zeros_like(query)
        t_pos, hidden = query, []
        for number, layer in enumerate(self.layers):
            # The target starts at zero, so layer 0 attends to equal values.
            t, t_pos = layer(t, t_pos, query, cross, seeds, identical=exact and (number == 0 or single_key))
            hidden.append(t)
        return self.norm(torch.stack(hidden)).expand(-1, -1, queries, -1)

    def _projections(self):
        """Weights and biases of the cross-attentions as (query, key, value) lists over the layers."""
        attentions = [layer.multihead_attn for layer in self.layers]
        weights = list(zip(*(a.in_proj_weight.chunk(3) for a in attentions)))
        biases = list(zip(*(a.in_proj_bias.chunk(3) for a in attentions)))
        return weights, biases

    def _many_keys(self, memory, pos, mask):
        """Cross-attention over the memory; keys and values of all layers come from one product each."""
        weights, biases = self._projections()
        keys = F.linear(memory + pos, torch.cat(weights[1]), torch.cat(biases[1])).chunk(len(self.layers), dim=-1)
        values = F.linear(memory, torch.cat(weights[2]), torch.cat(biases[2])).chunk(len(self.layers), dim=-1)
        parts = {layer: (weights[0][i], biases[0][i], keys[i], values[i]) for i, layer in enumerate(self.layers)}

        def cross(layer, t_pos, seeds):
            weight, bias, k, v = parts[layer]
            attention = layer.multihead_attn
            q = attention.split(F.linear(t_pos, weight, bias))
            out = ops.cross_attention(q, attention.split(k), attention.split(v), mask, layer.p, seeds.next())
            return attention.out_proj(out.flatten(-2))

        return cross

    def _single_key(self, memory):
        """Cross-attention to one token: its softmax is 1, so it is the projected value under the probabilities'
        dropout, which is independent for every batch entry, head and query."""
        weights, biases = self._projections()
        values = F.linear(memory, torch.cat(weights[2]), torch.cat(biases[2])).chunk(len(self.layers), dim=-1)
        parts = dict(zip(self.layers, values))

        def cross(layer, t_pos, seeds):
            attention, value = layer.multihead_attn, parts[layer]
            if layer.p > 0.0:
                ones = value.new_ones(*t_pos.shape[:2], attention.heads, 1)
                kept = ops.dropout(ones, layer.p, seeds.next())
                value = (attention.split(value) * kept).flatten(-2)
            return attention.out_proj(value).expand(-1, t_pos.shape[1], -1)

        return cross
