"""What the benchmark of whole steps prints on a card: a line a row, a table a case, kernels by category."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.runner.show import cell


def line(row: dict) -> str:
    """A row in a line, as soon as it is known."""
    if row["time_ms"] is None:
        return f"{row['case']} {row['provider']}: {row['status']}"
    return f"{row['case']} {row['provider']}: {row['time_ms']:.4g} ms, {row['samples_per_s']:.4g} samples/s"


_COLUMNS = (
    ("launches", "launches", "{:.0f}"),
    ("kernels", "kernels", "{:.0f}"),
    ("waits", "waits", "{:.0f}"),
    ("to host", "copies_to_host", "{:.0f}"),
    ("to card", "copies_to_device", "{:.0f}"),
    ("busy", "busy_share", "{:.2f}"),
    ("GiB", "peak_memory_gib", "{:.2f}"),
    ("bound ms", "bound_ms", "{:.4g}"),
    ("of bound", "share_of_bound", "{:.3f}"),
)
"""Title, key, form."""


def table(rows: Sequence[dict]) -> Table:
    """The rows of one case."""
    first = rows[0]
    title = f"{first['case']}: {first['shape']}, {first['dtype']}, on {first['gpu'] or first['cpu']}"
    if first["work"]:
        work = [f"{n * 1e-12:.4g} TFLOP in {dtype}" for dtype, n in first["work"]["flops"].items()]
        title += f"\nat least {' + '.join(work)}, {first['work']['bytes'] * 1e-9:.4g} GB"
    out = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    out.add_column("provider", no_wrap=True)
    for column in ("samples/s", "ms", "p20", "p80", *(name for name, _, _ in _COLUMNS)):
        out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["time_ms"] is None:
            out.add_row(row["provider"], row["status"])
            continue
        out.add_row(
            row["provider"],
            *(cell(row[key]) for key in ("samples_per_s", "time_ms", "p20_ms", "p80_ms")),
            *(cell(row[key], form) for _, key, form in _COLUMNS),
        )
    return out


def categories(rows: Sequence[dict]) -> Table | str:
    """Where the card's time goes: milliseconds and kernels by category and provider, the longest of ours first."""
    rows = [row for row in rows if row["categories"]]
    if not rows:
        return "No kernels by category: they are a card's."
    out = Table(title=f"{rows[0]['case']}: ms (kernels) of a step", title_justify="left", box=box.SIMPLE, padding=0)
    out.add_column("category", no_wrap=True)
    for row in rows:
        out.add_column(row["provider"], justify="right", no_wrap=True)
    for name in dict.fromkeys(name for row in rows for name in row["categories"]):
        cells = [row["categories"].get(name) for row in rows]
        out.add_row(name, *("" if c is None else f"{c['ms']:.3f} ({c['kernels']:.0f})" for c in cells))
    return out
