"""The project's goals for a card, and what result rows say of them: met, missed or not measured.

A goal is judged on replayed steps (``captured_ms``) where it speaks of kernels: from the host one measures launches. It
is not measured where its row is missing, where the row has no such figure, or where the goal is for another card; it is
never guessed.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.runner.machine import card_of, peak_of


class NotMeasured(LookupError):
    """Why a figure is not there."""


class Results:
    """Rows of result files, by what they are of; the last of equals counts. ``gpu`` is their card's name."""

    def __init__(self, rows: Sequence[Mapping]):
        self._rows = {(r["benchmark"], r["case"], r["provider"]): r for r in rows if r.get("device") == "cuda"}
        cards = {r["gpu"] for r in self._rows.values()}
        if len(cards) > 1:
            raise ValueError(f"results of several cards: {', '.join(sorted(map(str, cards)))}; judge them apart")
        self.gpu = next(iter(cards), None)

    def row(self, benchmark: str, case: str, provider: str = "ours") -> Mapping:
        """``NotMeasured`` where there is none, or where it has no figures."""
        found = self._rows.get((benchmark, case, provider))
        if found is None:
            raise NotMeasured(f"no row of {benchmark}, {case}, {provider}")
        if found.get("status", "ok") != "ok":
            raise NotMeasured(f"{benchmark}, {case}, {provider}: {found['status']}")
        return found

    def figure(self, key: str, benchmark: str, case: str, provider: str = "ours") -> float:
        """One figure of a row."""
        found = self.row(benchmark, case, provider).get(key)
        if found is None:
            raise NotMeasured(f"{benchmark}, {case}, {provider} has no {key}")
        return found

    def phase(self, phase: str, benchmark: str, case: str, provider: str = "ours") -> float:
        """Milliseconds of a phase of replayed steps."""
        row = self.row(benchmark, case, provider)
        if not row.get("captured_phases_ms"):
            why = row.get("captured_why_not") or "an older row"
            raise NotMeasured(f"{benchmark}, {case}, {provider} was not captured: {why}")
        return row["captured_phases_ms"][phase]

    def own_kernels(self, benchmark: str, case: str, beginnings: tuple[str, ...]) -> float:
        """How many kernels of ours a step launches, by their names' beginnings."""
        names = self.figure("kernels_by_name", benchmark, case)
        found = [count for name, count in names.items() if name.startswith(beginnings)]
        if not found:
            raise NotMeasured(f"{benchmark}, {case}: the profile has no kernel {' or '.join(beginnings)}")
        return sum(found)

    def bandwidth(self) -> float:
        """Bytes a second of the card. ``NotMeasured`` where its peaks are not known."""
        peak = peak_of(self.gpu)
        if peak is None:
            raise NotMeasured(f"the peaks of {self.gpu} are not known")
        return peak["bytes"]


@dataclass(frozen=True)
class Goal:
    """One figure to reach."""

    what: str
    at_least: bool
    """Whether more is better."""
    target: float | Mapping[str, float]
    """For any card, or by card."""
    find: Callable[[Results], float]
    unit: str = ""

    def judged(self, results: Results) -> dict:
        """The goal, what was found, and the verdict with its reason."""
        target, card = self.target, card_of(results.gpu) if results.gpu else None
        row = {"goal": self.what, "unit": self.unit, "wanted": ">=" if self.at_least else "<=", "target": target}
        row |= {"found": None, "verdict": "not measured", "why": None}
        try:
            row["found"] = round(float(self.find(results)), 4)
        except NotMeasured as error:
            return row | {"why": str(error)}
        if isinstance(target, Mapping):
            if card not in target:
                return row | {"why": f"the goal is for {', '.join(target)}; the rows are of {card}"}
            target = row["target"] = target[card]
        met = row["found"] >= target if self.at_least else row["found"] <= target
        return row | {"verdict": "met" if met else "missed"}


_Find = Callable[[Results], float]
ATTENTION = ("bench_attention", "unit_encoder")
DATA = ("bench_data", "detection_train")
FROZEN_NORM = ("bench_frozen_bn_act", "resnet50_layer1_block")
LOSSES = ("bench_set_loss", "unit_coco")
MATCHING = ("bench_match", "unit_coco")
NORMS = ("unit_encoder_pos_800x1344", "bert_base")


def _work(count: str, op: str, case: str, phase: str, *dtype: torch.dtype) -> float:
    """What a function of the op's module counts, of a phase of one of its shapes."""
    module = importlib.import_module(f"unit_fast_kernels.{op}")
    return getattr(module, count + ("_bwd" if phase == "backward" else ""))(module.SHAPES[case], *dtype)


def _teraflops(phase: str) -> _Find:
    return lambda r: _work("flops", "attention", ATTENTION[1], phase) / r.phase(phase, *ATTENTION) * 1e-9


