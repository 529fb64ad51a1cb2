"""Providers of ``bench_data`` in processes of their own: what is tried, and rounds in which they take turns."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.data.child import Child, wait_until_idle
from benchmarks.data.peers import PEERS
from benchmarks.data.providers import OURS, Spec, open_data, settings
from benchmarks.runner.timing import order, quantiles
from unit_fast.config import DataConfig
from unit_fast.data.images.engine import engine_of

MODULE = "benchmarks.data.server"
"""Module of the providers' processes."""
BEST_PEER = "torchvision_v2"
_AHEAD = 6
"""Steps that our loader may have under way besides those that are prefetched."""


def has_dali() -> bool:
    """Whether our loader reads by DALI here."""
    return engine_of(DataConfig()) == "dali"


def providers_of() -> list[str]:
    """What can be measured here. Without DALI ``ours`` is our torchvision engine, and there is no other of ours."""
    return [*(OURS if has_dali() else ["ours"]), *PEERS]


def counts_of(provider: str, cores: int) -> list[int]:
    """Numbers of workers that are tried; DALI's threads cannot be none."""
    by_dali = provider in ("ours", "ours_whole") and has_dali()
    return sorted({0, 1, 2, cores, cores + 1} - ({0} if by_dali else set()))


def spare(workers: int, prefetch: int) -> int:
    """Batches that a loader may have ready or half ready, to be read before it works at its own pace."""
    return max(1, workers) * prefetch + _AHEAD


def first_pass(child: Child, spec: Spec) -> dict:
    """The answer of ``Server.first`` for a pass in which nothing is known of the images; it also fills the cache folder
    for all that follows."""
    (samples,) = map(len, open_data(settings(spec)).values())
    found = child.ask("first", count=-(-samples // spec.batch), **dataclasses.asdict(spec))
    child.ask("close")
    return found


def pick(child: Child, spec: Spec, counts: Sequence[int], batches: int) -> dict[int, float]:
    """Images a second by number of workers: the better of two short runs, noise only slows."""
    found: dict[int, float] = {}
    for _ in range(2 if len(counts) > 1 else 1):
        for workers in counts:
            child.ask("open", **dataclasses.asdict(dataclasses.replace(spec, workers=workers)))
            run = child.ask("run", settle=spare(workers, spec.prefetch), count=batches)
            found[workers] = max(found.get(workers, 0.0), run["images"] / run["seconds"])
    child.ask("close")
    return found


def rounds_of(children: Mapping[str, Child], settle: int, batches: int, rounds: int, warmup: int) -> dict[str, list]:
    """The answers of ``Server.run`` by provider and round. While one reads, the others have read ahead and are idle."""
    found: dict[str, list] = {name: [] for name in children}
    for number in range(-warmup, rounds):
        for name in order(list(children), number):
            wait_until_idle(list(children.values()))
            answer = children[name].ask("run", settle=settle, count=batches)
            if number >= 0:
                if answer["checked"]:
                    raise RuntimeError(f"{name} still checked {answer['checked']} images in a timed round")
                found[name].append(answer)
    return found


def figures(answers: Sequence[dict], base: Sequence[dict] | None) -> dict:
    """What a row says of a provider's rounds. base: the rounds of ``BEST_PEER``, taken in turn with them."""
    speeds = [a["images"] / a["seconds"] for a in answers]
    median, low, high = quantiles(speeds)
    out = {
        "images_per_s": round(median, 2), "images_per_s_p20": round(low, 2), "images_per_s_p80": round(high, 2),
        "cpu_ms_per_image": round(1e3 * quantiles([a["cpu_seconds"] / a["images"] for a in answers])[0], 3),
        "vs_torchvision_v2": None,
    }  # fmt: skip
    if base is not None:
        ratios = [speed * b["seconds"] / b["images"] for speed, b in zip(speeds, base)]
        out["vs_torchvision_v2"] = round(statistics.median(ratios), 3)
    return out
