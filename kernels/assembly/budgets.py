"""Every kernel x card x dtype x shape that UniT, DETR and BERT use: what is launched, its binary, its budget.

A kernel module takes part by having ``SHAPES`` {name: shape} and ``launches(shape, dtype, device) -> [(operator,
arguments)]``, the registered operators of a forward and a backward pass with arguments for them. ``rows`` assembles
them; ``budgets.json`` holds what each was allowed to take when it was last looked at, and ``check`` compares. Optional:
``score_tile(kernel, constants)`` and ``scores(shape)``, how many scores one turn of a program's inner loop computes and
how many there are; ``loop_turns(kernel, constants, shape)``, how often the one loop of a kernel without scores turns in
all programs together.

``python -m unit_fast_kernels.assembly.budgets --write [--op OP]`` rewrites the table.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from unit_fast_kernels.assembly import bounds
from unit_fast_kernels.assembly.assemble import ARCHITECTURES, SHARED_LIMIT, Assembled, assemble_all
from unit_fast_kernels.assembly.record import Launch, record
from unit_fast_kernels.shared.cards import CARDS
from unit_fast_kernels.shared.registration import REGISTERED

PATH = Path(__file__).resolve().parent / "budgets.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FIGURES = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "occupancy", "instructions_per_score")
"""What a budget holds, in this order; more is worse but for the occupancy."""
_SLACK = 0.005
"""Instructions per score are kept with two decimals."""


def ops() -> list[str]:
    """The kernel modules that say what they launch."""
    names = sorted(p.stem for p in Path(__file__).parents[1].glob("*") if p.stem[0] not in "_.")
    return [name for name in names if hasattr(module(name), "launches")]


def module(op: str):
    """The module of an op."""
    return importlib.import_module(f"unit_fast_kernels.{op}")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One kernel that one pass of an op launches."""

    op: str
    operator: str
    """The registered operator: forward or backward."""
    arch: str
    cards: tuple[str, ...]
    """The cards of ``arch`` whose launch parameters give this binary."""
    dtype: str
    shape: str
    launch: Launch

    @property
    def name(self) -> str:
        """The key of the budget."""
        return f"{self.op}/{self.launch.name}"

    @property
    def place(self) -> tuple[str, str, str, str]:
        """Where its budget stands in the table."""
        return self.name, self.arch, self.dtype, self.shape


def plan(
    only: Sequence[str] | None = None,
    archs: Iterable[str] = tuple(ARCHITECTURES),
    dtypes: Iterable[str] = tuple(DTYPES),
    wanted: Callable[[str, str, str], bool] = lambda op, dtype, shape: True,
) -> list[Planned]:
    """What is launched, for the ops in ``only`` (all without it) and where ``wanted(op, dtype, shape)``; launches of
    two cards of an architecture that give the same binary are one."""
    found: dict[tuple, Planned] = {}
    for op in ops() if only is None else only:
        here = module(op)
        for shape, size in here.SHAPES.items():
            for dtype in dtypes:
                if not wanted(op, dtype, shape):
                    continue
                for arch in archs:
                    for card in ARCHITECTURES[arch]:
                        for operator, launch in _launched(here, size, DTYPES[dtype], card):
                            key = (op, operator, arch, dtype, shape, launch.key(arch))
                            cards = (*found[key].cards, card) if key in found else (card,)
                            found[key] = Planned(
                                op=op, operator=operator, arch=arch, cards=tuple(dict.fromkeys(cards)), dtype=dtype,
                                shape=shape, launch=launch,
                            )  # fmt: skip
    return list(found.values())


