"""Tensors of a file into a model by name, with a report of what was loaded, missing, unexpected and left out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.tasks import get_task
from unit_fast.weights.names import TRANSFORMER, as_tensor, canonical_mmf, current_name, mmf_name


@dataclass
class LoadReport:
    """What happened to the tensors of a file."""

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Left out on request, or of another shape where that is allowed."""

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("skipped", self.skipped)):
            first = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            parts.append(f"{len(names)} {title}{first}")
        return (f"{self.source}: " if self.source else "") + ", ".join(parts)


@torch.no_grad()
def copy_tensors(
    model: torch.nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    source: str = "",
    skip: Iterable[str] = (),
    other_shapes: bool = False,
) -> LoadReport:
    """Copy ``state[names[ours]]`` into ``model`` for every ``ours`` in ``names``.

    ``skip``: prefixes of our names to leave. ``other_shapes``: leave tensors of another shape instead of refusing.
    """
    report, own, skip = LoadReport(source), model.state_dict(), tuple(skip)
    taken = set()
    for name, foreign in names.items():
        if foreign not in state:
            report.missing.append(name)
            continue
        taken.add(foreign)
        value = as_tensor(state[foreign])
        if skip and name.startswith(skip):
            report.skipped.append(name)
        elif value.shape == own[name].shape:
            own[name].copy_(value)
            report.loaded.append(name)
        elif other_shapes:
            report.skipped.append(name)
        else:
            raise UserError(
                f"{source or 'weights'}: {foreign} has shape {tuple(value.shape)}, the model's {name} "
                f"{tuple(own[name].shape)}; give the configuration the file was made with"
            )
    report.unexpected = sorted(set(state) - taken)
    return report


def load_matching(
    model: UniT, state: Mapping[str, Tensor], *, skip: Iterable[str] = (), source: str = ""
) -> LoadReport:
    """COCO initialisation (SPEC 5.2, 7.4): every tensor of ``state`` whose name and shape fit, weights only.

    ``state``: ours or MMF's names. A single-task model's own decoder goes to a shared decoder.
    """
    if any(current_name(key).startswith("unit_base_model.") for key in state):
        state = canonical_mmf(state)
        names = {name: mmf_name(name) for name in model.state_dict()}
    else:
        names = {name: name for name in model.state_dict()}
    if model.config.decoder.share:
        own = f"decoders.{get_task('coco').name}."
        foreign = own if names["decoder.norm.weight"] == "decoder.norm.weight" else (
            f"{TRANSFORMER}decoders.detection.{get_task('coco').name}."
        )  # fmt: skip
        if f"{foreign}norm.weight" in state:
            names |= {n: foreign + n.removeprefix("decoder.") for n in names if n.startswith("decoder.")}
    report = copy_tensors(model, state, names, source=source, skip=skip, other_shapes=True)
    if not report.loaded:
        raise UserError(f"{source or 'weights'}: no tensor fits the model; {report}")
    return report
