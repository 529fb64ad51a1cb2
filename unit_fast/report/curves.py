"""Learning curves: per task the validation metric and the loss against the step, and the run's rates (Figure D.1)."""

import io
import math
import re
from pathlib import Path

from unit_fast.report.run import Run, number, updates
from unit_fast.tasks import Task

INK, GRID = "#1c2430", "#d4d9e1"
"""Text and grid colours; in the themed picture they follow the page."""
METRIC, LOSS, VALIDATION, CHANCE = "#2f6fde", "#8a93a3", "#d9641e", "#8a93a3"
SHARES = ("#2f6fde", "#d9641e", "#2a9d6f", "#b14fc5", "#c9a227", "#4fb3d9", "#e05c7f", "#7a7f8a")

METRIC_NAMES = {"detection_mean_ap": "AP", "vqa_accuracy": "accuracy", "accuracy": "accuracy"}
"""How a metric is called in figures and tables."""

_POINTS = 300
"""Points drawn of one curve; more are averaged."""

_RIM = 1.03
"""Ends of the axes of steps, in steps of the run: the last marker is drawn whole."""

_THEME = (
    "<style>:root{--ink:#1c2430;--grid:#d4d9e1}"
    "@media (prefers-color-scheme:dark){:root{--ink:#d7dce5;--grid:#3a4353}}</style>"
)


