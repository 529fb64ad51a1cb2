"""Where a run is between two updates."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from unit_fast.data.bad_images import BadImages
from unit_fast.data.sampler import Request
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.optim.state_dict import load_state_by_name, state_by_name
from unit_fast.run.ema import Ema
from unit_fast.run.refusals import Refusals

_log = logging.getLogger("unit_fast.train")


@dataclass(kw_only=True)
class State:
    """What a checkpoint holds: the weights, their average, and what ``to_dict`` lists. All else of a run follows from
    its configuration."""

    model: UniT
    optimizer: MaskedAdamW
    bad: BadImages
    """Images that could not be read."""
    engine: str
    """What reads images."""
    data: dict[str, dict]
    """Data set key -> digest of its training samples."""
    ema: Ema | None = None
    """The averaged weights, if any are kept."""
    step: int = 0
    """Updates done."""
    counts: Counter[str] = field(default_factory=Counter)
    """Data set key -> samples trained on."""
    best: dict[str, dict] = field(default_factory=dict)
    """``best`` and ``best_ema`` -> step, value and criterion of the best evaluation."""
    stale: int = 0
    """Evaluations since the best one."""
    refusals: Refusals = field(default_factory=Refusals)
    refused_before: int = 0
    """Refused updates that a checkpoint knew the number of, but not the tasks."""
    seconds_before: float = 0.0
    """Seconds of the run until ``begun``."""
    eval_seconds: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    whole: bool = True
    """False once an update has begun and not ended: what it has drawn and changed so far is not to be saved."""

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around an update and ``count``."""
        self.whole = False
        yield
        self.whole = True

    def count(self, request: Request) -> None:
        """Count an update on the samples of ``request``."""
        self.step += 1
        self.counts[request.task] += request.samples

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.begun

    @property
    def nonfinite_steps(self) -> int:
        """Updates that were refused."""
        return self.refused_before + self.refusals.total

    def to_dict(self) -> dict:
        """All that a resumed run needs besides weights and configuration."""
        return {
            "step": self.step,
            "counts": dict(self.counts),
            "optimizer": state_by_name(self.model, self.optimizer),
            "rng": self._random_states(),
            "best": self.best,
            "stale": self.stale,
            "strikes": self.refusals.state(),
            "nonfinite_steps": self.nonfinite_steps,
            "bad_images": self.bad.state(),
            "seconds": self.seconds,
            "eval_seconds": self.eval_seconds,
            **self._surroundings(),
            "processes": 1,
            "data": self.data,
        }

    def load_dict(self, saved: dict) -> None:
        """The reverse, with a warning of what differs from then. ``KeyError`` where a part is missing, ``UserError``
        where one does not fit."""
        load_state_by_name(self.model, self.optimizer, saved["optimizer"])
        self.step, self.best = saved["step"], saved["best"]
        self.stale = saved.get("stale", 0)  # older checkpoints have none
        self.counts.update(saved["counts"])
        self.refusals.restore(saved["strikes"], [task for task, count in self.counts.items() if count])
        self.refused_before = saved["nonfinite_steps"] - self.refusals.total
        self.bad = BadImages(self.bad.max_share, **saved["bad_images"])
        self.seconds_before, self.eval_seconds = saved["seconds"], saved["eval_seconds"]
        for name, now in self._surroundings().items():
            if saved[name] != now:
                much = "by up to 2 of 255 steps of a pixel" if name == "engine" else "in the last bits"
                _log.warning("the checkpoint had %s %s, now %s: results differ %s", name, saved[name], now, much)
        self._set_random_states(saved["rng"])

    def _surroundings(self) -> dict:
        """What results depend on besides configuration and data."""
        return {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "engine": self.engine}

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _random_states(self) -> dict[str, torch.Tensor]:
        """Of the default generators, which dropout draws from."""
        found = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self._device)
        return found

    def _set_random_states(self, saved: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(saved["cpu"])
        if self._device.type == "cuda" and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"], self._device)
        elif self._device.type == "cuda" or "cuda" in saved:
            _log.warning("the checkpoint is from another kind of device: dropout will differ")
