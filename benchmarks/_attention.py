"""What the benchmarks of attention and cross-attention share: the peers, one forward and backward pass, the cases.

``ours`` is the public operator that is measured: two names of one, whose regimes have a benchmark each.
"""

import argparse
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unit_fast_kernels import attention as kernel
from unit_fast_kernels.attention.reference import attention_reference

from benchmarks import _run

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


# ---------------------------------------------------------------------------------------------------------- providers
# Each is a function (q, k, v, key_padding_mask, dropout_p, seed) -> out, as ``ops.attention``.


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """Probabilities in memory, as nn.MultiheadAttention with weights computes them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], -math.inf)
    return (F.dropout(scores.softmax(-1), p) @ v).transpose(1, 2)


def sdpa(backend: SDPBackend) -> Callable:
    """torch's, by one backend."""

    def function(q, k, v, mask, p, seed):
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        allowed = None if mask is None else (~mask)[:, None, None, :].expand(shape)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), allowed, p)
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

    def function(q, k, v, mask, p, seed):
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)

    return function


def xformers_efficient(q, k, v, mask, p, seed):
    """xformers' memory_efficient_attention; its bias wants rows that are a multiple of 8 long."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        padded = -(-k.shape[1] // 8) * 8
        row = q.new_zeros(mask.shape[0], 1, 1, padded)
        row[..., : k.shape[1]].masked_fill_(mask[:, None, None, :], -math.inf)
        bias = row.expand(-1, q.shape[2], q.shape[1], -1)[..., : k.shape[1]]
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=p)


class Attention(_run.Provider):
    """Forward and backward of one function."""

    def __init__(self, function: Callable | None, shape: tuple, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.function = function
        arguments = kernel.make(shape, dtype, device)
        self.leaves = [arguments[name].requires_grad_() for name in "qkv"]
        self.rest = [arguments[name] for name in ("key_padding_mask", "dropout_p", "seed")]
        self.upstream = torch.randn(*self.leaves[0].shape, dtype=dtype, device=device)

    def step(self, marks: _run.Marks) -> None:
        out = self.function(*self.leaves, *self.rest)
        marks("forward")
        torch.autograd.grad(out, self.leaves, self.upstream)
        marks("backward")

    def outputs(self) -> dict[str, Tensor]:
        mask, _, _ = self.rest
        out = self.function(*self.leaves, mask, 0.0, None)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, self.leaves, self.upstream))))


class Exact(Attention):
    """The reference in float32 (float64 on a CPU), for the gate; a head at a time, so that its scores fit."""

    def outputs(self) -> dict[str, Tensor]:
        wide = torch.float64 if self.leaves[0].device.type == "cpu" else torch.float32
        found = []
        for head in range(self.leaves[0].shape[2]):
            leaves = [x.detach()[:, :, head : head + 1].to(wide).requires_grad_() for x in self.leaves]
            out = attention_reference(*leaves, self.rest[0])
            upstream = self.upstream[:, :, head : head + 1].to(wide)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
        return dict(zip(("out", "dq", "dk", "dv"), (torch.cat(x, 2) for x in zip(*found))))


def functions(ours: Callable, shape: tuple, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """Every provider that may take this case."""
    _, queries, keys, _, _, _, dropout_p = shape
    found = {"eager": eager}
    if device == "cpu":
        found["sdpa"] = sdpa(SDPBackend.MATH) if dropout_p else sdpa(SDPBackend.FLASH_ATTENTION)
        return found | {"ours": ours}
    found |= {"compiled": torch.compile(eager, dynamic=False)}
    found |= {name: sdpa(backend) for name, backend in BACKENDS.items()}
    if dropout_p == 0.0:
        found["flex"] = flex(kernel.make(shape, dtype, device)["key_padding_mask"], queries, keys, device)
    if importlib.util.find_spec("xformers"):
        found["xformers"] = xformers_efficient
    return found | {"ours": ours}


@functools.cache
def accepts(ours: Callable, name: str, shape: tuple, dtype: torch.dtype, device: str) -> bool:
    """Whether a provider runs this case; ours and eager must."""
    if device == "cpu" or name in ("ours", "eager"):
        return True
    try:
        function = functions(ours, shape, dtype, device)[name]
        _run.one_step(Attention(function, shape, dtype, device), torch.device(device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()
        print(f"{name} does not take {shape_of(shape)}: {reason[-1][:160] if reason else type(error).__name__}")
        return False
    return True


def shape_of(shape: tuple) -> str:
    batch, queries, keys, heads, width, masked, dropout_p = shape
    mask = ", masked" if masked else ""
    return f"{batch} x {queries} x {keys}, {heads} heads of {width}{mask}, dropout {dropout_p}"


def shapes_of(args: argparse.Namespace, *, card: Mapping, quick: Mapping, cpu: Mapping) -> dict[str, tuple]:
    """Case -> shape, as the options choose: to know which providers take a case each must be tried."""
    shapes = quick if args.quick else card if torch.cuda.is_available() else cpu
    wanted = args.memory_child[:1] if args.memory_child else args.case
    return {name: shapes[name] for name in wanted} if wanted and set(wanted) <= set(shapes) else dict(shapes)


def build(
    args: argparse.Namespace,
    *,
    ours: Callable,
    name: str,
    title: str,
    shapes_are: str,
    shapes: Mapping[str, tuple],
    summary: Callable | None = None,
) -> _run.Benchmark:
    """The benchmark of ``ours`` over ``shapes``: in bfloat16 on CUDA, in float32 without a card."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cases = []
    for case, shape in shapes.items():
        providers = {
            provider: lambda function=function, shape=shape: Attention(function, shape, dtype, device)
            for provider, function in functions(ours, shape, dtype, device).items()
            if accepts(ours, provider, shape, dtype, device)
        }
        cases.append(
            _run.Case(
                name=case,
                shape=shape_of(shape),
                dtype=str(dtype).removeprefix("torch."),
                device=device,
                providers=providers,
                reference="exact",
                references={"exact": lambda shape=shape: Exact(None, shape, dtype, device)},
                tolerances={"": 1e-4 if dtype == torch.float32 else 2e-2},
                error="l2",
                flops=kernel.flops(shape) + kernel.flops_bwd(shape),
                bytes=kernel.bytes_moved(shape, dtype) + kernel.bytes_moved_bwd(shape, dtype),
            )
        )
    return _run.Benchmark(
        name=name,
        module=f"benchmarks.{name}",
        title=title + (" (quick: small shapes)" if args.quick else ""),
        method=[
            f"Shapes: batch x queries x keys. {shapes_are}",
            "Each provider drops with its own random numbers. FlexAttention's block mask is built beforehand, and it "
            "runs where nothing is dropped; ours lists the real keys in every step.",
            "Gate, without dropout: out and three gradients against the exact reference, in the 2-norm.",
        ],
        excluded="projections",
        cases=cases,
        summary=summary,
    )
