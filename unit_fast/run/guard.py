"""What is not finite in a run under way: updates, which are reported and counted, and weights, which are not saved."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import torch
from torch import nn

from unit_fast.errors import printable
from unit_fast.files import replace
from unit_fast.run.log import Record, RunLog
from unit_fast.run.refusals import NonFinite
from unit_fast.run.state import State

_log = logging.getLogger("unit_fast.train")


class BrokenWeights(NonFinite):
    """An update with a finite loss and gradient made weights that are not finite. They are not saved."""


class Guard:
    """Looks at what a run has done. ``folder``: where refused updates are described, ``seed``: the run's.

    Parameters that are not finite at the start are told, and left alone.
    """

    def __init__(self, state: State, folder: Path, log: RunLog, seed: int):
        self.state, self.folder, self.log, self.seed = state, folder, log, seed
        self.broken_at_start = set(not_finite(state.model))
        if self.broken_at_start:
            first = ", ".join(sorted(self.broken_at_start)[:3])
            _log.warning("%d tensors of the weights hold NaN or infinity: %s", len(self.broken_at_start), first)

    def judge(self, records: list[Record]) -> None:
        """Report the updates that were not finite; ``NonFinite`` after too many of them in a row, all or of a task."""
        for record in records:
            many = self.state.refusals.add(record.task, record.nonfinite)
            if not record.nonfinite:
                continue
            terms = ", ".join(f"{name.rsplit('/')[-1]} {value:.4g}" for name, value in record.terms.items())
            where = self._describe(record)
            what = (
                f"step {record.step}, {record.task}, samples {printable(record.sample_ids)}: loss {record.loss:.4g} "
                f"({terms}), gradient norm {record.grad_norm:.4g}"
            )
            self.log.line(f"not finite, nothing was changed: {what}; details in {where}")
            if many:
                self.check_weights()
                raise NonFinite(
                    f"{many} were not finite, the last: {what}. Nothing of them reached the weights. Look at {where}; "
                    "a lower --optim.lr or --precision fp32 may help (with --resume auto add --allow-changed optim.lr "
                    "or precision)"
                )

    def _describe(self, record: Record) -> Path:
        """Write what is needed to make the batch again: it is a function of these numbers."""
        path = self.folder / f"step_{record.step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        content = dataclasses.asdict(record) | {"seed": self.seed}
        replace(path, json.dumps(content, indent=1, default=str) + "\n")
        return path

    def check_weights(self) -> None:
        """``BrokenWeights`` if an update has made parameters that are not finite: loss and gradient do not tell."""
        if broken := [name for name in not_finite(self.state.model) if name not in self.broken_at_start]:
            raise BrokenWeights(
                f"{len(broken)} tensors of the weights are not finite after step {self.state.step} (first: "
                f"{broken[0]}), though loss and gradient were before: an update was too large. Nothing of it is saved; "
                "a lower --optim.lr or a larger --optim.eps may help (with --resume auto add --allow-changed optim)"
            )

    def check_trained(self) -> None:
        """``NonFinite`` if there is a task whose updates were all refused."""
        if never := self.state.refusals.untrained():
            raise NonFinite(
                f"not one update of {', '.join(f'{task} ({count})' for task, count in never.items())} was finite: it "
                f"was not trained. Look at {self.folder} and at the weights the run started from"
            )


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that are not finite. Reads the device once."""
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if p.numel()])
    # The largest magnitude of each: NaN and infinity come through, and one pass over the memory is enough.
    finite = torch.stack(torch._foreach_norm(parameters, math.inf)).isfinite().tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]
