"""Cross-attention of few queries over many keys: ours, eager, SDPA's backends, FlexAttention, xformers, compiled.

``python -m benchmarks.bench_cross_attention``; without a card in float32 on the CPU, at smaller shapes. ``--tune``
writes launch parameters for the card.
"""

import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from unit_fast_kernels import attention as kernel

from benchmarks.bench_attention import AttentionBenchmark
from benchmarks.runner.machine import peak_of


def floors(rows: list[dict], console: Console) -> None:
    """Each pass, replayed where it was captured, beside the time that its bytes take at the card's peak; nothing where
    the peak is unknown."""
    table = Table(title="time by the byte floor (1: all of the bandwidth)", title_justify="left", box=box.SIMPLE)
    for title in ("case", "provider"):
        table.add_column(title)
    for title in ("forward floor us", "forward", "share %", "backward floor us", "backward", "share %"):
        table.add_column(title, justify="right")
    shapes = main.quick | main.card
    for row in rows:
        peak, taken = peak_of(row["gpu"]), row.get("captured_phases_ms") or row["phases_ms"]
        if peak is None or row["device"] != "cuda":
            continue
        cells = []
        for phase, count in (("forward", kernel.bytes_moved), ("backward", kernel.bytes_moved_bwd)):
            floor = count(shapes[row["case"]], getattr(torch, row["dtype"])) / peak["bytes"] * 1e3
            times = taken[phase] / floor
            cells += [f"{floor * 1e3:.1f}", f"{times:.2f}x", f"{100 / times:.0f}"]
        table.add_row(row["case"], row["provider"], *cells)
    if table.row_count:
        console.print(table)


main = AttentionBenchmark(
    op="cross_attention",
    about=__doc__,
    title="Cross-attention, forward and backward",
    shapes_are="Keys and values are slices of products over six layers. The mask pads the last image at the end of "
    "each row; bytes and FLOPs count padded keys too, whatever a provider reads.",
    card=kernel.CROSS_SHAPES,
    cpu={
        "detection": (2, 100, 541, 8, 96, True, 0.1),
        "detection_large": (1, 100, 3350, 8, 96, True, 0.1),
        "detection_eval": (2, 100, 541, 8, 96, False, 0.0),
        "vqa": (2, 25, 552, 8, 96, True, 0.1),
    },
    quick={"detection": (2, 10, 131, 2, 96, True, 0.1), "vqa_eval": (2, 5, 67, 2, 96, False, 0.0)},
    summary=floors,
)

if __name__ == "__main__":
    sys.exit(main())