def draw_curves(run: Run, published: dict[str, float] | None = None) -> str:
    """The curves of ``run`` as the text of an SVG picture; ``published`` holds reference values by short task name."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    tasks, published = run.tasks, published or {}
    columns = min(4, max(2, len(tasks)))
    rows = math.ceil(len(tasks) / columns)
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "unit_fast", "font.size": 8, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
        "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.6, "lines.linewidth": 1.4, "axes.axisbelow": True,
        "axes.facecolor": "none", "text.parse_math": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(3.1 * columns, 3.3 * rows + 2.0), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        parts = figure.subfigures(rows + 1, 1, height_ratios=[3.3] * rows + [2.0], squeeze=False)[:, 0]
        end = max(run.last_step or 1, 1)
        for row, part in enumerate(parts[:-1]):
            part.patch.set_alpha(0.0)
            axes = part.subplots(2, columns, sharex=True, squeeze=False, height_ratios=[1.25, 1])
            for column in range(columns):
                pair, index = axes[:, column], row * columns + column
                if index < len(tasks):
                    _task(pair, run, tasks[index], published.get(tasks[index].short), end)
                else:
                    pair[0].set_visible(False)
                    pair[1].set_visible(False)
        parts[-1].patch.set_alpha(0.0)
        _rates(parts[-1].subplots(1, 3), run, tasks, end)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _numbered_ids(text.getvalue())


def _numbered_ids(svg: str) -> str:
    """``svg`` with clip paths and markers numbered in order: matplotlib names them after memory addresses."""
    names = dict.fromkeys(re.findall(r'id="([pm][0-9a-f]{10})"', svg))
    order = {name: f"{name[0]}{i}" for i, name in enumerate(sorted(names, key=lambda n: svg.index(n)))}
    return re.sub(r"\b[pm][0-9a-f]{10}\b", lambda m: order.get(m[0], m[0]), svg)


def write_curves(run: Run, published: dict[str, float] | None = None) -> str:
    """Write ``curves.svg`` into the run folder; returns the themed picture for the page."""
    svg = draw_curves(run, published)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    paper = f'<rect width="{size[1]}" height="{size[2]}" fill="#ffffff"/>'
    start = svg.index(">", svg.index("<svg")) + 1
    (Path(run.folder) / "curves.svg").write_text(svg[:start] + paper + svg[start:], encoding="utf-8")
    themed = svg[svg.index("<svg") : start] + _THEME + svg[start:]
    return themed.replace(f": {INK}", ": var(--ink)").replace(f": {GRID}", ": var(--grid)")


def _task(axes, run: Run, task: Task, published: float | None, end: int) -> None:
    top, bottom = axes
    top.set_title(task.title, fontsize=9, fontweight="bold", loc="left")
    evaluations = run.scored(task)
    if evaluations:
        steps = [row["step"] for row in evaluations]
        values = [row["metrics"][task.metric] for row in evaluations]
        top.plot(steps, values, color=METRIC, marker="o", markersize=3)
        curves = values
        if task.is_detection:
            points = [(r["step"], r["metrics"]["AP50"]) for r in evaluations if number(r["metrics"].get("AP50"))]
            if points:
                top.plot(*zip(*points), color=METRIC, linewidth=1.0, linestyle="--")
                top.annotate("AP50", points[-1], xytext=(-2, 3), textcoords="offset points", fontsize=7, ha="right")
                curves = values + [y for _, y in points]
        top.annotate(
            f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(-2, -10), textcoords="offset points", fontsize=7.5,
            ha="right", color=METRIC, fontweight="bold",
        )  # fmt: skip
        chance = evaluations[-1]["metrics"].get("chance")
        if number(chance) and chance > 0:
            top.axhline(chance, color=CHANCE, linewidth=0.9, linestyle=":")
            top.annotate("chance", (0, chance), xytext=(2, 2), textcoords="offset points", fontsize=7, color=CHANCE)
            curves = [*curves, chance]
        if published is not None:
            top.axhline(published, color=VALIDATION, linewidth=0.9, linestyle=":")
            top.annotate("published", (0, published), xytext=(2, 2), textcoords="offset points", fontsize=7)
            curves = [*curves, published]
        top.set_ylim(0, max(0.05, min(1.02, 1.15 * max(curves))))
    else:
        _say(top, "not evaluated yet")
        top.set_yticks([])
    top.set_ylabel(METRIC_NAMES[task.metric])
    rows = [row for row in run.train.get(task.short, []) if number(row.get("loss"))]
    if rows:
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        x, y = _reduced(steps, losses, _POINTS)
        bottom.plot(x, y, color=LOSS, linewidth=0.7, alpha=0.55)
        x, y = _reduced(steps, running_mean(losses), _POINTS)
        bottom.plot(x, y, color=INK, linewidth=1.2)
        # the first steps of a run may be far above all others
        low, high = min(losses), sorted(losses)[math.ceil(0.98 * (len(losses) - 1))]
        if high > low:
            bottom.set_ylim(max(0.0, low - 0.1 * (high - low)), high + 0.15 * (high - low))
    else:
        _say(bottom, "no training step")
        bottom.set_yticks([])
    points = [(r["step"], r["metrics"]["loss"]) for r in evaluations if number(r["metrics"].get("loss"))]
    if points:
        bottom.plot(*zip(*points), color=VALIDATION, marker="o", markersize=2.5, linewidth=1.0)
        if rows:
            _widen(bottom, [y for _, y in points])
    bottom.set_ylabel("loss")
    bottom.set_xlim(0, _RIM * end)
    _few_ticks(bottom)


def _rates(axes, run: Run, tasks: list[Task], end: int) -> None:
    from matplotlib.ticker import NullFormatter

    rate, norm, share = axes
    rows = sorted((row for rows in run.train.values() for row in rows), key=lambda row: row["step"])
    for axis, key, title in ((rate, "lr", "Learning rate"), (norm, "grad_norm", "Gradient norm before clipping")):
        points = [(row["step"], row[key]) for row in rows if number(row.get(key))]
        axis.set_title(title, fontsize=9, loc="left")
        if points:
            axis.plot(*_reduced(*zip(*points), _POINTS), color=METRIC, linewidth=1.2)
        else:
            _say(axis, "not logged")
    if any(number(row.get("grad_norm")) and row["grad_norm"] > 0 for row in rows):
        norm.set_yscale("log")
        norm.yaxis.set_major_formatter("{x:g}")
        norm.yaxis.set_minor_formatter(NullFormatter())
    share.set_title("Share of the updates so far", fontsize=9, loc="left")
    if rows:
        counts, history = dict.fromkeys((t.short for t in tasks), 0), []
        owner = [(row["step"], short, updates(row)) for short, rows in run.train.items() for row in rows]
        for step, short, done in sorted(owner):
            counts[short] += done
            total = sum(counts.values())
            history.append((step, [counts[t.short] / total for t in tasks]))
        history = history[:: max(1, len(history) // _POINTS)] + history[-1:]
        steps = [step for step, _ in history]
        share.stackplot(steps, *zip(*(shares for _, shares in history)), colors=SHARES, linewidth=0)
        low = 0.0
        for index, task in enumerate(tasks):
            height = history[-1][1][index]
            if height > 0.035:
                share.annotate(
                    f"{task.short} {height:.0%}", (end, low + height / 2), xytext=(4, 0), textcoords="offset points",
                    fontsize=7, va="center", annotation_clip=False,
                )  # fmt: skip
            low += height
        share.set_ylim(0, 1)
    for axis in axes:
        axis.set_xlim(0, end if axis is share else _RIM * end)
        axis.set_xlabel("step")
        _few_ticks(axis)


def _say(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=CHANCE)


def _few_ticks(axis) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _widen(axis, values) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, min(values) * 0.95), max(high, max(values) * 1.05))


def running_mean(values: list[float]) -> list[float]:
    """Running mean over about a tenth of the curve, at most 50 values, each in the middle of its own: it does not lag.
    Towards the ends the window shrinks to what is there on both sides."""
    half = max(1, min(25, len(values) // 20)) if len(values) > 2 else 0
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _reduced(x, y, points: int) -> tuple[list, list]:
    """At most ``points`` pairs: means of equal parts of the curve; the last pair stays as it is."""
    if len(x) <= points:
        return list(x), list(y)
    edges = [i * len(x) // points for i in range(points + 1)]
    parts = list(zip(edges[:-1], edges[1:]))
    means = [[sum(v[a:b]) / (b - a) for a, b in parts] for v in (x, y)]
    return [*means[0], x[-1]], [*means[1], y[-1]]
