"""The table of ``unit-fast kernels``: what each kernel takes on a card and what it could reach, without a card.

Registers, spills, shared memory and instructions are those of the assembled binaries; bytes and FLOPs are counted;
times are arithmetic on them, the bounds of ``unit_fast_kernels.assembly.bounds``.
"""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from unit_fast_kernels.assembly import budgets
from unit_fast_kernels.assembly.assemble import ARCHITECTURES
from unit_fast_kernels.assembly.bounds import PIPES
from unit_fast_kernels.assembly.record import AssemblyError, require

from unit_fast.errors import UserError, nearest

SHOWN_BY = {"cross_attention": "attention"}
"""An operator without kernels of its own -> the one whose kernels it runs."""
WIDTH = 150
"""Least characters a line: narrower terminals wrap, so that nothing is cut."""


def choose(text: str | None, known: Sequence[str], option: str) -> list[str]:
    """``a,b`` as names among ``known``, all of them without a text; ``UserError`` on an unknown one."""
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {name!r}; {nearest(name, known)}")
    if not names:
        raise UserError(f"{option}: names nothing; known: {', '.join(known)}")
    return names


def assembled_rows(
    op: str | None = None, arch: str | None = None, dtype: str | None = None
) -> tuple[list[budgets.Row], list[str]]:
    """Every kernel that the options choose, assembled, and a line for each budget that is exceeded."""
    try:
        require()
        ops = dict.fromkeys(SHOWN_BY.get(name, name) for name in choose(op, [*budgets.ops(), *SHOWN_BY], "--op"))
        archs, dtypes = choose(arch, tuple(ARCHITECTURES), "--arch"), choose(dtype, tuple(budgets.DTYPES), "--dtype")
        columns = (TextColumn("assembling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=None)
            planned = budgets.plan(list(ops), archs, dtypes)
            rows = budgets.rows(planned, lambda done, total: bar.update(task, completed=done, total=total))
    except AssemblyError as error:
        raise UserError(str(error)) from error
    return rows, budgets.check(rows, budgets.load())[0]


def as_object(row: budgets.Row) -> dict:
    """A row as ``--json`` prints it; times in microseconds by card, of the whole pass (``bound_us``) or the kernel."""
    planned, binary = row.planned, row.assembled
    cards = planned.cards

    def times(bound) -> dict | None:
        found = {card: bound(card) for card in cards}
        return None if None in found.values() else {card: round(us, 3) for card, us in found.items()}

    return {
        "op": planned.op,
        "operator": planned.operator,
        "kernel": planned.launch.name,
        "arch": planned.arch,
        "cards": list(cards),
        "dtype": planned.dtype,
        "shape": planned.shape,
        "size": row.size,
        "constants": dict(planned.launch.constexprs),
        "grid": list(planned.launch.grid),
        "warps": planned.launch.warps,
        "stages": planned.launch.options.get("num_stages"),
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "stack_bytes": binary.stack_bytes,
        "shared_bytes": binary.shared_bytes,
        "occupancy": binary.occupancy,
        "resident_warps": binary.resident_warps,
        "bytes": row.bytes,
        "flops": row.flops,
        "bound_us": times(row.bound_us),
        "issue_us": times(row.issue_us),
        "pipes_us": times(row.pipes_us),
        "instructions_per_score": row.instructions_per_score,
        "per_score": row.per_score and {pipe: round(n, 3) for pipe, n in row.per_score.items()},
    }


def show(rows: Sequence[budgets.Row], wrong: Sequence[str]) -> None:
    """Print the table of each op and architecture, the instructions per score of those that have scores, and whether
    budgets hold."""
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(WIDTH, console.width))
    objects = [as_object(row) for row in rows]
    for op, arch in dict.fromkeys((found["op"], found["arch"]) for found in objects):
        here = [found for found in objects if (found["op"], found["arch"]) == (op, arch)]
        console.print(_resources(f"{op}, {arch}; us: {' / '.join(ARCHITECTURES[arch]).upper()}", here))
        if any(found["per_score"] for found in here):
            console.print(_scores(f"{op}, {arch}: instructions per score", [x for x in here if x["per_score"]]))
    console.print(
        "occ: warps that fit on a multiprocessor, of 64. MB, GFLOP, roofline: of the whole forward or backward pass.\n"
        "issue: one instruction a cycle and scheduler; pipes: busy times of the four arithmetic pipes added up; both\n"
        "of the one kernel, - where its loops cannot be counted. Arithmetic on assembled code, not measured."
    )
    for line in wrong:
        console.print(f"[red]over budget:[/] {line}", soft_wrap=True)
    if not wrong:
        console.print(f"{len(rows)} kernels, all within kernels/budgets.json")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        left = column in ("kernel", "dtype", "shape")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _labels(found: dict) -> tuple[str, ...]:
    name = found["kernel"].strip("_").removeprefix(f"{found['op']}_").removesuffix("_kernel")
    return name, _SHORT[found["dtype"]], found["shape"]


def _times(by_card: dict | None) -> str:
    return "-" if by_card is None else " / ".join(f"{us:.3g}" if us < 1000 else f"{us:.0f}" for us in by_card.values())


def _resources(title: str, objects: Sequence[dict]) -> Table:
    table = _table(
        title, "kernel", "dtype", "shape", "warps", "reg", "spill", "shared", "occ", "issue us", "pipes us", "MB",
        "GFLOP", "roofline us",
    )  # fmt: skip
    last = None
    for found in objects:
        whole = tuple(found[key] for key in ("operator", "dtype", "shape"))  # said once for the kernels of a pass
        table.add_row(
            *_labels(found),
            str(found["warps"]),
            str(found["registers"]),
            str(found["spill_bytes"]),
            f"{found['shared_bytes'] / 1024:.0f} K",
            str(found["resident_warps"]),
            _times(found["issue_us"]),
            _times(found["pipes_us"]),
            *(
                ()
                if whole == last
                else (f"{found['bytes'] / 1e6:.4g}", f"{found['flops'] / 1e9:.3g}", _times(found["bound_us"]))
            ),
        )
        last = whole
    return table


def _scores(title: str, objects: Sequence[dict]) -> Table:
    table = _table(title, "kernel", "dtype", "shape", "sum", *PIPES)
    for found in objects:
        counts = (found["instructions_per_score"], *found["per_score"].values())
        table.add_row(*_labels(found), *(f"{count:.2f}" for count in counts))
    return table
