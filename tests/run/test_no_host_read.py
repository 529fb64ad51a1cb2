"""The proof that a training step reads nothing on the host, on a machine without a GPU (and its own controls).

``backward`` cannot run on fake CUDA tensors without a driver, so there are three parts, for every task: forward,
matching and losses on fake ``cuda:0``; the whole step on fake CPU tensors with the fused operators forced; the
optimiser on fake ``cuda:0`` with gradients set by hand. Fake tensors see no operator's inside: each launcher is called
with fake tensors too, and the source is searched. Violations planted in each of these places must be found.

``python -m tests.run.test_no_host_read`` prints how many kernels a step launches by this count.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from unit_fast_kernels.assembly import budgets as _budgets
from unit_fast_kernels.assembly.record import record
from unit_fast_kernels.shared.registration import REGISTERED

from tests.host_reads import HOST_READ, CountingMode, Counts, counting, host_reads
from tests.models import random_batch
from unit_fast import ops
from unit_fast.config import LossConfig, ModelConfig
from unit_fast.model.unit import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.setup import Ema, used_masks
from unit_fast.run.train import _float32, train_step
from unit_fast.schedule import lr_multiplier_tensor
from unit_fast.tasks import TASKS

POLICIES = ("skip", "graph", "update_all")


# ------------------------------------------------------------------------------------------------ a full-size model


def full_model(device: str) -> UniT:
    """The eight-task model of the paper in training mode, its convolutions laid out as training does."""
    with torch.device(device):
        model = UniT(ModelConfig()).train()
    for module in model.backbone.modules():  # Module.to does not work on fake tensors
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=model.backbone.memory_format)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return model


def optimizer_of(model: UniT, unused: str = "skip") -> MaskedAdamW:
    return MaskedAdamW(model.parameter_groups(5e-5, 1e-5), unused=unused, max_norm=0.1)


@contextlib.contextmanager
def autocast_cuda():
    """``torch.autocast("cuda")`` switches itself off without CUDA; this does what it does."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def forward_and_losses(name: str, device: str = "cuda:0") -> tuple[Counts, Counts]:
    """Counts of the forward pass, and of matching and losses."""
    with counting() as counts:
        model = full_model(device)
        batch = random_batch(name, model.config).to(device)
        counts.clear()
        with autocast_cuda():
            out = model(batch)
        last = out.scores if out.logits is None else out.logits
        assert last.dtype == torch.bfloat16, "the forward pass was not what runs on a card"
        forward = counts.taken()
        losses = model.losses(_float32(out), batch)
        torch.stack(list(losses.values())).sum()
    return forward, counts.taken()


def whole_step(
    name: str,
    *,
    unused: str = "skip",
    bf16: bool = True,
    change=lambda model: None,
    warm: bool = False,
    accumulate: int = 1,
    loss: LossConfig | None = None,
) -> Counts:
    """Counts of ``train_step`` on fake CPU tensors; ``change`` may plant something into the model. ``warm``: of the
    second one, the first makes the optimiser's moments. ``accumulate``: batches of an update."""
    with counting() as counts, ops.kernels("fused"):
        model = full_model("cpu")
        optimizer = optimizer_of(model, unused)
        used = used_masks(model, optimizer, [name])[name]
        if loss:
            model.config = dataclasses.replace(model.config, loss=loss)
        batch = [random_batch(name, model.config, seed=seed) for seed in range(accumulate)]
        done = torch.zeros((), dtype=torch.int64)
        change(model)
        if warm:
            train_step(model, optimizer, name, batch, used=used, bf16=bf16)
        counts.clear()
        optimizer.scale_lr(lr_multiplier_tensor(done, 2000, 500_000))
        update = train_step(model, optimizer, name, batch, used=used, bf16=bf16)
        assert update.terms.dim() == 1
    return counts.taken()


