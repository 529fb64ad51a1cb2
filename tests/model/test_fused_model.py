"""The whole model on the Triton kernels: outputs, losses and gradients of every task type against float64.

Runs under the interpreter (``TRITON_INTERPRET=1``) or on a GPU (``-m gpu``); a plain CPU run has nothing to launch.
"""

import pytest
import torch
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.models import random_batch, small_config
from unit_fast import ops
from unit_fast.config import BackboneConfig, DecoderConfig, EncoderConfig, TextConfig
from unit_fast.model.unit import UniT
from unit_fast.tasks import TASKS

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def _config(dropout: float = 0.0, layers: int = 2):
    """UniT's own head widths: 32 in the image encoder, 64 in the text encoder, 96 in the decoder."""
    return small_config(
        dropout=dropout,
        backbone=BackboneConfig(depth=14, width=8, norm="frozen", first_trained_stage=1),
        encoder=EncoderConfig(width=64, layers=layers, heads=2, ffn_width=48, dropout=dropout),
        text=TextConfig(
            width=128, layers=layers, heads=2, ffn_width=40, vocab_size=200, max_positions=140, dropout=dropout
        ),
        decoder=DecoderConfig(
            width=192, layers=layers, heads=2, ffn_width=56, dropout=dropout, classifier_dropout=dropout
        ),
    )


def _model(dropout: float = 0.0, layers: int = 2) -> UniT:
    """With the statistics of a trained backbone: frozen norms that do something."""
    torch.manual_seed(0)
    model = UniT(_config(dropout, layers)).train()
    for name, buffer in model.backbone.named_buffers():
        if name.endswith(("weight", "running_var")):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "running_mean")):
            buffer.normal_(std=0.2)
    return model


def _run(model, batch, matching=None) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Outputs, loss terms and gradients by name; the matching that was used."""
    model.zero_grad()
    out = model(batch)
    if matching is None and out.logits is not None:
        matching = model.match(out, batch)
    losses = model.losses(out, batch, matching)
    sum(losses.values()).backward()
    values = {"hidden_states": out.hidden_states, "logits": out.logits, "boxes": out.boxes, "scores": out.scores}
    values |= losses | {f"grad/{n}": p.grad for n, p in model.named_parameters()}
    return {k: v.detach().double().cpu() for k, v in values.items() if v is not None}, matching


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", TASKS)
def test_equals_the_reference(name, device):
    model = _model()
    exact_model = UniT(_config()).double().train()
    exact_model.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    model.to(device)
    batch = random_batch(name, model.config)
    wide = random_batch(name, model.config, dtype=torch.float64)
    for field in ("image", "boxes", "answer_scores"):  # the same numbers in both precisions
        if getattr(batch, field) is not None:
            setattr(wide, field, getattr(batch, field).double())
    batch = batch.to(device)
    with ops.kernels("reference"):
        exact, matching = _run(exact_model, wide)
        on_device = None if matching is None else matching.to(device)
        eager, _ = _run(model, batch, on_device)
    with ops.kernels("fused"):
        ours, _ = _run(model, batch, on_device)
    assert ours.keys() == exact.keys() == eager.keys()
    # A model adds up errors of many operators: values and gradients are judged by their worst relative error over all
    # tensors. Gradients that are zero in exact arithmetic (of keys' biases) are judged on the scale of the others.
    band = 4 * torch.finfo(torch.float32).eps
    for gradients in (True, False):
        keys = [key for key in exact if key.startswith("grad/") == gradients]
        smallest = 1e-4 * max(exact[key].abs().max() for key in keys)
        errors = {
            which: max(
                float((values[key] - exact[key]).abs().max() / exact[key].abs().max().clamp_min(smallest))
                for key in keys
            )
            for which, values in (("ours", ours), ("eager", eager))
        }
        assert errors["ours"] <= 2 * errors["eager"] + band, errors


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_dropout_replays_from_the_seed(device, monkeypatch):
    """One step twice from one state of the generator is bit-equal; another state gives other values; and every operator
    that has a kernel has run it."""
    monkeypatch.setattr(ops, "_logged", set())
    model = _model(dropout=0.2, layers=1).to(device)
    for name in ("vqa2", "glue_qnli"):
        batch = random_batch(name, model.config).to(device)
        steps = []
        with ops.kernels("fused"):
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                steps.append(_run(model, batch)[0])
        first, same, other = steps
        assert all(torch.equal(first[k], same[k]) for k in first)
        assert not torch.equal(first["hidden_states"], other["hidden_states"])
    fused = {row.op for row in ops.implementations() if "fused" in row.implementations}
    elsewhere = {"match_cost", "assignment", "set_loss", "attribute_loss", "adamw"}  # detection's, the optimiser's
    assert {op for op, how, _ in ops._logged if how == "fused"} == fused - elsewhere
