"""The proof that an evaluation reads the device once in ``READ_EVERY`` batches, on a machine without a GPU.

Two parts: forward pass, predictions and losses of a batch on fake ``cuda:0`` tensors, where a host read raises or is
counted; and the number of copies of whole evaluations. The source is searched too. What is planted must be found.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.host_reads import HOST_READ, counting, host_reads
from tests.models import random_batch, small_config
from tests.run.test_no_host_read import autocast_cuda
from tests.small_runs import ALL, make_world
from tests.small_runs import small_config as run_config
from unit_fast import evaluation
from unit_fast.batch import Output
from unit_fast.evaluation import task_run
from unit_fast.evaluation.evaluate import evaluate
from unit_fast.evaluation.precision import finite_rows, nonfinite_weights
from unit_fast.evaluation.readback import Readback
from unit_fast.evaluation.task_results import KINDS
from unit_fast.model.unit import UniT
from unit_fast.tasks import TASKS, get_task


class _Data:
    """As much of a data set as a kind of results looks at before there are any."""

    class_names, answers = {}, ["", "yes"]


def fresh_run(model, name: str) -> task_run.TaskRun:
    """One that has not run."""
    run = object.__new__(task_run.TaskRun)
    run.model, run.task, run.split = model, get_task(name), "val"
    run.kind = KINDS[run.task.loss](_Data(), run.task, attributes=True)
    return run


def counts_of(name: str, size: int, plant=lambda values: values):
    """Counts of one evaluated batch on fake CUDA tensors, and of packing its values."""
    with counting() as counts:
        with torch.device("cuda:0"):
            model = UniT(small_config(name)).eval()
        run = fresh_run(model, name)
        batch = random_batch(name, model.config, batch=size).to("cuda:0")
        if run.task.has_image:
            batch.orig_size = torch.ones(size, 2, dtype=torch.int64, device="cuda:0")
        counts.clear()
        with torch.no_grad():
            with autocast_cuda():
                output = model(batch)
            values = plant(run._values(output, batch, True))
        assert {x.device.type for x in values.values()} == {"cuda"}
        assert all(len(x) in (1, size) for x in values.values())
    return counts.taken()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_reads_nothing(name):
    counts = counts_of(name, 5)
    assert not counts.reads
    assert counts.to_device == 0
    assert counts.launches > 0


@pytest.mark.parametrize(
    "plant",
    [
        lambda values: {**values, "best": values["best"] + values["best"].sum().item()},
        lambda values: {**values, "best": values["best"][values["finite"]]},
        lambda values: values if values["finite"].all() else {},
    ],
    ids=["item", "mask", "branch"],
)
def test_a_planted_read_is_found(plant):
    try:
        counts = counts_of("glue_sst2", 2, plant)
    except HOST_READ:
        return
    assert counts.reads


class _Counted(Readback):
    made: list = []
    taken: list = []

    def __init__(self, values):
        _Counted.made.append(len(values))
        super().__init__(values)

    def take(self):
        _Counted.taken.append(len(self.forms))
        return super().take()


@pytest.fixture
def copies(monkeypatch):
    """Batches of each copy from the device, in order."""
    monkeypatch.setattr(task_run, "Readback", _Counted)
    _Counted.made, _Counted.taken = [], []
    return _Counted


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_whole_evaluation_copies_once_in_so_many_batches(world, copies, monkeypatch):
    config = run_config(world, *ALL)
    torch.manual_seed(0)
    model = UniT(config.model)
    found = {}
    for every in (1, 4, 1000):
        monkeypatch.setattr(task_run, "READ_EVERY", every)
        copies.made, copies.taken = [], []
        # of 16 SNLI-VE and 14 VQA samples, one a batch
        results = evaluate(model, config, tasks=["snli_ve", "vqa2", "coco"], progress=False)
        for figures in results.values():
            figures.pop("seconds")
        found[every] = results
        assert copies.taken == copies.made
        batches = [results[t]["count"] for t in ("snli_ve", "vqa2", "coco")]
        expected = [[every] * (n // every) + [n % every] * (n % every > 0) for n in batches]
        assert copies.made == sum(expected, [])
    assert found[1] == found[4] == found[1000], "when the device is read changes nothing"


def test_more_samples_in_a_batch_are_no_more_copies(world, copies):
    config = dataclasses.replace(run_config(world, *ALL), eval_batch=16)
    torch.manual_seed(0)
    results = evaluate(UniT(config.model), config, tasks=["sst2"], progress=False)
    assert results["sst2"]["count"] > 1
    assert copies.made == [1]


def test_values_come_back_as_they_were():
    first = {"scores": torch.randn(3, 2), "best": torch.tensor([2**40 + 1, -1, 0]), "finite": torch.tensor([True])}
    second = {"scores": torch.randn(1, 2).bfloat16(), "wide": torch.randn(2, dtype=torch.float64)}
    back = Readback([first, second]).take()
    for values, found in zip((first, second), back, strict=True):
        assert list(values) == list(found)
        for name, value in values.items():
            assert found[name].shape == value.shape
            assert torch.equal(found[name], value.double() if value.is_floating_point() else value)


ALLOWED = {
    ("task_run.py", "TaskRun._take"): "takes what has come",
    ("evaluate.py", "_evaluation_mode"): "which card is current is known to the host",
    ("evaluate.py", "_memory_message"): "an error message",
    ("precision.py", "nonfinite_weights"): "once an evaluation, before the first batch, and for an error",
    ("readback.py", "Readback.__init__"): "records an event, waits for nothing",
    ("readback.py", "Readback.take"): "waits for the copy: the one place",
    ("task_results.py", "_number"): "a number of the host",
}
"""Functions of the evaluation that read the device or look as if they did, and why."""
ON_THE_HOST = ("add", "result", "example", "write", "labelled", "spread", "in_order")
"""Methods that get what is on the host already."""


HOST_ONLY = ("known_labels.py", "labels.py", "metrics.py", "predict.py", "prediction.py")
"""Files of what is not on a device, or waits for it anyway: one prediction."""


def test_the_source_of_the_evaluation_reads_nothing_else():
    found = [
        f
        for path in sorted(Path(evaluation.__path__[0]).glob("*.py"))
        if path.name not in HOST_ONLY
        for f in host_reads(path.read_text(encoding="utf-8"), path.name)
        if f.function.rsplit(".", 1)[-1] not in ON_THE_HOST
    ]
    new = [str(f) for f in found if (f.file, f.function) not in ALLOWED]
    assert not new, new
    stale = set(ALLOWED) - {(f.file, f.function) for f in found}
    assert not stale, f"nothing is found there any more: {stale}"


def test_finite_rows_looks_at_every_output_of_a_sample():
    hidden = torch.zeros(1, 2, 3, 4)
    for field, shape in (("logits", (2, 2, 3, 5)), ("boxes", (2, 2, 3, 4)), ("attribute_logits", (2, 3, 7))):
        outputs = {"logits": torch.zeros(2, 2, 3, 5), "boxes": torch.zeros(2, 2, 3, 4)}
        outputs[field] = torch.zeros(shape)
        assert finite_rows(Output(hidden_states=hidden, **outputs)).tolist() == [True, True]
        outputs[field].view(-1)[-1] = float("nan")
        assert finite_rows(Output(hidden_states=hidden, **outputs)).tolist() == [True, False]
    scores = torch.tensor([[0.0, float("inf")], [0.0, 1.0]])
    assert finite_rows(Output(hidden_states=hidden, scores=scores)).tolist() == [False, True]
    model = UniT(small_config("sst2"))
    assert nonfinite_weights(model) == ""
