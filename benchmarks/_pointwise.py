"""What the benchmarks of the memory-bound operators share: one forward and backward pass of a function.

A provider is a function of the keyword arguments that the kernel module's ``make`` gives, which returns a tensor or a
tuple of tensors and Nones. The gate runs without dropout, since every provider draws its own random numbers.
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import _run


class Pass(_run.Provider):
    """Forward and backward of one function; gradients of the inputs in ``wanted``."""

    def __init__(self, function: Callable, inputs: dict, wanted: Sequence[str]):
        self.function, self.inputs = function, inputs
        self.names = [name for name in wanted if inputs[name] is not None]
        self.leaves = [inputs[name].requires_grad_() for name in self.names]
        torch.manual_seed(0)
        self.upstream = [self._gradient(out) for out in self._results(self._undropped())]

    def _gradient(self, out: Tensor) -> Tensor:
        """Random numbers that do not depend on the dtype, in the layout of out."""
        return torch.empty_like(out).copy_(torch.randn(out.shape, device=out.device).bfloat16())

    def _results(self, inputs: dict) -> list[Tensor]:
        out = self.function(**inputs)
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]

    def _undropped(self) -> dict:
        return self.inputs | {"dropout_p": 0.0} if "dropout_p" in self.inputs else self.inputs

    def step(self, marks: _run.Marks) -> None:
        out = self._results(self.inputs)
        marks("forward")
        torch.autograd.grad(out, self.leaves, self.upstream)
        marks("backward")

    def outputs(self) -> dict[str, Tensor]:
        out = self._results(self._undropped())
        gradients = torch.autograd.grad(out, self.leaves, self.upstream)
        found = {f"out{i}": t.detach() for i, t in enumerate(out)}
        return found | {f"grad/{name}": g for name, g in zip(self.names, gradients)}


def inputs_of(kernel, shape: tuple, dtype: torch.dtype, device: str, wide: bool = False) -> dict:
    """The same inputs for every provider of a case; ``wide``: in float64."""
    torch.manual_seed(0)
    made = kernel.make(shape, dtype, device)
    floating = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return made | {k: v.double() for k, v in floating.items()} if wide else made


def installed(peers: Mapping[str, str]) -> list[str]:
    """Names of the peers (name -> package) that are installed; a line for each that is not."""
    found = []
    for name, package in peers.items():
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            print(f"{name} is left out: {package} is not installed")
        else:
            found.append(name)
    return found


def build(
    args: argparse.Namespace,
    *,
    kernel,
    name: str,
    title: str,
    method: Sequence[str],
    shape_of: Callable[[tuple], str],
    wanted: Sequence[str],
    functions: Callable[[tuple, str], Mapping[str, Callable]],
    exact: Callable,
    quick: Mapping[str, tuple],
    cpu: Mapping[str, tuple],
) -> _run.Benchmark:
    """The benchmark of ``kernel``: its SHAPES in bfloat16 on CUDA, ``cpu`` in float32 without a card.

    ``functions(shape, device)`` gives the providers, "ours" among them; ``exact`` is the reference of the gate, run in
    float64.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = quick if args.quick else kernel.SHAPES if device == "cuda" else cpu
    cases = []
    for case, shape in shapes.items():
        providers = dict(functions(shape, device))
        if device == "cuda" or not args.quick:  # compiling for a CPU takes longer than all the rest of a quick run
            providers["compiled"] = torch.compile(providers["eager"], dynamic=False)

        def provider(function, shape=shape, wide=False):
            return lambda: Pass(function, inputs_of(kernel, shape, dtype, device, wide), wanted)

        cases.append(
            _run.Case(
                name=case,
                shape=shape_of(shape),
                dtype=str(dtype).removeprefix("torch."),
                device=device,
                providers={key: provider(function) for key, function in providers.items()},
                reference="exact",
                references={"exact": provider(exact, wide=True)},
                tolerances={"": 1e-4 if dtype == torch.float32 else 2e-2},
                error="l2",
                flops=kernel.flops(shape) + kernel.flops_bwd(shape),
                bytes=kernel.bytes_moved(shape, dtype) + kernel.bytes_moved_bwd(shape, dtype),
            )
        )
    return _run.Benchmark(
        name=name,
        module=f"benchmarks.{name}",
        title=title + (" (quick: small shapes)" if args.quick else ""),
        method=[
            *method,
            "Gate, without dropout: every output and gradient against the reference in float64, in the 2-norm.",
            "% of peak: the bytes that must move, forward and backward, over the time and the card's bandwidth.",
        ],
        excluded="the products before and after",
        cases=cases,
    )
