"""The README's tables of figures, made from ``benchmarks/results/*.jsonl`` so that they cannot drift.

    python -m benchmarks.tables            # rewrite the tables between the README's markers
    python -m benchmarks.tables --check    # exit status 1 where they differ from the results

A table stands between ``<!-- results: bench_step -->`` and ``<!-- end of results -->``.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks._machine import ROOT
from benchmarks._run import RESULTS

_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end of results -->)", re.S)
OURS = "ours"


def load(name: str) -> list[dict]:
    """The rows of one benchmark. ``FileNotFoundError`` names the command that makes them."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing; run: python -m benchmarks.{name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _loader_table(rows: list[dict]) -> str:
    """As ``table``, of loaders; the ratio is ours over the provider in images a second: above 1 we are faster."""
    lines = [
        "| problem | provider | workers | images/s (p20 to p80) | ours / it | CPU ms an image | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    stamps = []
    for key in dict.fromkeys((r["case"], r["shape"], r["device"], r["gpu"] or r["cpu"]) for r in rows):
        same = [r for r in rows if (r["case"], r["shape"], r["device"], r["gpu"] or r["cpu"]) == key]
        ours = next((r for r in same if r["provider"] == OURS), None)
        for row in sorted(same, key=lambda r: r["provider"] == OURS):
            ratio = "" if ours in (None, row) else f"{ours['images_per_s'] / row['images_per_s']:.2f}"
            spread = " to ".join(_number(row[f"images_per_s_{point}"]) for point in ("p20", "p80"))
            lines.append(
                f"| {row['case']}, {row['shape']} | {row['provider']} | {row['workers']} | "
                f"{_number(row['images_per_s'])} ({spread}) | {ratio} | {_number(row['cpu_ms_per_image'])} | "
                f"{_number(row['peak_memory_gib'])} |"
            )
        first = same[0]
        stamps.append(
            f"{first['gpu'] or first['cpu']}, {first['threads']} threads; torch {first['versions']['torch']}; commit "
            f"{first['commit']}; {first['date'][:10]}"
        )
    return "\n".join([*lines, "", *dict.fromkeys(f"Measured on {stamp}." for stamp in stamps), ""])


def table(rows: list[dict]) -> str:
    """Markdown: a line a case and provider, then what they were measured on.

    The ratio is ours over the provider: below 1 we are faster (or smaller). Rows of a loader get a table of their own.
    """
    if "images_per_s" in rows[0]:
        return _loader_table(rows)
    lines = ["| problem | provider | ms (p20 to p80) | ours / it | GiB | ours / it |", "|---|---|---|---|---|---|"]
    stamps = []
    for key in dict.fromkeys((r["case"], r["device"], r["gpu"] or r["cpu"]) for r in rows):
        same = [r for r in rows if (r["case"], r["device"], r["gpu"] or r["cpu"]) == key]
        ours = next((r for r in same if r["provider"] == OURS), None)
        for row in sorted(same, key=lambda r: r["provider"] == OURS):
            memory, ratio, memory_ratio = row["peak_memory_gib"], "", ""
            if ours is not None and row is not ours:
                ratio = f"{ours['time_ms'] / row['time_ms']:.2f}"
                if memory and ours["peak_memory_gib"]:
                    memory_ratio = f"{ours['peak_memory_gib'] / memory:.2f}"
            spread = f"{_number(row['time_ms'])} ({_number(row['p20_ms'])} to {_number(row['p80_ms'])})"
            size = "" if memory is None else _number(memory)
            lines.append(
                f"| {row['shape']}, {row['dtype']} | {row['provider']} | {spread} | {ratio} | {size} | {memory_ratio} |"
            )
        machine = ours["gpu"] or f"{ours['cpu']}, {ours['threads']} threads" if ours else key[2]
        stamps.append(
            f"{machine}; torch {same[0]['versions']['torch']}; commit {same[0]['commit']}; {same[0]['date'][:10]}"
        )
    return "\n".join([*lines, "", *dict.fromkeys(f"Measured on {stamp}." for stamp in stamps), ""])


def fill(text: str) -> str:
    """``text`` with every block between markers made anew."""
    return _BLOCK.sub(lambda m: m[1] + table(load(m[2])) + m[4], text)


def main(arguments=None) -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(arguments)
    before = args.file.read_text(encoding="utf-8")
    after = fill(before)
    if args.check:
        if before != after:
            print(f"{args.file.name} differs from the results; run: python -m benchmarks.tables", file=sys.stderr)
        return int(before != after)
    args.file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
