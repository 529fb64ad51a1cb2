"""BERT text encoder with a task token (SPEC 1.6). The pooler is part of the authors' model but never called."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unit_fast import ops
from unit_fast.config import TextConfig
from unit_fast.model.short import Short
from unit_fast.model.transformer import linear_act_dropout

LAYER_NORM_EPS = 1e-12


class _Pack(torch.autograd.Function):
    """Rows ``index`` of x [N,C]; backward puts the gradient rows back where they came from."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None


class _Unpack(torch.autograd.Function):
    """Rows of x [M,C] put to ``index`` of zeros [rows,C]."""

    @staticmethod
    def forward(ctx, x, index, rows):
        ctx.save_for_backward(index)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Packing:
    """The real tokens of a padded batch side by side, so that linear layers and norms skip the padding.

    Exact: a padded token reaches nothing, forward or backward. Only on the CPU, where their number can be read.
    """

    def __init__(self, mask_BT: Tensor):
        self.shape = mask_BT.shape
        self.index = (~mask_BT).flatten().nonzero()[:, 0]

    def pack(self, x_BTC: Tensor) -> Tensor:
        """[B,T,C] -> [M,C]."""
        return _Pack.apply(x_BTC.flatten(0, 1), self.index)

    def unpack(self, x_MC: Tensor) -> Tensor:
        """[M,C] -> [B,T,C], zeros on padding."""
        return _Unpack.apply(x_MC, self.index, self.shape.numel()).unflatten(0, self.shape)


class NoPacking:
    """Tokens stay where they are."""

    def pack(self, x_BTC: Tensor) -> Tensor:
        return x_BTC

    def unpack(self, x_BTC: Tensor) -> Tensor:
        return x_BTC


def packing_of(mask_BT: Tensor) -> Packing | NoPacking:
    """Packing where at least a tenth of the tokens is padding and reading their number costs nothing.

    A step of fused operators reads nothing, also where it runs on a CPU, nor does a compiled or exported one.
    """
    if mask_BT.device.type != "cpu" or ops.mode() == "fused" or torch.compiler.is_compiling():
        return NoPacking()
    packing = Packing(mask_BT)
    return packing if len(packing.index) <= 0.9 * mask_BT.numel() else NoPacking()


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

    def forward(self, x: Tensor, mask_BT: Tensor, seeds, packing, only: int | None = None) -> Tensor:
        """x, as ``packing`` has it, -> the same; or the one token at position ``only`` of every text, [B,1,C]."""
        k, v = packing.unpack(self.key(x)), packing.unpack(self.value(x))
        if only is None:
            q = packing.unpack(self.query(x))
        else:
            x, packing = packing.unpack(x)[:, only : only + 1], NoPacking()
            q = self.query(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        attended = ops.attention(q, k, v, mask_BT, self.dropout if self.training else 0.0, seeds.next())
        attended = packing.pack(attended.flatten(-2))
        x = self._residual(self.attention_norm, x, self.attention_output(attended), seeds)
        hidden = linear_act_dropout(self.intermediate, x, "gelu")
        return self._residual(self.output_norm, x, self.output(hidden), seeds)


class TextEncoder(Short, nn.Module):
    """ids, attention mask (1 = real), segments [B,T] -> token features [B,T,C], or those of the first token [B,1,C]."""

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
        self._init(config.init_std)

    def _init(self, std: float) -> None:
        """BERT's own initialisation, N(0, std) and zero biases; pretrained weights usually replace it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if self.task_embedding is not None:
            nn.init.normal_(self.task_embedding.weight)

    def forward(self, input_ids, attention_mask, token_type_ids, task_index: int, seeds, cls_only=False) -> Tensor:
        length = input_ids.shape[1]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings.weight[:length]
        norm = self.embedding_norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = ops.dropout(x, self.dropout if self.training else 0.0, seeds.next())
        mask, first = attention_mask != 1, 0
        if self.task_embedding is not None:  # after the embedding block: no position, segment, norm or dropout
            token = self.task_embedding.weight[task_index].to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat((token, x), dim=1)
            mask, first = F.pad(mask, (1, 0), value=False), 1
        packing = packing_of(mask)
        x = packing.pack(x)
        for layer in self.layers[:-1]:
            x = layer(x, mask, seeds, packing)
        if cls_only:  # nothing else of the last layer is used
            return self.layers[-1](x, mask, seeds, packing, only=first)
        return packing.unpack(self.layers[-1](x, mask, seeds, packing))[:, first:]
