"""What the benchmarks of single operators share, and the benchmark of an operator that is one differentiable function.

A provider is a function of the keyword arguments that the kernel module's ``make`` gives, which returns a tensor or a
tuple of tensors and Nones. The gate runs without dropout, since every provider draws its own random numbers.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.runner.cases import Benchmark, Case, Provider
from benchmarks.runner.main import main
from benchmarks.runner.marks import Marks
from unit_fast import ops


def place() -> tuple[str, torch.dtype]:
    """(device, dtype) that operators are measured on and in: bfloat16 on a card, else float32."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def shapes_of(args: argparse.Namespace, *, card: Mapping, cpu: Mapping, quick: Mapping) -> Mapping[str, tuple]:
    """Case -> shape, of those for a card, for a machine without one, and for a quick run."""
    return quick if args.quick else card if torch.cuda.is_available() else cpu


def installed(peers: Mapping[str, str]) -> list[str]:
    """Names of the peers (name -> package) that are installed; a line for each that is not."""
    found = []
    for name, package in peers.items():
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            print(f"{name} is left out: {package} is not installed")
        else:
            found.append(name)
    return found


def inputs_of(kernel: ModuleType, shape: tuple, dtype: torch.dtype, device: str, wide: bool = False) -> dict:
    """The same inputs for every provider of a case; ``wide``: in float64."""
    torch.manual_seed(0)
    made = kernel.make(shape, dtype, device)
    floating = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return made | {k: v.double() for k, v in floating.items()} if wide else made


def work_of(kernel: ModuleType, shape: tuple, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs and bytes of both directions, as fields of a ``Case``."""
    return {
        "flops": kernel.flops(shape) + kernel.flops_bwd(shape),
        "bytes": kernel.bytes_moved(shape, dtype) + kernel.bytes_moved_bwd(shape, dtype),
    }


def exact_case(dtype: torch.dtype, exact: Callable[[], Provider], **fields) -> Case:
    """A case whose providers are held to an exact one that is not timed, in the 2-norm."""
    return Case(
        dtype=str(dtype).removeprefix("torch."),
        reference="exact",
        references={"exact": exact},
        tolerances={"": 1e-4 if dtype == torch.float32 else 2e-2},
        error="l2",
        **fields,
    )


class Pass(Provider):
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

    def step(self, marks: Marks) -> None:
        out = self._results(self.inputs)
        marks("forward")
        torch.autograd.grad(out, self.leaves, self.upstream)
        marks("backward")

    def outputs(self) -> dict[str, Tensor]:
        out = self._results(self._undropped())
        gradients = torch.autograd.grad(out, self.leaves, self.upstream)
        found = {f"out{i}": t.detach() for i, t in enumerate(out)}
        return found | {f"grad/{name}": g for name, g in zip(self.names, gradients)}


@dataclass(frozen=True, kw_only=True)
class OperatorBenchmark:
    """Forward and backward of the operator ``op``: its kernel module's SHAPES in bfloat16 on CUDA, ``cpu`` in float32
    without a card. Called with a command line's arguments it runs and gives the exit status."""

    op: str
    """Name of the kernel module, of the public function (ours) and, behind ``bench_``, of the benchmark."""
    about: str
    """The benchmark's docstring."""
    title: str
    method: Sequence[str]
    """Lines about the providers."""
    eager: Callable
    """What PyTorch runs without the kernel; also compiled, and in float64 the reference of the gate."""
    peers: Mapping[str, tuple[str, Callable]] = field(default_factory=dict)
    """Other providers on CUDA: name -> (package, function)."""
    wanted: Sequence[str]
    """Inputs whose gradients are taken, as far as a shape has them."""
    shape_of: Callable[[tuple], str]
    """A shape in words."""
    cpu: Mapping[str, tuple]
    quick: Mapping[str, tuple]

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        return main(self.build, self.about, arguments, ops=[self.op])

    def build(self, args: argparse.Namespace) -> Benchmark:
        kernel = importlib.import_module(f"unit_fast_kernels.{self.op}")
        device, dtype = place()
        functions = {"eager": self.eager}
        peers = installed({name: package for name, (package, _) in self.peers.items()})
        if device == "cuda":
            functions |= {name: self.peers[name][1] for name in peers}
        functions["ours"] = getattr(ops, self.op)
        cases = []
        for case, shape in shapes_of(args, card=kernel.SHAPES, cpu=self.cpu, quick=self.quick).items():
            taken = dict(functions)
            if device == "cuda" or not args.quick:  # compiling for a CPU takes longer than the rest of a quick run
                taken["compiled"] = torch.compile(self.eager, dynamic=False)

            def provider(function: Callable, wide: bool = False, shape: tuple = shape) -> Pass:
                return Pass(function, inputs_of(kernel, shape, dtype, device, wide), self.wanted)

            cases.append(
                exact_case(
                    dtype,
                    functools.partial(provider, self.eager, wide=True),
                    name=case,
                    shape=self.shape_of(shape),
                    device=device,
                    providers={name: functools.partial(provider, function) for name, function in taken.items()},
                    **work_of(kernel, shape, dtype),
                )
            )
        return Benchmark(
            name=f"bench_{self.op}",
            title=self.title,
            method=[
                *self.method,
                "Gate, without dropout: every output and gradient against the reference in float64, in the 2-norm.",
                "% of peak: the bytes that must move, forward and backward, over the time and the card's bandwidth.",
            ],
            excluded="the products before and after",
            cases=cases,
        )
