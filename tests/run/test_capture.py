"""Captured steps leave nothing to the host and nothing in graphs' memory: for every task, and plants that are found.

``captures.Recorded`` captures operators instead of launches, with our kernels as the registered operators that they
are on a card. (That a captured update finds its gradients is ``kernels/test_masked_adamw.py``'s, interpreted.)
"""

import numpy as np
import pytest
import torch
from unit_fast_kernels.adamw.kernels import GRADIENT_ROW
from unit_fast_kernels.shared import capture as _capture

from tests.captures import CPU, Recorded, Violation, assert_as_eager, small_step, watching
from tests.models import random_batch
from tests.small_runs import ALL, log_of, run, state_hash
from tests.small_runs import small_config as run_config
from unit_fast import ops
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run import step_graph
from unit_fast.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    """Operators that have kernels are taken as on a card; what is registered runs its reference here."""
    monkeypatch.setattr(ops, "INTERPRETING", True)
    with ops.kernels("fused"):
        yield


@pytest.mark.parametrize("name", TASKS)
def test_the_whole_step_replays_as_it_runs_eagerly(name):
    """Bit for bit, dropout and schedule included, on COCO with two forward passes an update."""
    with watching() as watch:
        backend, passes = Recorded(watch), 1 + (name == "detection_coco")
        captured, eager = small_step(backend), small_step(backend)
        config = captured[0].config
        batches = [[random_batch(name, config, seed=7 * i + k) for k in range(passes)] for i in range(3)]
        assert_as_eager(captured, eager, [(name, micro) for micro in batches])
    assert (backend.eager_steps, backend.replays) == (1, 2), captured[-1].rows()


# ------------------------------------------------------------------------------------------------- plants


def _around_losses(what):
    """A change that passes every loss through ``what``."""

    def change(model, optimizer):
        losses = model.losses
        model.losses = lambda *a, **k: {name: what(value) for name, value in losses(*a, **k).items()}

    return change


def _table_filled_afterwards(model, optimizer):
    """What the landed optimiser did: a table from the graph's memory, filled by the host after the capture."""
    step, tables = optimizer.step, []

    def planted(used=None):
        if _capture.capturing(CPU):
            tables.append(torch.empty(3))
            tables[-1].add(1.0)
        elif tables:
            tables.pop().copy_(torch.ones(3))
        return step(used)

    optimizer.step = planted


def _keeps(model, optimizer):
    """Something that is made within a capture is kept."""
    kept = []
    _around_losses(lambda x: (kept.append(torch.zeros(3)) if _capture.capturing(CPU) else None, x)[1])(model, optimizer)


OF_THE_HOST = "made of the host's numbers|numbers of the host become"
LEFT = "left in memory of graphs after a step"
PLANTS = {
    "a table that the host fills after the capture": (_table_filled_afterwards, f"{LEFT}: aten.empty"),
    "memory read before the replay has written it": (
        _around_losses(lambda x: x + 0 * torch.empty(()) if _capture.capturing(CPU) else x),
        "reads memory of the graph that this replay has not written",
    ),
    "a tensor of the host's": (_around_losses(lambda x: x * torch.tensor(1.0)), OF_THE_HOST),
    "as_tensor": (_around_losses(lambda x: x * torch.as_tensor([1.0])[0]), OF_THE_HOST),
    "new_tensor": (_around_losses(lambda x: x * x.new_tensor(1.0)), OF_THE_HOST),
    "a constant without an operator": (
        _around_losses(lambda x: x * torch.from_numpy(np.ones(1, np.float32))[0]),
        OF_THE_HOST,
    ),
    "a value for the host": (
        _around_losses(lambda x: x * float(x.detach()) / float(x.detach())),
        "gives the host a value",
    ),
    # The optimiser itself refuses in a capture, and in an eager step they would lie in graphs' memory.
    "moments made within a step": (lambda model, optimizer: optimizer.state.clear(), LEFT),
    "what is made within a capture and kept": (_keeps, rf"{LEFT}: aten.zeros.default \[3\]"),
    "gradients that are kept": (lambda model, optimizer: setattr(optimizer, "zero_grad", lambda **_: None), LEFT),
}


