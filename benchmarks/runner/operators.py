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
from rich.console import Console
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
    missing = [name for name, package in peers.items() if importlib.util.find_spec(package.partition(".")[0]) is None]
    for name in missing:
        print(f"{name} is left out: {peers[name]} is not installed")
    return [name for name in peers if name not in missing]


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
    """Forward and backward of the operator ``op`` in bfloat16 on CUDA, in float32 without a card. Called with a command
    line's arguments it runs and gives the exit status."""

    op: str
    """Name of the public function (ours), of its kernel module and, behind ``bench_``, of the benchmark."""
    kernel: str = ""
    """Name of the kernel module, if it is another."""
    about: str
    """The benchmark's docstring."""
    title: str
    method: Sequence[str]
    """Lines about the providers."""
    notes: Sequence[str] = (
        "Gate, without dropout: every output and gradient against the reference in float64, in the 2-norm.",
        "% of peak: the bytes that must move, forward and backward, over the time and the card's bandwidth.",
    )
    """Lines about the gate and the figures."""
    excluded: str = "the products before and after"
    eager: Callable
    """What PyTorch runs without the kernel; also compiled, and in float64 the reference of the gate."""
    peers: Mapping[str, tuple[str, Callable]] = field(default_factory=dict)
    """Other providers on CUDA: name -> (package, function)."""
    wanted: Sequence[str]
    """Inputs whose gradients are taken, as far as a shape has them."""
    shape_of: Callable[[tuple], str]
    """A shape in words."""
    card: Mapping[str, tuple] | None = None
    """Shapes for a card, if not all of the kernel module's SHAPES."""
    cpu: Mapping[str, tuple]
    quick: Mapping[str, tuple]
    summary: Callable[[Sequence[dict], Console], None] | None = None

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        return main(self.build, self.about, arguments, ops=[self.kernel or self.op])

    @functools.cached_property
    def module(self) -> ModuleType:
        """The kernel module."""
        return importlib.import_module(f"unit_fast_kernels.{self.kernel or self.op}")

    def shapes(self, args: argparse.Namespace) -> Mapping[str, tuple]:
        """Case -> shape."""
        return shapes_of(args, card=self.card or self.module.SHAPES, cpu=self.cpu, quick=self.quick)

    @property
    def ours(self) -> Callable:
        """The public function."""
        return getattr(ops, self.op)

    @functools.cached_property
    def installed_peers(self) -> dict[str, Callable]:
        """The peers that are installed; a line for each that is not."""
        return {name: self.peers[name][1] for name in installed({name: p for name, (p, _) in self.peers.items()})}

    def functions(self, shape: tuple, dtype: torch.dtype, device: str, quick: bool) -> dict[str, Callable]:
        """The providers of a shape."""
        peers = self.installed_peers
        found = {"eager": self.eager, **(peers if device == "cuda" else {}), "ours": self.ours}
        if device == "cuda" or not quick:  # compiling for a CPU takes longer than all the rest of a quick run
            found["compiled"] = torch.compile(self.eager, dynamic=False)
        return found

    def provider(
        self, function: Callable, shape: tuple, dtype: torch.dtype, device: str, wide: bool = False
    ) -> Provider:
        return Pass(function, inputs_of(self.module, shape, dtype, device, wide), self.wanted)

    def exact(self, shape: tuple, dtype: torch.dtype, device: str) -> Provider:
        """The reference of the gate."""
        return self.provider(self.eager, shape, dtype, device, wide=True)

    def build(self, args: argparse.Namespace) -> Benchmark:
        device, dtype = place()
        cases = []
        for name, shape in self.shapes(args).items():
            problem = shape, dtype, device
            cases.append(
                exact_case(
                    dtype,
                    functools.partial(self.exact, *problem),
                    name=name,
                    shape=self.shape_of(shape),
                    device=device,
                    providers={
                        provider: functools.partial(self.provider, function, *problem)
                        for provider, function in self.functions(*problem, args.quick).items()
                    },
                    **work_of(self.module, shape, dtype),
                )
            )
        return Benchmark(
            name=f"bench_{self.op}",
            title=self.title,
            method=[*self.method, *self.notes],
            excluded=self.excluded,
            cases=cases,
            summary=self.summary,
        )
