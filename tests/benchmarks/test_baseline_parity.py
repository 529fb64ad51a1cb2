"""The eager baseline computes what the authors' code computes: outputs, losses, gradients, optimiser trajectory."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.baselines.unit_eager import EagerConfig, UniTEager
from benchmarks.baselines.unit_eager_training import HFAdamW

HERE = Path(__file__).resolve()
KITS = [HERE.parents[1] / "fixtures" / "parity", HERE.parents[3] / "shared" / "parity"]
KIT = next((k for k in KITS if (k / "check.py").exists()), None)
SMALL = sorted((KIT / "cases").glob("small_*.json")) if KIT else []
FULL = sorted((KITS[1] / "cases").glob("full_*.json")) if KITS[1].exists() else []

if KIT is None:
    pytest.skip("no parity kit", allow_module_level=True)


def load_check():
    spec = importlib.util.spec_from_file_location("baseline_parity_check", KIT / "check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load_check()


def tensors(inputs: dict, dtype) -> dict:
    """The case's inputs as tensors, floating ones in ``dtype``."""

    def convert(value):
        if isinstance(value, dict):
            return {k: convert(v) for k, v in value.items()}
        if isinstance(value, list):
            return [convert(v) for v in value]
        value = torch.from_numpy(np.asarray(value))
        return value.to(dtype) if value.is_floating_point() else value

    return {key: convert(value) for key, value in inputs.items()}


def build(case, dtype, **changes) -> UniTEager:
    model = UniTEager(EagerConfig.from_mmf(case.config, **changes)).to(dtype)
    state = {name: torch.from_numpy(value).to(dtype) for name, value in case.state()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    return model.train()


def run(case, dtype=torch.float64, **changes) -> dict:
    """The case's training step: everything ``check.condense`` takes."""
    model, name, stages = build(case, dtype, **changes), case.dataset, {}
    inputs = tensors(case.inputs(), dtype)
    hidden = model(name, inputs, stages)
    outputs = model.heads(name, hidden)
    losses, matching = model.losses(name, hidden, outputs, inputs["targets"])
    sum(losses.values()).backward()
    raw = {"hidden_states": hidden, **outputs, **stages, "losses": losses, "matching": matching}
    if name == "detection_visual_genome":
        with torch.no_grad():
            raw["attribute_logits"] = model.attribute_logits(name, hidden, outputs["logits"])
    raw["grads"] = {n: p.grad for n, p in model.named_parameters()}
    return raw


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_small_case(path):
    case = check.load(path)
    report = check.compare(case, check.condense(case, run(case)), tolerance=1e-9)
    assert report.ok, str(report)


@pytest.mark.long
@pytest.mark.parametrize("path", FULL, ids=lambda p: p.stem)
def test_full_case(path):
    case = check.load(path)
    report = check.compare(case, check.condense(case, run(case)), tolerance=1e-9)
    assert report.ok, str(report)


def test_float32_case():
    case = check.load(next(p for p in SMALL if p.stem == "small_no_task__vg"))
    results = check.condense(case, run(case, torch.float32))
    report = check.compare(case, results, tolerance=1e-4, tolerances={"grad": 1e-2})
    assert report.ok, str(report)


@pytest.mark.parametrize("stem", ["small_separate__coco", "small_separate__vqa2"])
def test_fused_attention_case(stem):
    """The peer with the usual library choices is the same model."""
    case = check.load(next(p for p in SMALL if p.stem == stem))
    report = check.compare(case, check.condense(case, run(case, fused_attention=True)), tolerance=1e-9)
    assert report.ok, str(report)


@pytest.mark.parametrize("variant", ["plain", "skip"])
def test_optimizer(variant):
    case = check.OptimizerCase(KIT)
    meta = case.meta
    params = {n: torch.nn.Parameter(torch.from_numpy(case.initial(n))) for n in case.names}
    groups = [
        {"params": [p for n, p in params.items() if meta["parameters"][n]["group"] == group], "lr": lr}
        for group, lr in meta["base_lr"].items()
    ]
    optimizer = HFAdamW(groups, betas=meta["betas"], eps=meta["eps"], weight_decay=meta["weight_decay"],
                        skip_zero=variant == "skip")  # fmt: skip
    warmup, total = meta["warmup_updates"], meta["updates"]
    results = {f"param/{n}": [] for n in params}
    for k in range(total):
        for name, p in params.items():
            gradient = case.gradient(name, k)
            p.grad = None if gradient is None else torch.from_numpy(np.array(gradient))
        torch.nn.utils.clip_grad_norm_(list(params.values()), meta["clip_norm"])
        factor = k / warmup if k < warmup else max(0.0, 0.5 * (1 + np.cos(np.pi * (k - warmup) / (total - warmup))))
        for group, lr in zip(optimizer.param_groups, meta["base_lr"].values()):
            group["lr"] = lr * factor
        optimizer.step()
        for name, p in params.items():
            results[f"param/{name}"].append(p.detach().clone().numpy())
    results = {k: np.stack(v) for k, v in results.items()}
    for name, p in params.items():
        state = optimizer.state[p]
        results.update({f"m/{name}": state["exp_avg"].numpy(), f"v/{name}": state["exp_avg_sq"].numpy(),
                        f"step/{name}": state["step"]})  # fmt: skip
    report = case.compare(results, variant, tolerance=1e-9)
    assert report.ok, str(report)
