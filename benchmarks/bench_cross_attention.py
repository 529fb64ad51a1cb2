"""Cross-attention of few queries over many keys: ours, eager, SDPA's backends, FlexAttention, xformers, compiled.

``python -m benchmarks.bench_cross_attention``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend
from unit_fast_kernels import cross_attention as kernel

from benchmarks import _run, bench_attention
from benchmarks._machine import PEAKS
from benchmarks.bench_attention import BACKENDS, eager, sdpa, shape_of, xformers_efficient
from unit_fast import ops

CPU_SHAPES = {
    "detection": (2, 100, 541, 8, 96, True, 0.1),
    "detection_large": (1, 100, 3350, 8, 96, True, 0.1),
    "detection_eval": (2, 100, 541, 8, 96, False, 0.0),
    "vqa": (2, 25, 552, 8, 96, True, 0.1),
}
QUICK_SHAPES = {"detection": (2, 10, 131, 2, 96, True, 0.1), "vqa_eval": (2, 5, 67, 2, 96, False, 0.0)}


# ---------------------------------------------------------------------------------------------------------- providers


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


class CrossAttention(bench_attention.Attention):
    """Forward and backward of one function; keys and values are slices of products over six layers."""

    def __init__(self, function: Callable | None, shape: tuple, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.function = function
        arguments = kernel.make(shape, dtype, device)
        self.leaves = [arguments[name].requires_grad_() for name in "qkv"]
        self.rest = [arguments[name] for name in ("key_padding_mask", "dropout_p", "seed")]
        self.upstream = torch.randn(*self.leaves[0].shape, dtype=dtype, device=device)


class Exact(CrossAttention):
    """The reference in float32 (float64 on a CPU), for the gate."""

    outputs = bench_attention.Exact.outputs


def functions(shape: tuple, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """Every provider that may take this case."""
    _, queries, keys, _, _, _, dropout_p = shape
    found = {"eager": eager}
    if device == "cpu":
        found["sdpa"] = sdpa(SDPBackend.MATH) if dropout_p else sdpa(SDPBackend.FLASH_ATTENTION)
        return found | {"ours": ops.cross_attention}
    found |= {"compiled": torch.compile(eager, dynamic=False)}
    found |= {name: sdpa(backend) for name, backend in BACKENDS.items()}
    if dropout_p == 0.0:
        mask = kernel.make(shape, dtype, device)["key_padding_mask"]
        found["flex"] = flex(mask, queries, keys, device)
    if importlib.util.find_spec("xformers"):
        found["xformers"] = xformers_efficient
    return found | {"ours": ops.cross_attention}


@functools.cache
def accepts(name: str, shape: tuple, dtype: torch.dtype, device: str) -> bool:
    """Whether a provider runs this case; ours and eager must."""
    if device == "cpu" or name in ("ours", "eager"):
        return True
    try:
        function = functions(shape, dtype, device)[name]
        _run.one_step(CrossAttention(function, shape, dtype, device), torch.device(device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()
        print(f"{name} does not take {shape_of(shape)}: {reason[-1][:160] if reason else type(error).__name__}")
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- report


def floors(rows: list[dict], console: Console, shapes: dict) -> None:
    """Each pass beside the time that its bytes take at the card's peak; nothing where the peak is unknown."""
    table = Table(title="time by the byte floor (1: all of the bandwidth)", title_justify="left", box=box.SIMPLE)
    for title in ("case", "provider"):
        table.add_column(title)
    for title in ("forward floor us", "forward", "share %", "backward floor us", "backward", "share %"):
        table.add_column(title, justify="right")
    for row in rows:
        peak = next((p["bytes"] for card, p in PEAKS.items() if row["gpu"] and card in row["gpu"]), None)
        if peak is None or row["device"] != "cuda":
            continue
        cells = []
        for phase, count in (("forward", kernel.bytes_moved), ("backward", kernel.bytes_moved_bwd)):
            floor = count(shapes[row["case"]], getattr(torch, row["dtype"])) / peak * 1e3
            times = row["phases_ms"][phase] / floor
            cells += [f"{floor * 1e3:.1f}", f"{times:.2f}x", f"{100 / times:.0f}"]
        table.add_row(row["case"], row["provider"], *cells)
    if table.row_count:
        console.print(table)


def build(args: argparse.Namespace) -> _run.Benchmark:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = QUICK_SHAPES if args.quick else kernel.SHAPES if device == "cuda" else CPU_SHAPES
    wanted = args.memory_child[:1] if args.memory_child else args.case
    if wanted and set(wanted) <= set(shapes):  # to know which providers take a case each must be tried
        shapes = {name: shapes[name] for name in wanted}
    cases = []
    for name, shape in shapes.items():
        providers = {
            provider: lambda function=function, shape=shape: CrossAttention(function, shape, dtype, device)
            for provider, function in functions(shape, dtype, device).items()
            if accepts(provider, shape, dtype, device)
        }
        case = _run.Case(
            name=name,
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
        cases.append(case)
    return _run.Benchmark(
        name="bench_cross_attention",
        module="benchmarks.bench_cross_attention",
        title="Cross-attention, forward and backward" + (" (quick: small shapes)" if args.quick else ""),
        method=[
            "Shapes: batch x queries x keys. Keys and values are slices of products over six layers. The mask pads the "
            "last image at the end of each row; bytes and FLOPs count padded keys too, whatever a provider reads.",
            "Each provider drops with its own random numbers. FlexAttention's block mask is built beforehand, and it "
            "runs where nothing is dropped; ours lists the real keys in every step.",
            "Gate, without dropout: out and three gradients against the exact reference, in the 2-norm.",
        ],
        excluded="projections",
        cases=cases,
        summary=lambda rows, console: floors(rows, console, shapes),
    )


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
