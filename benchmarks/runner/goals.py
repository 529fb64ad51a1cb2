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


def _kernel(op: str):
    return importlib.import_module(f"unit_fast_kernels.{op}")


def _work(op: str, case: str, phase: str, kind: str) -> float:
    """Bytes or FLOPs of a phase of one of the op's shapes, in bfloat16."""
    module = _kernel(op)
    name = kind + ("_bwd" if phase == "backward" else "")
    shape = module.SHAPES[case]
    return getattr(module, name)(shape, torch.bfloat16) if kind == "bytes_moved" else getattr(module, name)(shape)


def _teraflops(phase: str) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        time_ms = results.phase(phase, "bench_attention", "unit_encoder")
        return _work("attention", "unit_encoder", phase, "flops") / time_ms * 1e-9

    return find


def _floors(op: str, cases: Sequence[str], phases: Sequence[str] = ("forward", "backward"), of: str = "") -> Callable:
    """The worst time over the byte floor, of several cases and phases of a benchmark; ``of``: its op, if that has
    another name."""

    def find(results: Results) -> float:
        times = [
            results.phase(phase, f"bench_{op}", case)
            / (_work(of or op, case, phase, "bytes_moved") / results.bandwidth() * 1e3)
            for case in cases
            for phase in phases
        ]
        return max(times)

    return find


NORMS = ("unit_encoder_pos_800x1344", "bert_base")
_MATCHING, _LOSSES, _NORM = ("_match_cost", "_assignment"), ("_set_loss",), ("_frozen_bn_act",)


def _times_eager(results: Results) -> float:
    keys = [("captured_ms", "bench_residual_norm", case) for case in NORMS]
    return min(results.figure(*key, "eager") / results.figure(*key) for key in keys)


def _step(key: str, case: str = "coco_b2") -> Callable[[Results], float]:
    return lambda results: results.figure(key, "bench_step", case)


def _matching_peer(results: Results) -> float:
    """From the host both: the peer reads the host and cannot be captured."""
    peer = results.figure("time_ms", "bench_match", "unit_coco", "torch_linear_assignment")
    return peer / results.figure("time_ms", "bench_match", "unit_coco")


def _adamw(results: Results) -> float:
    results.figure("captured_ms", "bench_optimizer", "all_used")  # the share of the peak is that of replays then
    return results.figure("percent_of_peak", "bench_optimizer", "all_used")


def _loader(results: Results) -> float:
    step = results.figure("samples_per_s", "bench_step", "coco_b8")
    return results.figure("images_per_s", "bench_data", "detection_train") / step


def _dali(results: Results) -> float:
    peer = results.figure("images_per_s", "bench_data", "detection_train", "torchvision_v2")
    return results.figure("images_per_s", "bench_data", "detection_train") / peer


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
        _floors("cross_attention", ("unit_detection_b8", "unit_vqa_b8"), of="attention"), "x the time of its bytes",
    ),
    Goal(
        "matching of 96 problems of 100 x 32", False, 0.06,
        lambda results: results.figure("captured_ms", "bench_match", "unit_coco"), "ms",
    ),
    Goal(
        "matching: launches", False, 2, lambda r: r.own_kernels("bench_match", "unit_coco", _MATCHING), "kernels"
    ),
    Goal("matching: waits of the host", False, 0, lambda r: r.figure("waits", "bench_match", "unit_coco"), "a step"),
    Goal("matching against torch-linear-assignment", True, 10, _matching_peer, "x faster"),
    Goal(
        "set loss: launches, both directions", False, 2,
        lambda r: r.own_kernels("bench_set_loss", "unit_coco", _LOSSES), "kernels",
    ),
    Goal(
        "AdamW with masks, 201 M parameters", True, 90, _adamw, "% of the bandwidth",
    ),
    Goal(
        "residual + dropout + norm, widths 256 and 768, each direction", True, 85,
        lambda r: 100 / _floors("residual_norm", NORMS)(r), "% of the bandwidth",
    ),
    Goal("residual + dropout + norm against eager", True, 2.5, _times_eager, "x faster"),
    Goal(
        "frozen norm + ReLU + residual: passes, both directions", False, 2,
        lambda r: r.own_kernels("bench_frozen_bn_act", "resnet50_layer1_block", _NORM), "kernels",
    ),
    Goal("DALI against torchvision, the same cores and pixels", True, 2, _dali, "x images/s"),
    Goal("loader against the COCO step, batch 8", True, 1.5, _loader, "x images/s"),
)  # fmt: skip


def judge(rows: Sequence[Mapping]) -> list[dict]:
    """Every goal with its verdict, from the rows of one card. ``ValueError`` on rows of several cards."""
    results = Results(rows)
    return [goal.judged(results) for goal in GOALS]
