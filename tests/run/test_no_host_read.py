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
from unit_fast.numerics import in_full_precision
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.ema import Ema
from unit_fast.run.setup import used_masks
from unit_fast.run.step import train_step
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
        losses = model.losses(in_full_precision(out), batch)
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


ALLOWED = {
    ("kernels/shared", ""): "a setting of Triton",
    ("kernels/shared", "_card_of"): "asks for the card's name, which waits for nothing",
    ("kernels/shared", "_multiprocessors_of"): "asks for a number of the card, which waits for nothing",
    ("kernels/shared", "_stream"): "which stream is current and its state are known to the host",
    ("kernels/shared", "capturing"): "the state of the stream is known to the host",
    ("kernels/shared", "RandomBits.__init__"): "what runs on a CPU",
    ("kernels/adamw", "addresses_of"): "an address is known to the host",
    ("kernels/adamw", "_operator_reference"): "the reference, on a CPU",
    ("kernels/assignment", "assignment_reference"): "the reference: SciPy, on the host",
    ("kernels/set_loss", "make"): "arguments for a benchmark",
    ("unit_fast/buckets", "Buckets._up"): "rounds a number",
    ("unit_fast/model", "Folder.save_pretrained"): "writes a file, not a step",
    ("unit_fast/model", "Packing.__init__"): "only where tokens are packed, on a CPU",
    ("unit_fast/optim", "MaskedAdamW._possible"): "a mask that lies on the host",
    ("unit_fast/optim", "as_torch_saves"): "a checkpoint, not a step",
    ("unit_fast/optim", "complete_groups"): "a checkpoint, not a step",
    ("unit_fast/optim", "copy_moments"): "a checkpoint, not a step",
    ("unit_fast/run", "CudaGraphs.__init__"): "makes the pool and the stream, once a run",
    ("unit_fast/run", "CudaGraphs.eager"): "orders two streams, waits for nothing",
    ("unit_fast/run", "CudaGraphs.capture"): "captures",
    ("unit_fast/run", "CudaGraphs._memory"): "says where memory comes from, waits for nothing",
    ("unit_fast/run", "CudaGraphs._new_pool"): "makes a pool, at most a few times a run",
    ("unit_fast/run", "CudaGraphs.random_state"): "seed and offset, which the host knows",
    ("unit_fast/run", "CudaGraphs.release"): "after memory has run out",
    ("unit_fast/run", "StepGraphs.check"): "asked for at log intervals",
}
"""Functions of the step's rooms that may read the host, and why."""
ROOT = Path(__file__).parents[2]


def searched() -> list[Path]:
    """The source of everything that runs in a step. Operators' ``cpu.py`` run on the host, ``assembly`` in no step."""
    names = (
        "ops",
        "batch",
        "buckets",
        "numerics",
        "schedule",
        "run/step",
        "run/step_graph",
        "run/input_arena",
        "run/ema",
    )
    rooms = ("kernels", "unit_fast/model", "unit_fast/detection", "unit_fast/optim")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    files = [path for path in files if path.name != "cpu.py" and path.parent.name != "assembly"]
    return sorted([*files, *(ROOT / "unit_fast" / f"{name}.py" for name in names)])


def room_of(path: Path) -> str:
    """``kernels/adamw`` of a file of an operator, ``unit_fast/run`` of one of a run."""
    return "/".join(path.relative_to(ROOT).with_suffix("").parts[:2])


def test_the_source_of_the_step_reads_nothing():
    found = [(room_of(p), f) for p in searched() for f in host_reads(p.read_text(encoding="utf-8"), p.name)]
    new = [str(f) for room, f in found if (room, f.function) not in ALLOWED]
    assert not new, "\n".join(["these read the host; if they do not run in a step, say so in ALLOWED:", *new])
    stale = set(ALLOWED) - {(room, f.function) for room, f in found}
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