def _launched(here, size, dtype: torch.dtype, card: str) -> list[tuple[str, Launch]]:
    operators: list[str] = []

    def passes():
        for operator, arguments in here.launches(size, dtype, "cuda:0"):
            before = len(launches)
            REGISTERED[operator].launch(*arguments)
            operators.extend([operator] * (len(launches) - before))

    launches = []
    record(passes, card, into=launches)
    return list(zip(operators, launches, strict=True))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A planned kernel and its binary."""

    planned: Planned
    assembled: Assembled

    @property
    def size(self) -> tuple:
        """The numbers behind the shape's name."""
        return module(self.planned.op).SHAPES[self.planned.shape]

    def _work(self, what: str, *arguments) -> float:
        suffix = "_bwd" if "bwd" in self.planned.operator else ""
        return getattr(module(self.planned.op), what + suffix)(self.size, *arguments)

    @cached_property
    def bytes(self) -> int:
        """Bytes that the whole pass (forward or backward, all of its kernels) must move."""
        return int(self._work("bytes_moved", DTYPES[self.planned.dtype]))

    @cached_property
    def flops(self) -> int:
        """FLOPs of the whole pass."""
        return int(self._work("flops"))

    @cached_property
    def loop(self) -> Mapping[str, int]:
        """Opcodes of the hot loop."""
        return bounds.hot_loop(self.assembled.loops, self.assembled.instructions)

    @cached_property
    def scores_per_thread(self) -> float | None:
        """Scores that a thread computes in one turn of the hot loop; None where the op has no scores."""
        tile = getattr(module(self.planned.op), "score_tile", lambda kernel, constants: None)(
            self.planned.launch.name, self.planned.launch.constexprs
        )
        return tile and tile / (32 * self.planned.launch.warps)

    @cached_property
    def per_score(self) -> dict[str, float] | None:
        """Instructions per score by pipe, of the hot loop."""
        if self.scores_per_thread is None:
            return None
        return {pipe: n / self.scores_per_thread for pipe, n in bounds.by_pipe(self.loop).items()}

    @cached_property
    def instructions_per_score(self) -> float | None:
        """Their sum."""
        return None if self.per_score is None else round(sum(self.per_score.values()), 2)

    def bound_us(self, card: str) -> float:
        """The roofline of the whole pass."""
        return bounds.roofline_us(self.bytes, self.flops, self.planned.dtype, CARDS[card])

    @cached_property
    def warp_instructions(self) -> float | None:
        """Instructions that all warps issue together: the hot loop's for all scores; else those of the whole kernel by
        every warp, a loop's as often as the op's ``loop_turns`` says. None where nothing says that."""
        loop, warps, programs = sum(self.loop.values()), self.planned.launch.warps, self.planned.launch.programs
        if self.scores_per_thread is not None:
            return self._warp_turns * loop
        whole = sum(self.assembled.instructions.values())
        if not self.assembled.loops:
            return whole * warps * programs
        told = getattr(module(self.planned.op), "loop_turns", lambda kernel, constants, shape: None)
        turns = told(self.planned.launch.name, self.planned.launch.constexprs, self.size)
        if turns is None or len(self.assembled.loops) > 1:
            return None
        return warps * (turns * loop + (whole - loop) * programs)

    @property
    def _warp_turns(self) -> float:
        """How often warps go through the hot loop, all together, to compute all scores."""
        return module(self.planned.op).scores(self.size) / (32 * self.scores_per_thread)

    def issue_us(self, card: str) -> float | None:
        """Time to issue ``warp_instructions``."""
        count = self.warp_instructions
        return None if count is None else bounds.issue_us(count, CARDS[card])

    def pipes_us(self, card: str) -> float | None:
        """The sum of the pipes for all scores; None where the op has no scores."""
        if self.scores_per_thread is None:
            return None
        return bounds.pipes_us(self.loop, self._warp_turns, CARDS[card])

    def figures(self) -> dict[str, float]:
        """The figures that a budget limits."""
        taken = {name: getattr(self.assembled, name) for name in FIGURES[:-1]}
        return taken if self.per_score is None else taken | {FIGURES[-1]: self.instructions_per_score}


def rows(planned: Sequence[Planned], progress: Callable[[int, int], None] | None = None) -> list[Row]:
    """Assemble what is planned, each binary once."""
    binaries = assemble_all([(p.launch, p.arch) for p in planned], progress=progress)
    return [Row(planned=p, assembled=binaries[p.launch.key(p.arch)]) for p in planned]


