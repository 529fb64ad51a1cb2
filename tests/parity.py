"""Parity with the authors' UniT: ``python -m tests.parity FOLDER [--dtype float64|float32] [--case NAME ...]``.

FOLDER holds ``cases/``, ``models/`` and ``optimizer.json``/``.npz`` in the format of ``tests/fixtures/parity`` (the
default). Each case is one training step of the authors' own model with reproducible weights: the model is built through
``from_mmf``, and hidden states, logits, boxes, every loss term, all gradients and the set of absent ones are compared.
One line a case with the worst relative error and its key; exit code 1 on a failure.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from tests.fixtures.parity import check
from unit_fast.batch import Batch
from unit_fast.data.collate import collate
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.schedule import lr_multiplier
from unit_fast.weights.convert import from_mmf, to_mmf

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "parity"
TOLERANCES = {
    torch.float64: {"tolerance": 1e-9},
    torch.float32: {"tolerance": 1e-4, "tolerances": {"grad": 1e-2}},
}


def batch_of(case: check.Case, dtype: torch.dtype) -> Batch:
    """The case's inputs as our batch, padded by our own collate."""
    inputs, meta = case.inputs(), case.meta
    samples = []
    for i in range(meta["batch"]):
        sample = {}
        if "image" in inputs:
            _, height, width = meta["images"][i]["shape"]
            sample["image"] = torch.from_numpy(inputs["image"][i, :, :height, :width]).to(dtype)
            sample["orig_size"] = (height, width)
        if "ids" in inputs:
            names = {"input_ids": "ids", "attention_mask": "input_mask", "token_type_ids": "segment_ids"}
            sample |= {ours: torch.from_numpy(inputs[theirs][i]) for ours, theirs in names.items()}
        target = inputs["targets"][i]
        if meta["targets"] == "detection":
            sample |= {key: torch.from_numpy(value) for key, value in target.items()}
            sample["boxes"] = sample["boxes"].to(dtype)
        elif meta["targets"] == "soft_scores":
            sample["answer_scores"] = torch.from_numpy(target).to(dtype)
        else:
            sample["label"] = int(target)
        samples.append(sample)
    return collate(case.dataset, samples)


def compute(case: check.Case, dtype: torch.dtype) -> dict:
    """Everything ``check.condense`` asks for, computed by our model in training mode."""
    state = {name: torch.from_numpy(value) for name, value in case.state()}
    # The cases are one process with the whole batch in it (SPEC quirk 2).
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = from_mmf(state, case.config, ce_normalisation="per_process").train()
    finally:
        torch.set_default_dtype(default)
    del state
    batch = batch_of(case, dtype)
    out = model(batch)
    raw = {"hidden_states": out.hidden_states, "logits": out.logits, "boxes": out.boxes, "scores": out.scores}
    matching = None
    if out.logits is not None:
        matching = model.match(out, batch)
        raw["matching"] = pairs(matching, batch.counts)
        if case.dataset in model.attribute_heads:
            with torch.no_grad():
                raw["attribute_logits"] = model.predict_attributes(case.dataset, out.hidden_states, out.logits)
    raw["losses"] = model.losses(out, batch, matching)
    sum(raw["losses"].values()).backward()
    raw["grads"] = to_mmf(model, what="gradients")
    return raw | stages(model, batch)


def pairs(matching: torch.Tensor, counts: torch.Tensor) -> list:
    """query [L,B,N] -> per layer and image (query indices, target indices)."""
    layers = []
    for layer in matching:
        images = []
        for query, count in zip(layer, counts.tolist()):
            target = torch.arange(count)[query[:count] >= 0]
            images.append((query[target], target))
        layers.append(images)
    return layers