def optimizer_step(name: str, unused: str) -> Counts:
    """Counts of the optimiser on fake CUDA tensors."""
    with counting() as counts:
        model = full_model("cuda:0")
        optimizer = optimizer_of(model, unused)
        used = used_masks(model, optimizer, [name])[name]
        expected = model.used_parameters(name)
        for parameter_name, parameter in model.named_parameters():
            if expected[parameter_name]:
                parameter.grad = torch.empty_like(parameter)
        done = torch.zeros((), dtype=torch.int64, device="cuda:0")
        optimizer.scale_lr(lr_multiplier_tensor(done, 2000, 500_000))
        optimizer.step(used)  # the first step makes moments and tables
        counts.clear()
        optimizer.scale_lr(lr_multiplier_tensor(done, 2000, 500_000))
        stats = optimizer.step(used)
        assert stats.grad_norm.device.type == stats.nonfinite.device.type == "cuda"
    return counts.taken()


# -------------------------------------------------------------------------------------------------- the three parts


@pytest.mark.parametrize("name", TASKS)
def test_forward_matching_and_losses_on_fake_cuda(name):
    for counts in forward_and_losses(name):
        assert not counts.reads
        assert counts.to_device == 0
        assert counts.launches > 0


@pytest.mark.parametrize("name", TASKS)
def test_the_whole_step_on_fake_tensors(name):
    counts = whole_step(name)
    assert not counts.reads
    used = {op.removeprefix("unit_fast::") for op in counts.ops if op.startswith("unit_fast::")}
    assert {"adamw", "residual_norm_fwd", "residual_norm_bwd", "attention_fwd"} <= used
    if TASKS[name].is_detection:
        assert {"match_cost", "assignment", "set_loss_fwd", "set_loss_bwd"} <= used


@pytest.mark.parametrize("unused", POLICIES)
def test_every_policy_of_the_optimiser_in_the_whole_step(unused):
    assert not whole_step("glue_qnli", unused=unused, bf16=False).reads


def test_accumulated_batches_in_the_whole_step():
    """Every denominator of the whole update is found on the device."""
    loss = LossConfig(ce_normalisation="per_process")
    assert not whole_step("detection_visual_genome", accumulate=2, loss=loss).reads


def test_the_average_of_the_weights_on_fake_cuda():
    ema = Ema(nn.Linear(3, 2), 0.9)  # cannot copy a fake model
    with counting() as counts:
        ema.pieces = [tuple([torch.empty(p.shape, device="cuda:0") for p in side] for side in p) for p in ema.pieces]
        refused = torch.zeros((), dtype=torch.int32, device="cuda:0")
        counts.clear()
        ema.update(refused)
        assert {op for op in counts.ops if "foreach" in op} == {
            "aten::_foreach_sub", "aten::_foreach_mul_", "aten::_foreach_add_",
        }  # fmt: skip
        assert not counts.reads
        assert counts.to_device == 0


@pytest.mark.parametrize("unused", POLICIES)
@pytest.mark.parametrize("name", ["detection_visual_genome", "glue_sst2"])
def test_the_optimiser_on_fake_cuda(name, unused):
    counts = optimizer_step(name, unused)
    assert not counts.reads
    assert counts.to_device == 0
    assert counts.ops["unit_fast::adamw"] == 1


# ------------------------------------------------------------------------------------------- inside the operators


@functools.cache
def launched(op: str) -> dict[str, float]:
    """Registered operator of the module ``op`` -> kernels that one call launches; no launcher may read the host."""
    here, counts, found = _budgets.module(op), Counts(), {}
    size = next(iter(here.SHAPES.values()))

    def passes():
        for operator, arguments in here.launches(size, torch.float32, "cuda:0"):
            before = len(launches)
            with CountingMode(counts):
                REGISTERED[operator].launch(*arguments)
            found.setdefault(operator, []).append(len(launches) - before)

    launches = []
    record(passes, "h100", into=launches)
    assert not counts.reads, (op, counts.reads)
    return {operator: sum(n) / len(n) for operator, n in found.items()}


@pytest.mark.parametrize("op", _budgets.ops())
def test_no_launcher_reads_the_host(op):
    kernels = launched(op)
    assert kernels
    assert all(count >= 1 for count in kernels.values())