# ----------------------------------------------------------------------------------------------------------- budgets


def worst(found: Iterable[Row]) -> dict[tuple, dict[str, float]]:
    """Place in the table -> figures; where one place has several launches, the worst of each figure."""
    table: dict[tuple, dict[str, float]] = {}
    for row in found:
        here = table.setdefault(row.planned.place, {})
        for name, value in row.figures().items():
            pick = min if name == "occupancy" else max
            here[name] = pick(here.get(name, value), value)
    return table


def load(path: Path = PATH) -> dict:
    """The table: kernel -> architecture -> dtype -> shape -> figures, and ``reason`` where a float32 kernel spills."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _at(table: Mapping, place: tuple) -> Mapping | None:
    for key in place:
        table = table.get(key)
        if table is None:
            return None
    return table


def check(found: Iterable[Row], table: Mapping) -> tuple[list[str], list[str]]:
    """(what is wrong, what is better than its budget), a line each.

    Wrong is whatever takes more than its budget, has none, takes more shared memory than a block may, or spills: bf16
    and fp16 never may, float32 within a budget that gives a reason.
    """
    wrong, better = [], []
    for place, figures in worst(found).items():
        where, (_, arch, dtype, _) = " ".join(place), place
        if figures["shared_bytes"] > SHARED_LIMIT[arch]:
            wrong.append(f"{where}: {figures['shared_bytes']} bytes of shared memory; a block has {SHARED_LIMIT[arch]}")
        budget = _at(table, place)
        excused = dtype == "float32" and budget is not None and budget.get("reason")
        for name in ("spill_bytes", "stack_bytes"):
            if figures[name] and not excused:
                remedy = "give a reason in the budget" if dtype == "float32" else "none may be"
                wrong.append(f"{where}: {name} {figures[name]}: {remedy}")
        if budget is None:
            wrong.append(f"{where}: no budget; python -m unit_fast_kernels.assembly.budgets --write")
            continue
        for name, value in figures.items():
            excess = value - budget[name] if name in budget else float("inf")
            excess = -excess if name == "occupancy" else excess
            slack = _SLACK if name == FIGURES[-1] else 0
            if excess > slack:
                wrong.append(f"{where}: {name} {value:g}, the budget is {budget.get(name)}")
            elif excess < -slack:
                better.append(f"{where}: {name} {value:g}, the budget is {budget[name]}")
    return wrong, better


def write(found: Iterable[Row], path: Path = PATH, only: Sequence[str] | None = None) -> None:
    """Put the figures of ``found`` into the table, in place of those of its ops (``only``, or all); reasons stay."""
    old = load(path)
    table = {k: v for k, v in old.items() if only is not None and k.partition("/")[0] not in only}
    for place, figures in worst(found).items():
        here = table
        for key in place[:-1]:
            here = here.setdefault(key, {})
        reason = (_at(old, place) or {}).get("reason")
        here[place[-1]] = figures | ({"reason": reason} if reason else {})
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False, encoding="utf-8") as file:
        file.write(_text(table))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _text(table: Mapping, depth: int = 0) -> str:
    """JSON with the figures of a shape on one line."""
    if depth == 4:
        return json.dumps(table)
    inner = ",\n".join(f"{' ' * (depth + 1)}{json.dumps(k)}: {_text(table[k], depth + 1)}" for k in sorted(table))
    return "{\n" + inner + f"\n{' ' * depth}}}" + ("\n" if depth == 0 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the budgets, or rewrite them."""
    parser = argparse.ArgumentParser(description="Assemble every kernel and compare with its budget.")
    parser.add_argument("--write", action="store_true", help="rewrite the table instead")
    parser.add_argument("--op", action="append", choices=ops(), help="only this op (repeatable)")
    options = parser.parse_args(arguments)
    found = rows(plan(options.op))
    if options.write:
        write(found, only=options.op)
    wrong, better = check(found, load())
    for line in (*better, *wrong):
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