def updates(watch, change=lambda model, optimizer: None):
    """Four updates, captured after the first; what the last returned."""
    model, _, _, graphs = small_step(Recorded(watch), change)
    return [graphs("glue_sst2", [random_batch("glue_sst2", model.config, seed=i)]) for i in range(4)][-1]


@pytest.mark.parametrize(("change", "said"), PLANTS.values(), ids=PLANTS)
def test_a_plant_is_found(change, said):
    with watching() as watch, pytest.raises(Violation, match=said):
        updates(watch, change)


def test_a_write_of_the_host_to_memory_of_a_graph_is_found():
    with watching() as watch:
        update = updates(watch)
        with pytest.raises(Violation, match=r"writes to memory \[\d\] of a captured graph from outside"):
            update.terms.zero_()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.param_groups[0].update(lr=0.5), "the learning rate of group 0, a number, would be written"),
        (lambda o: o.param_groups[0].update(betas=(0.5, 0.9)), "AdamW's hyper would be copied to the device"),
        (lambda o: setattr(o, "max_norm", 7.0), "AdamW's max_norm would be copied to the device"),
        (lambda o: o.state.clear(), "the moments of a parameter would be made"),
        (lambda o: setattr(o, "_counts", None), "MaskedAdamW's step counts would be made"),
    ],
    ids=["rate", "betas", "max_norm", "moments", "counts"],
)
def test_the_optimiser_refuses_what_a_capture_must_not_hold(change, said, monkeypatch):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([p], max_norm=1.0)
    optimizer.prepare()
    p.grad = torch.ones(3)
    change(optimizer)
    monkeypatch.setattr(_capture, "capturing", lambda device: True)
    before = p.detach().clone()
    what_to_do = r"within the capture of a CUDA graph.*call MaskedAdamW.prepare\(\)"
    with pytest.raises(RuntimeError, match=f"{said} {what_to_do}"):
        optimizer.step()
    assert torch.equal(p, before)


def test_eager_steps_in_graphs_memory_keep_no_table_of_addresses():
    """Gradients come to lie where they lay before: a table kept by their addresses would be taken for right."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([p])
    optimizer.prepare()
    p.grad = torch.ones(3)
    with ops.graph_memory():
        optimizer.step()
    assert "addresses" not in optimizer._tables._hosts
    optimizer.step()
    assert optimizer._tables._hosts["addresses"][GRADIENT_ROW] == [p.grad.data_ptr()]


# ------------------------------------------------------------------------------------------------- in the trainer


@pytest.mark.parametrize(
    ("tasks", "steps"),
    [(("coco", "sst2"), 12), pytest.param(ALL, 48, marks=pytest.mark.long)],
    ids=["two tasks", "all tasks"],
)
def test_a_run_as_the_trainer_captures_it(tasks, steps, root, tmp_path, monkeypatch):
    """The loader's batches, an average of the weights, evaluation in between, and a resume."""
    config = run_config(root, *tasks, steps=steps, ema_decay=0.9, eval_every=5, eval_limit=2, log_every=5)
    monkeypatch.setattr(step_graph, "wanted", lambda mode, device: None)
    with watching() as watch:
        backends = []

        def backend(device):
            backends.append(Recorded(watch))
            return backends[-1]

        monkeypatch.setattr(step_graph, "CudaGraphs", backend)
        assert run(config, tmp_path / "whole").status == "finished"
        assert backends[0].replays >= steps // 3
        run(config, tmp_path / "parts", stop_at=6)
        run(config, tmp_path / "parts", resume="auto")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")
    assert "stays eager" not in log_of(tmp_path / "whole")
