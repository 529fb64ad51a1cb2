"""Self-attention with a key-padding mask and dropout: ours, eager, SDPA's backends, FlexAttention, xformers, compiled.

``python -m benchmarks.bench_attention``; without a card in float32 on the CPU, at smaller shapes. ``--tune`` writes
launch parameters for the card. Cross-attention is another regime of the operator, with a benchmark of its own.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unit_fast_kernels.attention import SELF_SHAPES
from unit_fast_kernels.attention.reference import attention_reference

from benchmarks.runner.operators import OperatorBenchmark, Pass, inputs_of
from benchmarks.runner.timing import one_step

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


# ---------------------------------------------------------------------------------------------------------- providers


def eager(q, k, v, key_padding_mask, dropout_p, seed) -> Tensor:
    """Probabilities in memory, as nn.MultiheadAttention with weights computes them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    return (F.dropout(scores.softmax(-1), dropout_p) @ v).transpose(1, 2)


def sdpa(backend: SDPBackend) -> Callable:
    """torch's, by one backend."""

    def function(q, k, v, key_padding_mask, dropout_p, seed):
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        allowed = None if key_padding_mask is None else (~key_padding_mask)[:, None, None, :].expand(shape)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), allowed, dropout_p)
        return out.transpose(1, 2)

    return function


def flex(mask: Tensor | None, queries: int, keys: int, device: str) -> Callable:
    """FlexAttention, which knows no dropout; its block mask is built beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if mask is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: ~mask[b, j], B=mask.shape[0], H=None, Q_LEN=queries, KV_LEN=keys, device=device
        )

    def function(q, k, v, key_padding_mask, dropout_p, seed):
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)

    return function


def xformers_efficient(q, k, v, key_padding_mask, dropout_p, seed):
    """xformers' memory_efficient_attention; its bias wants rows that are a multiple of 8 long."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if key_padding_mask is not None:
        padded = -(-k.shape[1] // 8) * 8
        row = q.new_zeros(key_padding_mask.shape[0], 1, 1, padded)
        row[..., : k.shape[1]].masked_fill_(key_padding_mask[:, None, None, :], -math.inf)
        bias = row.expand(-1, q.shape[2], q.shape[1], -1)[..., : k.shape[1]]
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p)


class Exact(Pass):
    """The reference in float32 (float64 on a CPU), for the gate; a head at a time, so that its scores fit."""

    def outputs(self) -> dict[str, Tensor]:
        wide = torch.float64 if self.leaves[0].device.type == "cpu" else torch.float32
        found = []
        for head in range(self.leaves[0].shape[2]):
            leaves = [x.detach()[:, :, head : head + 1].to(wide).requires_grad_() for x in self.leaves]
            out = attention_reference(*leaves, self.inputs["key_padding_mask"])
            upstream = self.upstream[0][:, :, head : head + 1].to(wide)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
        return dict(zip(("out0", "grad/q", "grad/k", "grad/v"), (torch.cat(x, 2) for x in zip(*found))))


# ----------------------------------------------------------------------------------------------------------- benchmark


def shape_of(shape: tuple) -> str:
    batch, queries, keys, heads, width, masked, dropout_p = shape
    mask = ", masked" if masked else ""
    return f"{batch} x {queries} x {keys}, {heads} heads of {width}{mask}, dropout {dropout_p}"


class AttentionBenchmark(OperatorBenchmark):
    """Of one of the operator's two names. Which peers take a shape is tried."""

    def __init__(self, *, shapes_are: str, **fields):
        super().__init__(
            kernel="attention",
            method=[
                f"Shapes: batch x queries x keys. {shapes_are}",
                "Each provider drops with its own random numbers. FlexAttention's block mask is built beforehand, and "
                "it runs where nothing is dropped; ours lists the real keys in every step.",
            ],
            notes=["Gate, without dropout: out and three gradients against the exact reference, in the 2-norm."],
            excluded="projections",
            eager=eager,
            wanted=("q", "k", "v"),
            shape_of=shape_of,
            **fields,
        )

    def shapes(self, args: argparse.Namespace) -> Mapping[str, tuple]:
        """Those of the cases that the options choose: none is to be tried for nothing."""
        shapes = super().shapes(args)
        wanted = args.memory_child[:1] if args.memory_child else args.case
        return {name: shapes[name] for name in wanted} if wanted and set(wanted) <= set(shapes) else shapes

    def functions(self, shape: tuple, dtype: torch.dtype, device: str, quick: bool) -> dict[str, Callable]:
        _, queries, keys, _, _, _, dropout_p = shape
        if device == "cpu":
            backend = SDPBackend.MATH if dropout_p else SDPBackend.FLASH_ATTENTION
            return {"eager": eager, "sdpa": sdpa(backend), "ours": self.ours}
        found = {"compiled": torch.compile(eager, dynamic=False)}
        found |= {name: sdpa(backend) for name, backend in BACKENDS.items()}
        if dropout_p == 0.0:
            found["flex"] = flex(self.module.make(shape, dtype, device)["key_padding_mask"], queries, keys, device)
        if importlib.util.find_spec("xformers"):
            found["xformers"] = xformers_efficient
        taken = {name: peer for name, peer in found.items() if self.accepts(name, peer, shape, dtype, device)}
        return {"eager": eager, **taken, "ours": self.ours}

    def accepts(self, name: str, function: Callable, shape: tuple, dtype: torch.dtype, device: str) -> bool:
        """Whether a peer runs this case; a line where it does not."""
        try:
            one_step(self.provider(function, shape, dtype, device).step, torch.device(device))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).strip().splitlines()
            print(f"{name} does not take {shape_of(shape)}: {reason[-1][:160] if reason else type(error).__name__}")
            return False
        return True

    def exact(self, shape: tuple, dtype: torch.dtype, device: str) -> Exact:
        return Exact(self.ours, inputs_of(self.module, shape, dtype, device), self.wanted)


main = AttentionBenchmark(
    op="attention",
    about=__doc__,
    title="Self-attention, forward and backward",
    shapes_are="The mask pads the last image at the end of each row; FLOPs count padded keys too, 14 B H Sq Sk D, "
    "whatever a provider computes.",
    card=SELF_SHAPES,
    cpu={
        "encoder": (1, 2101, 2101, 8, 32, True, 0.1),
        "encoder_eval": (1, 2101, 2101, 8, 32, False, 0.0),
        "decoder": (2, 100, 100, 8, 96, False, 0.1),
        "bert": (8, 61, 61, 12, 64, True, 0.1),
    },
    quick={"encoder": (2, 131, 131, 2, 32, True, 0.1), "bert": (2, 21, 21, 2, 64, True, 0.0)},
)

if __name__ == "__main__":
    sys.exit(main())
