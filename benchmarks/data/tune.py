"""The best settings of our loader on a machine: engine, workers, prefetch (``bench_data --tune``)."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.data import rounds
from benchmarks.data.child import Child
from benchmarks.data.providers import Spec
from benchmarks.runner.timing import quantiles
from unit_fast.config import DataConfig
from unit_fast.data.images.engine import MOST_THREADS, engine_of

PREFETCH = (1, 2, 4)
FINALISTS = 3
NOTABLE = 1.10
"""How much faster than the defaults the best must be to be told, in four rounds of five at least a little."""


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """What is tuned."""

    provider: str
    workers: int
    prefetch: int

    def flags(self) -> str:
        """As the command line takes it."""
        engine = "torchvision" if self.provider == "ours_torchvision" or not rounds.has_dali() else "dali"
        whole = " --data.dali-graph whole" if self.provider == "ours_whole" else ""
        return f"--data.engine {engine}{whole} --data.workers {self.workers} --data.prefetch {self.prefetch}"

    def of(self, spec: Spec) -> dict:
        return dataclasses.asdict(dataclasses.replace(spec, **dataclasses.asdict(self)))


def workers_of(cores: int) -> list[int]:
    """1 to one more than there are cores; of many cores powers of two."""
    if cores <= 4:
        return list(range(1, cores + 2))
    return sorted({2**n for n in range(cores.bit_length())} | {cores, cores + 1})


def defaults(cores: int) -> Setting:
    """What ``unit_fast/config.py`` comes to on a machine with so many cores."""
    data = DataConfig()
    by_dali = engine_of(data) == "dali"
    workers = data.workers or (min(MOST_THREADS, cores) if by_dali else 0)
    return Setting("ours" if by_dali or not rounds.has_dali() else "ours_torchvision", workers, data.prefetch)


def tune(args: argparse.Namespace, specs: Sequence[Spec], console: Console) -> Setting:
    """Try all settings in short runs, then the best of them and the defaults in interleaved rounds.

    Prints what was found, a table a case, and the flags of the best. Returns that setting.
    """
    own = [name for name in rounds.providers_of() if name.startswith("ours")]
    own = [name for name in own if not args.provider or name == "ours" or name in args.provider]
    default = defaults(args.threads)
    settings = [
        Setting(name, workers, prefetch)
        for name in own
        for workers in (workers_of(args.threads)[:1] if args.quick else workers_of(args.threads))
        for prefetch in (PREFETCH[:2] if args.quick else PREFETCH)
    ]
    if default not in settings:
        settings.append(default)
    speeds = {}
    for spec in specs:
        found = {}
        for name in own:
            mine = [setting for setting in settings if setting.provider == name]
            with Child(rounds.MODULE, args.threads) as child:
                if name == "ours" and rounds.has_dali():  # so that no setting is measured while it checks images
                    rounds.first_pass(child, dataclasses.replace(spec, workers=args.threads))
                for setting in [*mine, *mine]:
                    child.ask("open", **setting.of(spec))
                    settle = rounds.spare(setting.workers, setting.prefetch)
                    run = child.ask("run", settle=settle, count=args.batches)
                    found[setting] = max(found.get(setting, 0.0), run["images"] / run["seconds"])
        speeds[spec.case] = found
        console.print(_table(f"{spec.case}: images/s in short runs", sorted(found.items(), key=lambda x: -x[1])))
    ranked = sorted(settings, key=lambda s: -_score(s, speeds))
    finalists = list(dict.fromkeys([*ranked[:FINALISTS], default]))
    last = {}
    for spec in specs:
        with contextlib.ExitStack() as stack:
            children = {s.flags(): stack.enter_context(Child(rounds.MODULE, args.threads)) for s in finalists}
            for setting, child in zip(finalists, children.values()):
                child.ask("open", **setting.of(spec))
            settle = max(rounds.spare(s.workers, s.prefetch) for s in finalists)
            answers = rounds.rounds_of(children, settle, args.batches, args.rounds, args.warmup)
        found = {s: [a["images"] / a["seconds"] for a in answers[s.flags()]] for s in finalists}
        # by rounds, so that a machine that slows down slows both sides of a ratio
        last[spec.case] = {s: quantiles([x / y for x, y in zip(v, found[default])]) for s, v in found.items()}
        title = f"{spec.case}: images/s, median of {args.rounds} interleaved rounds; over the defaults"
        median = [(s, quantiles(v)[0]) for s, v in found.items()]
        console.print(_table(title, median, last[spec.case]))
    best = max(finalists, key=lambda s: math.prod(ratios[s][0] for ratios in last.values()))
    gain = math.prod(ratios[best][0] for ratios in last.values()) ** (1 / len(last))
    console.print(f"best: {best.flags()}", highlight=False, soft_wrap=True)
    if best == default:
        verdict = "is what the defaults come to"
    elif gain > NOTABLE and all(ratios[best][1] > 1 for ratios in last.values()):
        verdict = f"is {gain:.2f} times as fast as the defaults, which come to {default.flags()}"
    else:
        verdict = f"is {gain:.2f} times as fast as the defaults ({default.flags()}) or less: no reason to change them"
    console.print(f"It {verdict}.", highlight=False, soft_wrap=True)
    return best


def _score(setting: Setting, speeds: dict[str, dict[Setting, float]]) -> float:
    """Mean over the cases of the logarithm of the speed, relative to the case's best."""
    return sum(math.log(found[setting] / max(found.values())) for found in speeds.values()) / len(speeds)


def _table(title: str, found, ratios: dict | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("settings", no_wrap=True)
    table.add_column("images/s", justify="right")
    if ratios is not None:
        table.add_column("x defaults (p20 to p80)", justify="right")
    for setting, speed in found:
        ratio = () if ratios is None else ("{:.2f} ({:.2f} to {:.2f})".format(*ratios[setting]),)
        table.add_row(setting.flags(), f"{speed:.1f}", *ratio)
    return table