ON_THE_HOST = {
    "_adamw_cpu.py": "what runs on a CPU",
    "_attention_cpu.py": "what runs on a CPU",
    "_random.py": "what runs on a CPU",
    "_assemble.py": "assembles kernels, has no tensors",
    "_assemble_worker.py": "assembles kernels, has no tensors",
    "_record.py": "assembles kernels, has no tensors",
    "_budgets.py": "assembles kernels, has no tensors",
    "_bounds.py": "arithmetic on machine code",
    "_tuned.py": "asks for the card's name, which waits for nothing",
}
"""Files that may read the host, and why."""
ALLOWED = {
    ("_triton.py", ""): "a setting of Triton",
    ("_ticket.py", "_stream"): "which stream is current and its state are known to the host",
    ("adamw.py", "addresses_of"): "an address is known to the host",
    ("_capture.py", "capturing"): "the state of the stream is known to the host",
    ("adamw.py", "_operator_reference"): "the reference, on a CPU",
    ("assignment.py", "assignment_reference"): "the reference: SciPy, on the host",
    ("batch.py", "Buckets._up"): "rounds a number",
    ("text.py", "Packing.__init__"): "only where tokens are packed, on a CPU",
    ("optim.py", "MaskedAdamW._possible"): "a mask that lies on the host",
    ("optim.py", "MaskedAdamW.state_dict"): "a checkpoint, not a step",
    ("optim.py", "MaskedAdamW.load_state_dict"): "a checkpoint, not a step",
    ("step_graph.py", "CudaGraphs.__init__"): "makes the pool and the stream, once a run",
    ("step_graph.py", "CudaGraphs.eager"): "orders two streams, waits for nothing",
    ("step_graph.py", "CudaGraphs.capture"): "captures",
    ("step_graph.py", "CudaGraphs._memory"): "says where memory comes from, waits for nothing",
    ("step_graph.py", "CudaGraphs._new_pool"): "makes a pool, at most a few times a run",
    ("step_graph.py", "CudaGraphs.random_state"): "seed and offset, which the host knows",
    ("step_graph.py", "CudaGraphs.release"): "after memory has run out",
    ("step_graph.py", "StepGraphs.check"): "asked for at log intervals",
    ("train.py", "Trainer._memory_message"): "an error message",
}
"""Functions of the step's modules that may, and why."""


def searched() -> list[Path]:
    """The source of everything that runs in a step."""
    root = Path(__file__).parents[2]
    package = root / "unit_fast"
    names = ("ops.py", "batch.py", "train.py", "step_graph.py", "input_arena.py", "numerics.py", "schedule.py")
    files = [*(root / "kernels").glob("*.py"), *package.glob("model/*.py"), *package.glob("detection/*.py")]
    return sorted([*files, *package.glob("optim*.py"), *(package / name for name in names)])


def test_the_source_of_the_step_reads_nothing():
    found = [f for p in searched() for f in host_reads(p.read_text(encoding="utf-8"), p.name)]
    new = [str(f) for f in found if f.file not in ON_THE_HOST and (f.file, f.function) not in ALLOWED]
    assert not new, "\n".join(["these read the host; if they do not run in a step, say so in ALLOWED:", *new])
    stale = set(ALLOWED) - {(f.file, f.function) for f in found} | set(ON_THE_HOST) - {p.name for p in searched()}
    assert not stale, f"nothing is found there any more: {stale}"


# ------------------------------------------------------------------------------------------------------- controls


def _plant(what):
    """A change of a model that does ``what`` with its loss in every step."""

    def change(model):
        losses = model.losses
        model.losses = lambda *arguments, **named: {k: what(v) for k, v in losses(*arguments, **named).items()}

    return change


