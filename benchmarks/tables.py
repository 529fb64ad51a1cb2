"""The README's tables of figures, made from ``benchmarks/results/*.jsonl`` so that they cannot drift.

    python -m benchmarks.tables            # rewrite the tables between the README's markers
    python -m benchmarks.tables --check    # exit status 1 where they differ from the results

A table stands between ``<!-- results: bench_step -->`` and ``<!-- end of results -->``; with ``, kernels`` behind the
name it is that of the kernels of a step by category, and ``headline`` is the few figures to begin with. Each row names
its machine, and one table never mixes cards: results of a card are in a file of its own (``bench_step_h200``). In every
table "times as fast" is the provider's time over ours, or our images a second over the provider's.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.runner.machine import ROOT
from benchmarks.runner.results import RESULTS, read
from benchmarks.runner.show import times_as_fast

_BLOCK = re.compile(r"(<!-- results: (\w+)(, kernels)? -->\n)(.*?)(<!-- end of results -->)", re.S)
OURS = "ours"
FASTER, SMALLER = "ours, times as fast", "ours, times as small"
HEADLINE = {"bench_step_h200": ("coco_b2", "coco_b8"), "bench_step": ("coco", "coco_large")}
"""Results files and their cases in the headline: of a card, and of a CPU (the least and the most that is gained)."""


def load(name: str) -> list[dict]:
    """The rows of one results file. ``FileNotFoundError`` names the command that makes them."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        known = (p.stem for p in (ROOT / "benchmarks").glob("bench_*.py"))
        module = max((m for m in known if name.startswith(f"{m}_")), key=len, default=name)
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing; run: python -m benchmarks.{module}")
    return read(path)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _machine(row: Mapping) -> str:
    return row["gpu"] or f"{row['cpu']}, {row['threads']} threads"


def _stamp(row: Mapping) -> str:
    """What a row was measured on and with."""
    parts = [_machine(row), f"torch {row['versions']['torch']}", f"commit {row['commit']}", row["date"][:10]]
    if row.get("driver"):
        parts.insert(1, f"driver {row['driver']}")
    return "; ".join(parts)


def _spread(value: float, low: float | None, high: float | None) -> str:
    """A figure with its 20 % and 80 % points, where it has them."""
    return _number(value) + ("" if None in (low, high) else f" ({_number(low)} to {_number(high)})")


def _time(row: Mapping) -> str:
    return _spread(row["time_ms"], row["p20_ms"], row["p80_ms"])


def _times(ours: Mapping | None, row: Mapping | None, key: str) -> str:
    """Ours is so many times as fast (or small) as the row, by a time (or a size)."""
    if ours is None or row is None or ours is row:
        return ""
    times = times_as_fast(ours.get(key), row.get(key))
    return "" if times is None else f"{times:.2f}"


# A kind of table: titles, and the cells of a row of it beside ours of the same problem and machine.


def _loader_cells(row: Mapping, ours: Mapping | None) -> list[str]:
    speed = _spread(*(row[f"images_per_s{point}"] for point in ("", "_p20", "_p80")))
    return [
        f"{row['case']}, {row['shape']}", row["provider"], str(row["workers"]), speed,
        _times(row, ours, "images_per_s"), _number(row["cpu_ms_per_image"]), _number(row["peak_memory_gib"]),
    ]  # fmt: skip


def _host_cells(row: Mapping, ours: Mapping | None) -> list[str]:
    return [
        f"{row['shape']}, {row['dtype']}", row["provider"], _time(row), _times(ours, row, "time_ms"),
        _number(row["peak_memory_gib"]), _times(ours, row, "peak_memory_gib"),
    ]  # fmt: skip


def _operator_cells(row: Mapping, ours: Mapping | None) -> list[str]:
    peak = row["percent_of_peak"]
    return [
        f"{row['shape']}, {row['dtype']}", row["provider"], _number(row["captured_ms"]) or "not captured",
        _times(ours, row, "captured_ms"), _time(row), _times(ours, row, "time_ms"), _number(peak),
    ]  # fmt: skip


def _step_cells(row: Mapping, ours: Mapping | None) -> list[str]:
    problem = [f"{row['shape']}, {row['dtype']}", row["provider"]]
    if row["time_ms"] is None:
        return [*problem, row["status"], *[""] * 9]
    share = row["share_of_bound"]
    return [
        *problem, _number(row["samples_per_s"]), _time(row), _times(ours, row, "time_ms"),
        *(_count(row[key]) for key in ("launches", "kernels", "waits")),
        "" if row["copies_to_host"] is None else f"{row['copies_to_host']:.0f} / {row['copies_to_device']:.0f}",
        "" if row["busy_share"] is None else f"{row['busy_share']:.2f}",
        _number(row["peak_memory_gib"]), "" if share is None else f"{share:.2f}",
    ]  # fmt: skip


