"""The gates of the step on a card: what is timed computes the authors' step, and a replay computes the eager one.

In bfloat16 no two formulations agree to many digits. So the authors' own formulation, in float32 on the same device,
is the reference, its low-precision run shows what bfloat16 does to it, and every other may be twice as far away, and a
little. All take the reference's matching: a rounding that decides for another pairing is no error. Dropout is off (ours
runs its path with dropout, with a probability that drops nothing). Gradients are compared jointly by part of the model.
"""

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.runner.gate import Check, relative_error, tell
from benchmarks.step.problems import mmf_config, mmf_state
from benchmarks.step.providers import Eager, Ours
from benchmarks.step.updates import Step

BANDS = {"loss/": (1e-4, 1e-2), "grad/": (1e-2, 2e-2)}
"""Kind of output -> relative error allowed in any case: in float32, and under bfloat16 autocast."""
_PART = 3
"""Names of gradients are compared by their first names, so many."""
_UPDATES_BAND = 1e-6


def by_part(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses as they are; gradients of one part of the model (``a.b.c`` of ``grad/a.b.c.d``) as one vector."""
    found, parts = {}, defaultdict(list)
    for name, value in sorted(outputs.items()):  # the order of a model's parameters is its own
        if name.startswith("grad/"):
            parts[".".join(name.split(".")[:_PART])].append(value.detach().flatten())
        else:
            found[name] = value
    return found | {name: torch.cat(values) for name, values in parts.items()}


def allowed(reference: Mapping[str, Tensor], low: Mapping[str, Tensor], bf16: bool) -> dict[str, float]:
    """Output -> the relative error that a provider may make: twice the low-precision run's and the band."""
    found = {}
    for name, value in reference.items():
        band = next(bands[bf16] for prefix, bands in BANDS.items() if name.startswith(prefix))
        found[name] = 2 * relative_error(low.get(name), value, "l2") + band
    return found


@contextlib.contextmanager
def _exact_float32():
    """Without TF32, which convolutions take on their own."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def authors(
    name: str, case: tuple, *, quick: bool, device: torch.device, console: Console,
    ours: Callable = Ours,
) -> bool:  # fmt: skip
    """Whether the library's variant and ours compute losses and gradients of the authors' formulation."""
    config, state = mmf_config(quick), mmf_state(quick)
    bf16 = device.type == "cuda"
    with _exact_float32():
        reference = Eager(case, config, state, device=device)
        exact, matching = by_part(reference.outputs()), reference.matching
        reference.bf16 = bf16
        may = allowed(exact, by_part(reference.outputs(matching)), bf16)
        del reference
        fine = True
        for provider, make in (
            ("library", lambda: Eager(case, config, state, library=True, device=device, bf16=bf16)),
            ("ours", lambda: ours(case, config, state, device=device, bf16=bf16)),
        ):
            found = by_part(make().outputs(matching))
            checks = [Check(k, relative_error(found.get(k), v, "l2"), may[k]) for k, v in exact.items()]
            checks += [Check(k, float("inf"), 0.0) for k in found if k not in exact]
            fine &= tell(
                console, f"{name}: {provider} against the authors' formulation in float32:", checks, allowed=".1e"
            )
    return fine


def _kept(provider) -> dict[str, Tensor]:
    """A provider's outputs on the host; the provider, which may hold itself by a cycle, is gone after it."""
    found = {name: value.cpu() for name, value in provider.outputs().items()}
    del provider
    gc.collect()
    return found


def captured(name: str, case: tuple, *, quick: bool, device: torch.device, console: Console, step=Step) -> bool:
    """Whether updates that are replayed are the eager ones: bit for bit where two eager runs are, with cuDNN's
    deterministic algorithms; else twice as far as those are from each other."""
    config = mmf_config(quick)
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        first, second, replayed = (_kept(step(case, config, device, graph)) for graph in (False, False, True))
    finally:
        torch.backends.cudnn.deterministic = before
    apart = {key: relative_error(second[key], value) for key, value in first.items()}
    band = _UPDATES_BAND if any(apart.values()) else 0.0
    checks = [Check(key, relative_error(replayed[key], value), 2 * apart[key] + band) for key, value in first.items()]
    return tell(console, f"{name}: {len(first)} figures of replayed updates against eager ones:", checks, allowed=".1e")