@torch.no_grad()
def stages(model: UniT, batch: Batch) -> dict:
    """Intermediate results, which tell where an error starts. The model's dropout is zero in every case."""
    from unit_fast.model.positions import sine_positions
    from unit_fast.model.transformer import DropoutSeeds

    memory, positions, mask = model.encode(batch, DropoutSeeds(False, torch.device("cpu")))
    if batch.image is None:
        return {}
    features = model.backbone(batch.image)
    height, width = features.shape[-2:]
    channels = model.config.encoder.width
    sine = sine_positions(mask[:, : height * width].unflatten(1, (height, width)), channels)
    sine = sine.transpose(1, 2).unflatten(2, (height, width))
    return {"features": features, "memory": memory, "positions": positions, "memory_mask": mask, "sine": sine}


def run_case(stem: Path, dtype: torch.dtype = torch.float64) -> check.Report:
    """Compare one case. The ``float64`` variant of the kit: losses in the model's dtype."""
    case = check.load(stem)
    return check.compare(case, check.condense(case, compute(case, dtype)), **TOLERANCES[dtype])


def run_optimizer(folder: Path, variant: str) -> check.Report:
    """The trajectory ``plain`` (policy graph, used = has a gradient) or ``skip`` (policy skip)."""
    case = check.OptimizerCase(folder)
    meta = case.meta
    parameters = {n: torch.nn.Parameter(torch.from_numpy(case.initial(n).copy())) for n in case.names}
    groups = [
        {"params": [parameters[n] for n in case.names if meta["parameters"][n]["group"] == group], "lr": lr}
        for group, lr in meta["base_lr"].items()
    ]
    optimizer = MaskedAdamW(
        groups, betas=tuple(meta["betas"]), eps=meta["eps"], weight_decay=meta["weight_decay"], rule="hf",
        unused={"plain": "graph", "skip": "skip"}[variant], max_norm=meta["clip_norm"],
    )  # fmt: skip
    history = {name: [] for name in case.names}
    for update in range(meta["updates"]):
        for group, lr in zip(optimizer.param_groups, meta["base_lr"].values()):
            group["lr"] = lr * lr_multiplier(update, meta["warmup_updates"], meta.get("total_updates", meta["updates"]))
        for name, parameter in parameters.items():
            gradient = case.gradient(name, update)
            parameter.grad = None if gradient is None else torch.from_numpy(gradient)
        optimizer.step()
        for name, parameter in parameters.items():
            history[name].append(parameter.detach().clone())
    results = {}
    for name, parameter in parameters.items():
        never = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": 0}
        state = optimizer.state.get(parameter) or never
        results |= {f"param/{name}": torch.stack(history[name]), f"m/{name}": state["exp_avg"]}
        results |= {f"v/{name}": state["exp_avg_sq"], f"step/{name}": state["step"]}
    return case.compare(results, variant)


def line(report: check.Report) -> str:
    """One line: verdict, case, worst relative error and its key."""
    key, error, _, _, note = max(report.rows, key=lambda row: (not row[3], row[1] / max(row[2], 1e-300)))
    verdict = "PASS" if report.ok else "FAIL"
    return f"{verdict}  {report.case:40s} worst {error:8.2e} at {key}" + (f" ({note})" if note else "")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FIXTURES)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--case", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--verbose", action="store_true", help="every compared key")
    options = parser.parse_args(arguments)
    stems = check.cases(options.folder)
    if options.case:
        stems = [s for s in stems if any(part in s.name for part in options.case)]
    reports = []
    for stem in stems:
        reports.append(run_case(stem, getattr(torch, options.dtype)))
        print(reports[-1] if options.verbose else line(reports[-1]), flush=True)
        gc.collect()
    if not options.case and (options.folder / "optimizer.json").is_file():
        for variant in ("plain", "skip"):
            reports.append(run_optimizer(options.folder, variant))
            print(reports[-1] if options.verbose else line(reports[-1]), flush=True)
    if not reports:
        print(f"{options.folder}: no cases; expected cases/*.json, models/*.json or optimizer.json", file=sys.stderr)
        return 1
    failed = sum(not r.ok for r in reports)
    print(f"{len(reports) - failed} of {len(reports)} pass ({options.dtype})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