def _kind(rows: Sequence[Mapping]) -> tuple[tuple[str, ...], Callable]:
    first = rows[0]
    if "images_per_s" in first:
        titles = ("problem", "provider", "workers", "images/s (p20 to p80)", FASTER, "CPU ms an image", "GiB")
        return titles, _loader_cells
    if "share_of_bound" in first:
        titles = ("problem", "provider", "samples/s", "ms (p20 to p80)", FASTER, "launches", "kernels", "waits")
        return (*titles, "copies to host / card", "busy", "GiB", "of the bound"), _step_cells
    if first["device"] == "cuda":
        titles = ("problem", "provider", "ms, captured", FASTER, "ms from the host (p20 to p80)", FASTER)
        return (*titles, "% of peak"), _operator_cells
    return ("problem", "provider", "ms (p20 to p80)", FASTER, "GiB", SMALLER), _host_cells


def _one_card(rows: Sequence[Mapping]) -> None:
    """``ValueError`` where rows of several cards, or of a card and of CPUs, would stand in one table."""
    cards = dict.fromkeys(row["gpu"] if row["device"] == "cuda" else "no card" for row in rows)
    if len(cards) > 1:
        raise ValueError(f"one table would mix {', '.join(cards)}: keep the results of each card in a file of its own")


def _problems(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each problem and machine, ours last."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["case"], row["shape"], row["device"], _machine(row)), []).append(row)
    return [sorted(same, key=lambda r: r["provider"] == OURS) for same in found.values()]


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line a case and provider with the machine, then what they were measured with.

    ``ValueError`` where cards would be mixed.
    """
    _one_card(rows)
    titles, cells = _kind(rows)
    lines = [_line(("machine", *titles)), "|" + "---|" * (len(titles) + 1)]
    for same in _problems(rows):
        ours = next((row for row in same if row["provider"] == OURS), None)
        lines += [_line((_machine(row), *cells(row, ours))) for row in same]
    return "\n".join([*lines, "", *_stamps(rows), ""])


def kernels_table(rows: Sequence[dict]) -> str:
    """Markdown: milliseconds and kernels of a step by category, a column a case and provider that was profiled.

    ``ValueError`` where cards would be mixed, or nothing was profiled.
    """
    _one_card(rows)
    rows = [row for row in rows if row.get("categories")]
    if not rows:
        raise ValueError("no row has kernels by category; they come from a run of benchmarks.bench_step on a card")
    titles = [f"{row['case']}, {row['provider']}" for row in rows]
    lines = [_line((f"ms (kernels) of a step on {_machine(rows[0])}", *titles)), "|---|" + "---|" * len(rows)]
    for name in dict.fromkeys(name for row in rows for name in row["categories"]):
        cells = [row["categories"].get(name) for row in rows]
        lines.append(_line((name, *("" if c is None else f"{c['ms']:.2f} ({c['kernels']:.0f})" for c in cells))))
    return "\n".join([*lines, "", *_stamps(rows), ""])


def headline(results: Mapping[str, Sequence[dict]]) -> str:
    """Markdown: whole updates of ours on a card and on a CPU, beside the authors' formulation, as it is and with the
    best library settings. ``results``: rows by the names of ``HEADLINE``; of a CPU's the machine measured last counts.
    """
    titles = ("machine", "one update of", "images/s", "ms", "times as fast as the eager formulation", "as `library`")
    lines, shown = [_line(titles), "|" + "---|" * len(titles)], []
    for name, cases in HEADLINE.items():
        latest = _machine(max(results[name], key=lambda row: row["date"]))
        for case in cases:
            by = {r["provider"]: r for r in results[name] if r["case"] == case and _machine(r) == latest}
            ours = by[OURS]
            speed, problem = _number(ours.get("samples_per_s")), f"{ours['shape'].partition(' (')[0]}, {ours['dtype']}"
            times = [_times(ours, by.get(other), "time_ms") or "not measured" for other in ("eager", "library")]
            lines.append(_line((latest, problem, speed, _number(ours["time_ms"]), *times)))
            shown.append(ours)
    return "\n".join([*lines, "", *_stamps(shown), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _stamps(rows: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(f"Measured on {_stamp(same[0])}." for same in _problems(rows)))


def fill(text: str) -> str:
    """``text`` with every block between markers made anew."""

    def block(name: str, kernels: str | None) -> str:
        if name == "headline":
            return headline({file: load(file) for file in HEADLINE})
        return (kernels_table if kernels else table)(load(name))

    return _BLOCK.sub(lambda m: m[1] + block(m[2], m[3]) + m[5], text)


def main(arguments=None) -> int:
    """Rewrite or check README and ``docs/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    parser.add_argument(
        "--file", type=Path, nargs="+", default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    args = parser.parse_args(arguments)
    differ = 0
    for file in args.file:
        before = file.read_text(encoding="utf-8")
        try:
            after = fill(before)
        except (FileNotFoundError, ValueError) as error:
            print(f"{file.name}: {error}", file=sys.stderr)
            return 2
        if args.check and before != after:
            print(f"{file.name} differs from the results; run: python -m benchmarks.tables", file=sys.stderr)
            differ = 1
        elif before != after:
            file.write_text(after, encoding="utf-8")
    return differ


if __name__ == "__main__":
    sys.exit(main())