def _floors(benchmark: str, op: str, cases: Sequence[str]) -> _Find:
    """The worst time of a direction over the time that its bytes take at the card's bandwidth, in bfloat16."""

    def times(results: Results, case: str, phase: str) -> float:
        floor_ms = _work("bytes_moved", op, case, phase, torch.bfloat16) / results.bandwidth() * 1e3
        return results.phase(phase, benchmark, case) / floor_ms

    return lambda results: max(times(results, case, phase) for case in cases for phase in ("forward", "backward"))


def _figure(key: str, *row: str) -> _Find:
    return lambda results: results.figure(key, *row)


def _step(key: str, case: str = "coco_b2") -> _Find:
    return _figure(key, "bench_step", case)


def _over(above: _Find, below: _Find) -> _Find:
    return lambda results: above(results) / below(results)


def _own_kernels(row: tuple[str, str], *beginnings: str) -> _Find:
    return lambda results: results.own_kernels(*row, beginnings)


def _times_eager(results: Results) -> float:
    keys = [("captured_ms", "bench_residual_norm", case) for case in NORMS]
    return min(results.figure(*key, "eager") / results.figure(*key) for key in keys)


def _adamw(results: Results) -> float:
    results.figure("captured_ms", "bench_optimizer", "all_used")  # the share of the peak is that of replays then
    return results.figure("percent_of_peak", "bench_optimizer", "all_used")


_COCO = "COCO DC5 800x1344, bfloat16"
GOALS = (
    Goal(f"{_COCO}, batch 8", True, {"a100": 80, "h200": 220}, _step("samples_per_s", "coco_b8"), "images/s"),
    Goal(f"{_COCO}, batch 2", True, {"h200": 170}, _step("samples_per_s"), "images/s"),
    Goal(f"{_COCO}, batch 2: waits of the host", False, 0, _step("waits"), "a step"),
    Goal(f"{_COCO}, batch 2: copies to the host", False, 0, _step("copies_to_host"), "a step"),
    Goal(f"{_COCO}, batch 2: copies from the host", False, 0, _step("copies_to_device"), "a step"),
    Goal(f"{_COCO}, batch 2: kernels", False, 700, _step("kernels"), "a step"),
    Goal(f"{_COCO}, batch 2: kernels, stretch", False, 400, _step("kernels"), "a step"),
    Goal(f"{_COCO}, batch 2: card busy", True, 0.97, _step("busy_share"), "of the step's time"),
    Goal("encoder self-attention, forward", True, {"a100": 125, "h200": 250}, _teraflops("forward"), "TFLOP/s"),
    Goal("encoder self-attention, backward", True, {"a100": 100, "h200": 200}, _teraflops("backward"), "TFLOP/s"),
    Goal(
        "cross-attention, batch 8, each direction", False, 1.5,
        _floors("bench_cross_attention", "attention", ("unit_detection_b8", "unit_vqa_b8")), "x the time of its bytes",
    ),
    Goal("matching of 96 problems of 100 x 32", False, 0.06, _figure("captured_ms", *MATCHING), "ms"),
    Goal("matching: launches", False, 2, _own_kernels(MATCHING, "_match_cost", "_assignment"), "kernels"),
    Goal("matching: waits of the host", False, 0, _figure("waits", *MATCHING), "a step"),
    Goal(  # from the host both: the peer reads the host and cannot be captured
        "matching against torch-linear-assignment", True, 10,
        _over(_figure("time_ms", *MATCHING, "torch_linear_assignment"), _figure("time_ms", *MATCHING)), "x faster",
    ),
    Goal("set loss: launches, both directions", False, 2, _own_kernels(LOSSES, "_set_loss"), "kernels"),
    Goal("AdamW with masks, 201 M parameters", True, 90, _adamw, "% of the bandwidth"),
    Goal(
        "residual + dropout + norm, widths 256 and 768, each direction", True, 85,
        lambda r: 100 / _floors("bench_residual_norm", "residual_norm", NORMS)(r), "% of the bandwidth",
    ),
    Goal("residual + dropout + norm against eager", True, 2.5, _times_eager, "x faster"),
    Goal(
        "frozen norm + ReLU + residual: passes, both directions", False, 2,
        _own_kernels(FROZEN_NORM, "_frozen_bn_act"), "kernels",
    ),
    Goal(
        "DALI against torchvision, the same cores and pixels", True, 2,
        _over(_figure("images_per_s", *DATA), _figure("images_per_s", *DATA, "torchvision_v2")), "x images/s",
    ),
    Goal(
        "loader against the COCO step, batch 8", True, 1.5,
        _over(_figure("images_per_s", *DATA), _step("samples_per_s", "coco_b8")), "x images/s",
    ),
)  # fmt: skip


def judge(rows: Sequence[Mapping]) -> list[dict]:
    """Every goal with its verdict, from the rows of one card. ``ValueError`` on rows of several cards."""
    results = Results(rows)
    return [goal.judged(results) for goal in GOALS]
