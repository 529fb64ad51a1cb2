"""One whole update of the 8-dataset model on a card: run eagerly, and captured as one CUDA graph.

``python -m benchmarks.bench_step_graph`` times both interleaved on the same weights and batches, under bfloat16
autocast as training runs them, and counts with the profiler what a step launches and how often it waits for the device
(aim: 0). The gate compares the losses, the gradient norm and the parameters after four updates, dropout on: they are to
be equal bit for bit. On a CPU only ``--quick`` runs, to show that the benchmark does; nothing is captured there.
"""

import argparse
import sys
from collections import Counter

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _run
from benchmarks.bench_step import CASES, LR, LR_BACKBONE, MAX_NORM, QUICK, make_batch, mmf_config, shape_of
from unit_fast import convert
from unit_fast.batch import Batch, Buckets, fill
from unit_fast.model import UniT
from unit_fast.optim import MaskedAdamW
from unit_fast.setup_model import used_masks
from unit_fast.step_graph import Graphs, StepGraphs
from unit_fast.train import Update, train_step

SEED = 0
CHECKED = 4
"""Updates that the gate compares: two eager ones of the bucket's warm-up, the first replay and one more."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "Memcpy DtoH")
"""Beginnings of what the profiler calls a wait for the device or a copy from it."""


class NotCaptured(Graphs):
    """What stands for CUDA's graphs on a CPU: each replay runs the step again, into the captured result."""

    def capture(self, step):
        result = object.__new__(Update)
        return lambda: vars(result).update(vars(step())), result


class Step(_run.Provider):
    """Updates of one task on one batch, padded to its bucket."""

    def __init__(self, case: tuple, config: dict, device: torch.device, graph: bool):
        self.task, self.device = case[0], device
        torch.manual_seed(SEED)
        self.model = UniT(convert.model_config_from_mmf(config)).train()
        self.model.to(device, memory_format=self.model.backbone.memory_format)
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        self.optimizer = MaskedAdamW(groups, unused="skip", max_norm=MAX_NORM, clip_gradients_in_place=False)
        self.used = used_masks(self.model, self.optimizer, [self.task])[self.task]
        batch = make_batch(*case[:4])
        _, height, width = case[1] or (0, 64, 96)
        buckets = Buckets(short_side=min(height, width), max_side=max(height, width))
        self.batch = buckets.of([batch]).empty(batch, device)
        fill(self.batch, batch)
        self.graphs = None
        if graph:
            self.optimizer.prepare()
            backend = None if device.type == "cuda" else NotCaptured()
            self.graphs = StepGraphs(
                lambda task, batches, done: self._captured(batches), buckets, device, backend=backend
            )  # fmt: skip

    def _update(self, batches: list[Batch]) -> Update:
        bf16 = self.device.type == "cuda"
        return train_step(self.model, self.optimizer, self.task, batches, used=self.used, bf16=bf16)

    def _captured(self, batches: list[Batch]) -> Update:
        update = self._update(batches)
        self.optimizer.zero_grad(set_to_none=True)
        return update

    def update(self) -> Update:
        return self.graphs(self.task, [self.batch]) if self.graphs else self._update([self.batch])

    def step(self, marks: _run.Marks) -> None:
        self.update()

    def outputs(self) -> dict[str, Tensor]:
        torch.manual_seed(SEED + 1)
        found = {}
        for i in range(CHECKED):
            update = self.update()
            found |= {f"losses/{i}": update.terms.clone(), f"norm/{i}": update.grad_norm.clone()}
        if self.graphs:
            self.graphs.check()
        return found | {f"weights/{name}": p.detach() for name, p in self.model.named_parameters()}


def profiled(provider: Step) -> dict[str, int]:
    """Kernels, copies and waits of one update on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    provider.update()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        provider.update()
        torch.cuda.synchronize()  # one of the waits counted
    counts = Counter()
    for event in found.events():
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if any(event.name.startswith(name) for name in WAITS):
            counts["waits"] += 1
        elif on_card:
            counts["copies" if event.name.startswith("Mem") else "kernels"] += 1
        elif event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")):
            counts["launches"] += 1
    return {**counts, "waits": counts["waits"] - 1}


def build(args: argparse.Namespace) -> _run.Benchmark:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        print("no CUDA device: nothing to capture here; --quick shows that the benchmark runs", file=sys.stderr)
        raise SystemExit(2)
    shapes, config = (QUICK if args.quick else CASES), mmf_config(args.quick)
    built: dict[str, dict[str, Step]] = {name: {} for name in shapes}

    def factory(name: str, provider: str):
        def make() -> Step:
            built[name][provider] = Step(shapes[name], config, device, provider == "ours")
            return built[name][provider]

        return make

    def summary(rows: list[dict], console: Console) -> None:
        if device.type != "cuda":
            console.print("On a CPU nothing was captured: the figures say nothing about graphs.")
            return
        table = Table(title="one update, by the profiler", title_justify="left", box=box.SIMPLE)
        for column in ("case", "provider", "launches", "kernels", "copies", "waits"):
            table.add_column(column, justify="left" if column in ("case", "provider") else "right")
        found = []
        for row in rows:
            counts = profiled(built[row["case"]][row["provider"]])
            figures = {k: counts.get(k, 0) for k in ("launches", "kernels", "copies", "waits")}
            found.append({k: v for k, v in row.items() if not k.endswith("_ms")} | figures)
            table.add_row(row["case"], row["provider"], *map(str, figures.values()))
        console.print(table)
        folder = _run.RESULTS if args.json is None else args.json.parent
        if args.json or not (args.quick or args.no_results):
            _run.append(found, folder / "bench_step_graph_profile.jsonl")

    return _run.Benchmark(
        name="bench_step_graph",
        module="benchmarks.bench_step_graph",
        title="One update, eager and captured" + (" (quick: a small model)" if args.quick else ""),
        method=[
            "eager: our step as it runs without graphs. ours: the same step captured and replayed.",
            "Training mode, dropout 0.1, bfloat16 autocast on CUDA, batches padded to their bucket.",
            "Gate: losses, gradient norms and parameters after four updates are equal bit for bit.",
        ],
        excluded="data loading, logging",
        cases=[
            _run.Case(
                name=name, shape=shape_of(shape), dtype="bfloat16" if device.type == "cuda" else "float32",
                device=device.type, providers={"eager": factory(name, "eager"), "ours": factory(name, "ours")},
                reference="eager", tolerances={"": 0.0},
            )
            for name, shape in shapes.items()
        ],
        summary=summary,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return _run.main(build, arguments, options=_run.parser(__doc__.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())
