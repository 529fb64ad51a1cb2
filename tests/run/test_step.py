"""One update: what it moves, accumulation, losses that are not finite, precision, and memory that does not suffice."""

import math

import pytest
import torch

from tests.small_runs import ALL, run, small_config, summary
from unit_fast.data import collate, open_dataset
from unit_fast.errors import OutOfMemory
from unit_fast.run import step as step_module
from unit_fast.run.setup import build, used_masks
from unit_fast.run.train import train_step
from unit_fast.tasks import TASKS

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(config, name, count=2, start=0):
    dataset = open_dataset(name, "train", config.data, config.model.tasks[name], augment=False)
    return collate(name, [dataset.get(start + i, None) for i in range(count)])


@pytest.mark.parametrize("name", TASKS)
def test_a_step_moves_what_the_task_uses_and_nothing_else(root, name):
    config = small_config(root, *ALL, optim={"warmup_steps": 0})
    model, optimizer, _ = build(config, CPU)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    used = used_masks(model, optimizer, [name])[name]
    update = train_step(model.train(), optimizer, name, batch_of(config, name), used=used)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    allowed = {n for n, u in model.used_parameters(name).items() if u}
    assert moved <= allowed
    # exactly zero gradients are the few analytic ones (first decoder layer, positions of a single key, ...)
    assert len(moved) > 0.75 * len(allowed)
    assert update.grad_norm.isfinite()
    assert not update.nonfinite
    assert len(update.names) == len(update.terms)


def test_a_batch_of_another_task_is_refused(root):
    config = small_config(root)
    model, optimizer, _ = build(config, CPU)
    with pytest.raises(ValueError, match="task is 'vqa2'"):
        train_step(model, optimizer, "vqa2", batch_of(config, "glue_sst2"))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(root, loss):
    """Also where its gradient is finite."""
    config = small_config(root, "sst2")
    model, optimizer, _ = build(config, CPU)
    train_step(model.train(), optimizer, "glue_sst2", batch_of(config, "glue_sst2"))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    counts = optimizer.step_counts().clone()
    moments = {k: v["exp_avg"].clone() for k, v in optimizer.state_dict()["state"].items()}
    losses = model.losses
    model.losses = lambda *a, **k: {n: v + loss for n, v in losses(*a, **k).items()}
    update = train_step(model, optimizer, "glue_sst2", batch_of(config, "glue_sst2"))
    assert update.nonfinite
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(optimizer.step_counts(), counts)
    assert all(torch.equal(v["exp_avg"], moments[k]) for k, v in optimizer.state_dict()["state"].items())


@pytest.mark.parametrize("name", ["detection_coco", "vqa2", "glue_sst2"])
def test_bf16_trains_with_float32_losses(root, name):
    config = small_config(root, *ALL)
    model, optimizer, _ = build(config, CPU)
    seen = []
    losses = model.losses

    def spy(out, batch, *rest):
        seen.extend(v.dtype for v in vars(out).values() if isinstance(v, torch.Tensor))
        return losses(out, batch, *rest)

    model.losses = spy
    inner = []
    model.bert_projection.register_forward_hook(lambda m, i, o: inner.append(o.dtype))
    model.enc2dec_proj.register_forward_hook(lambda m, i, o: inner.append(o.dtype)) if name != "glue_sst2" else None
    update = train_step(model.train(), optimizer, name, batch_of(config, name), bf16=True)
    assert set(seen) == {torch.float32}
    if inner and not isinstance(model.enc2dec_proj, torch.nn.Identity):
        assert set(inner) == {torch.bfloat16}
    assert update.terms.dtype == torch.float32
    assert update.terms.isfinite().all()


def test_graph_policy_leaves_out_the_positions_on_glue(root):
    for unused, expected in (("graph", False), ("skip", True), ("update_all", True)):
        config = small_config(root, "vqa2", "sst2", optim={"unused": unused})
        model, optimizer, _ = build(config, CPU)
        names = {id(p): n for n, p in model.named_parameters()}
        members = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
        masks = used_masks(model, optimizer, ["vqa2", "glue_sst2"])
        at = members.index("bert_pos_projection.weight")
        assert bool(masks["glue_sst2"][at]) is expected
        assert bool(masks["vqa2"][at])


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory\nmore"), RuntimeError("DefaultCPUAllocator: not enough memory")],
    ids=["cuda", "host"],
)
def test_memory_that_does_not_suffice_says_what_to_do(root, tmp_path, monkeypatch, error):
    real, updates = step_module.train_step, iter(range(4))

    def full(*arguments, **named):
        if next(updates) == 2:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(step_module, "train_step", full)
    said = str(error).splitlines()[0]
    with pytest.raises(
        OutOfMemory, match=rf"out of memory in step 3 on glue_sst2, batch 2 \({said}\)\. .*halve --batch"
    ):
        run(small_config(root, "sst2", steps=4), tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"], found["step"]) == ("out_of_memory", 5, 2)
    assert not (tmp_path / "run" / "checkpoints").exists()
