"""What a benchmark prints: the box before it, and the table of a case."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.panel import Panel
from rich.table import Table


def heading(title: str, method: Sequence[str], excluded: str, stamp: Mapping) -> Panel:
    """The box printed first: what is measured, how, on what."""
    machine, torch_version = stamp["gpu"] or f"{stamp['cpu']}, {stamp['cores']} cores", stamp["versions"]["torch"]
    lines = [
        *method,
        f"Left out: {excluded}",
        f"Machine: {machine}; {stamp['threads']} threads; torch {torch_version}; commit {stamp['commit']}; sources "
        f"{stamp['sources']}.",
    ]
    return Panel("\n".join(lines), title=title, title_align="left")


def table(rows: Sequence[dict]) -> Table:
    """The rows of one case; on a card with the figures of replays beside those from the host."""
    first = rows[0]
    on_card = first["device"] == "cuda"
    phases = list(first["phases_ms"])
    title = f"{first['case']}: {first['shape']}, {first['dtype']}, ms"
    if on_card:
        title += " (from the host, and captured)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    captured = (*(f"captured {phase}" for phase in phases), "captured", "vs best") if on_card else ()
    for title in (*phases, "host" if on_card else "total", "p20", "p80", "vs best", *captured, "% peak", "GiB"):
        table.add_column(title, justify="right", no_wrap=not on_card)
    for row in rows:
        cells = [*(row["phases_ms"][phase] for phase in phases), *(row[key] for key in ("time_ms", "p20_ms", "p80_ms"))]
        cells = [cell(value) for value in cells] + [cell(row["speedup_vs_best"], "{:.2f}x")]
        if on_card:
            replayed = row["captured_phases_ms"] or {}
            cells += [cell(replayed.get(phase)) for phase in phases]
            cells += [cell(row["captured_ms"]), cell(row["captured_speedup_vs_best"], "{:.2f}x")]
        cells += [cell(row["percent_of_peak"], "{:.1f}"), cell(row["peak_memory_gib"], "{:.2f}")]
        table.add_row(row["provider"], *cells)
    return table


def times_as_fast(ours: float | None, other: float | None) -> float | None:
    """Ours is so many times as fast, or as small: the other's time or size over ours. None where one is missing."""
    return other / ours if ours and other else None


def compare(case: str, ours: Mapping, other: Mapping) -> str:
    """The rows of two providers in a line."""
    return (
        f"{case}: ours is {times_as_fast(ours['time_ms'], other['time_ms']):.2f} times as fast as {other['provider']}"
    )


def cell(value: float | None, form: str = "{:.4g}") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def not_captured(rows: Sequence[dict]) -> list[str]:
    """A line for each provider that a graph cannot hold."""
    return [f"{r['provider']} is not captured: {r['captured_why_not']}" for r in rows if r["captured_why_not"]]