def _write_masked(x):
    written = x.detach()[None].clone()
    written[written > 0] = 1.0
    return x + written[0]


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x * x.item(),
        lambda x: x if x > 0 else -x,
        lambda x: x * float(x.detach()),
        lambda x: x * x[None].nonzero().sum(),
        lambda x: x[None][x[None] > 0].sum(),
    ],
    ids=["item", "if", "float", "nonzero", "masked read"],
)
def test_a_planted_read_raises(what):
    with pytest.raises(HOST_READ):
        whole_step("glue_sst2", change=_plant(what))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (_write_masked, "index_put_: a boolean index"),
        (lambda x: x + torch.randperm(3)[0], "randperm: reads the host or may"),
        (lambda x: x + torch.multinomial(torch.ones(4), 1)[0], "multinomial: reads the host or may"),
    ],
    ids=["masked write", "randperm", "multinomial"],
)
def test_a_planted_operator_that_may_read_is_counted(what, said):
    assert whole_step("glue_sst2", change=_plant(what)).reads == {said: 1}


@pytest.mark.parametrize(
    "what",
    [lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: torch.empty((), device="cpu").copy_(x)],
    ids=["cpu", "to", "copy_"],
)
def test_a_planted_copy_to_the_host_is_counted(what):
    with counting() as counts:
        what(torch.ones((), device="cuda:0"))
    assert counts.reads.total() == 1


def test_a_real_tensor_in_the_step_is_refused():
    forgotten = torch.ones(())
    with pytest.raises(Exception, match="(?i)fake"):
        whole_step("glue_sst2", change=_plant(lambda x: x * forgotten))


def test_a_copy_from_the_host_is_counted():
    with counting() as counts:
        torch.tensor([1.0, 2.0], device="cuda:0")
    assert counts.to_device == 1
    assert not counts.reads


def test_a_read_inside_an_operator_is_found_by_its_launcher_and_in_the_source():
    """Fake tensors run an operator's fake, so neither they nor ``opcheck`` see what its launcher does."""
    source = "def _launch(x):\n    scale = x.sum().item()\n    return x * scale\n"
    names = {}
    exec(source, names)
    with pytest.raises(HOST_READ):
        record(lambda: names["_launch"](torch.ones(3, device="cuda:0")), "h100")
    assert [str(f) for f in host_reads(source, "op.py")] == ["op.py:2 in _launch: x.sum().item()"]


@pytest.mark.parametrize(
    "line",
    ["x.item()", "x.tolist()", "x.cpu()", 'x.to("cpu")', "x.numpy()", "torch.nonzero(x)", "x.nonzero()", "bool(x)",
     "float(x)", "int(x.sum())", "torch.cuda.synchronize()", "x.data_ptr()", "torch.unique(x)", "torch.equal(x, y)"],
)  # fmt: skip
def test_the_search_finds(line):
    assert len(host_reads(f"def f(x):\n    return {line}")) >= 1


@pytest.mark.parametrize("line", ["int(round(0.5))", "float(1)", "len(x)", "x.shape", "np.unique(x)", "bool(a > 1)"])
def test_the_search_leaves_alone(line):
    assert host_reads(line) == []


# ------------------------------------------------------------------------------------------------------ the count


def kernels_of(counts: Counts) -> float:
    """Kernels behind the operators counted: those of ours as their launchers do it, one for each of PyTorch's."""
    ours = {operator: n for op in _budgets.ops() for operator, n in launched(op).items()}
    return sum(n * ours.get(op.removeprefix("unit_fast::"), 1) for op, n in counts.ops.items())


def main() -> None:
    print(f"{'task':26}{'forward':>9}{'losses':>9}{'step':>9}{'of it casts':>13}{'optimiser':>11}{'reads':>7}")
    for name in TASKS:
        forward, losses = forward_and_losses(name)
        step, optimizer = whole_step(name, warm=True), optimizer_step(name, "skip")
        reads = sum((c.reads.total() for c in (forward, losses, step, optimizer)), 0)
        print(
            f"{name:26}{kernels_of(forward):9.0f}{kernels_of(losses):9.0f}{kernels_of(step):9.0f}"
            f"{step.ops['aten::_to_copy']:13}{kernels_of(optimizer):11.0f}{reads:7}"
        )


if __name__ == "__main__":
    main()
