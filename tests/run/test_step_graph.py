"""Captured steps: which are captured, that they compute what eager steps do, and what happens when they cannot be.

Without a GPU a stand-in captures: it keeps the function and calls it on every replay, into the same result. All but
CUDA's own part is thus the code that runs on a card; ``test_a_replayed_graph_is_the_eager_step`` is for one.
"""

import contextlib
import dataclasses
import re

import pytest
import torch

from benchmarks.step.updates import NotCaptured
from tests.captures import CPU, assert_as_eager, small_step
from tests.models import random_batch
from tests.small_runs import log_of, rows, run, state_hash
from tests.small_runs import small_config as run_config
from unit_fast.errors import UserError
from unit_fast.numerics import arithmetic
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run import step_graph
from unit_fast.run.step_graph import CudaGraphs, copied, wanted
from unit_fast.schedule import lr_multiplier

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("detection_coco", "detection_visual_genome", "vqa2", "glue_qnli")


class Replaying(NotCaptured):
    """Counts what it is asked for."""

    def __init__(self):
        self.eager_steps = self.replays = self.captures = 0

    def eager(self, step):
        self.eager_steps += 1
        return super().eager(step)

    def capture(self, step):
        self.captures += 1

        def counted():
            self.replays += 1
            return step()

        return super().capture(counted)


class Failing(Replaying):
    """What cannot be captured."""

    def capture(self, step):
        self.captures += 1
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA details")


class Idle(Replaying):
    """A graph whose replay does nothing."""

    def capture(self, step):
        replay, result = super().capture(step)
        return lambda: None, result


@contextlib.contextmanager
def no_host_reads(device):
    """Within the block a read of the device by the host is an error (CUDA only)."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def batches_of(model, steps):
    return [(TASKS[i % len(TASKS)], random_batch(TASKS[i % len(TASKS)], model.config, seed=i)) for i in range(steps)]


def test_the_first_batches_of_a_bucket_run_eagerly_and_the_rest_are_replayed():
    backend = Replaying()
    model, _, _, graphs = small_step(backend, warm_up=2)
    for task, batch in batches_of(model, 16):
        update = graphs(task, [batch])
        assert update.terms.isfinite().all()
    assert (backend.eager_steps, backend.replays) == (8, 8)
    assert [(r["task"], r["eager"], r["replays"], r["refused"]) for r in graphs.rows()] == [
        (task, 2, 2, None) for task in TASKS
    ]
    graphs.check()


def test_graphed_training_is_eager_training_on_padded_batches_bit_for_bit():
    captured = small_step(Replaying(), warm_up=1)
    work = [(task, [batch]) for task, batch in batches_of(captured[0], 12)]
    assert_as_eager(captured, small_step(Replaying()), work)


def test_other_shapes_get_other_graphs_and_the_same_bucket_the_same_one():
    model, _, _, graphs = small_step(Replaying(), warm_up=0)
    batch = random_batch("glue_qnli", model.config)
    longer = dataclasses.replace(
        batch, **{f: getattr(batch, f).repeat(1, 3) for f in ("input_ids", "attention_mask", "token_type_ids")}
    )
    shorter = dataclasses.replace(
        batch, **{f: getattr(batch, f)[:, :5] for f in ("input_ids", "attention_mask", "token_type_ids")}
    )
    for b in (batch, longer, shorter, batch):
        graphs("glue_qnli", [b])
    assert [(r["bucket"], r["replays"]) for r in graphs.rows()] == [("2 x 16 tokens", 3), ("2 x 32 tokens", 1)]
    graphs("glue_qnli", [batch, batch])  # two forward passes an update are another step
    assert len(graphs.rows()) == 3


def test_what_cannot_be_captured_stays_eager_and_says_why_once(caplog):
    backend = Failing()
    model, _, _, graphs = small_step(backend, warm_up=1)
    batch = random_batch("glue_qnli", model.config)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        graphs("glue_qnli", [batch])
    assert (backend.eager_steps, backend.captures) == (4, 2)
    refused = "capture failed 2 times (operation not permitted when stream is capturing)"
    assert graphs.rows()[0]["refused"] == refused
    assert [r.message for r in caplog.records if "stays eager" in r.message] == [
        f"glue_qnli, 2 x 16 tokens: stays eager: {refused}"
    ]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    graphs.check()


def test_no_more_graphs_than_allowed():
    model, _, _, graphs = small_step(Replaying(), warm_up=0, most=2)
    for task, batch in batches_of(model, 4):
        graphs(task, [batch])
    assert [r["refused"] for r in graphs.rows()] == [None, None, *["2 graphs exist already"] * 2]


def test_a_replay_that_does_nothing_is_found():
    model, _, _, graphs = small_step(Idle(), warm_up=1)
    batch = random_batch("glue_qnli", model.config)
    graphs("glue_qnli", [batch])
    graphs.check()
    graphs("glue_qnli", [batch])
    with pytest.raises(RuntimeError, match="2 steps were asked for, 1 ran on the device"):
        graphs.check()


def test_the_waste_is_told_by_task():
    model, _, _, graphs = small_step(Replaying())
    batch = random_batch("detection_coco", model.config)
    batch.sizes = [(64, 80), (48, 60)]
    graphs("detection_coco", [batch])
    assert graphs.waste() == {"detection_coco": 1 - (64 * 80 + 48 * 60) / (2 * 64 * 96)}
    assert graphs.summary() == "CUDA graphs: 0 of 1 shapes, 0 of 1 steps replayed; padding: coco 35%"


def test_when_graphs_are_used():
    assert wanted("off", torch.device("cuda")) == "--graph off"
    assert wanted("auto", CPU) == "the run is on cpu"
    assert wanted("auto", torch.device("cuda")) is None
    with pytest.raises(UserError, match="--graph on: the run is on cpu"):
        wanted("on", CPU)


# ------------------------------------------------------------------------------------------- memory


class Full(Replaying):
    """A device whose memory does not suffice for some steps: those of ``refused`` tokens, while there are graphs."""

    def __init__(self, refused=32, always=False):
        super().__init__()
        self.refused, self.always, self.alive, self.releases = refused, always, 0, 0

    def eager(self, step):
        if self.longest == self.refused and (self.alive or self.always):
            torch.rand(3)  # what a step draws before its memory runs out
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB\nmore")
        return super().eager(step)

    def capture(self, step):
        self.alive += 1
        return super().capture(step)

    def release(self, random_state):
        super().release(random_state)
        self.alive, self.releases = 0, self.releases + 1


def _texts(model, length):
    batch = random_batch("glue_qnli", model.config)
    return dataclasses.replace(
        batch,
        **{f: getattr(batch, f).repeat(1, 4)[:, :length] for f in ("input_ids", "attention_mask", "token_type_ids")},
    )


def _run_full(backend, lengths):
    model, _, _, graphs = small_step(backend)
    torch.manual_seed(7)
    updates = []
    for length in lengths:
        backend.longest = length
        updates.append(copied(graphs("glue_qnli", [_texts(model, length)])))
    graphs.check()
    return model, graphs, updates


def test_a_step_without_memory_takes_that_of_the_graphs_and_is_the_same_step(caplog):
    backend, plain = Full(), Full(refused=0)
    model, graphs, updates = _run_full(backend, (16, 16, 32, 16, 16))
    other, _, expected = _run_full(plain, (16, 16, 32, 16, 16))
    assert backend.releases == 1
    assert {r["bucket"]: r["refused"] for r in graphs.rows()} == {
        "2 x 16 tokens": None, "2 x 32 tokens": "out of memory (CUDA out of memory. Tried to allocate 3.00 GiB)",
    }  # fmt: skip
    assert graphs.rows()[0]["replays"] == 3  # captured again
    assert all(torch.equal(a.terms, b.terms) for a, b in zip(updates, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "out of memory in an eager step: all graphs give theirs back; this shape stays eager" in caplog.text


def test_without_memory_a_second_time_there_are_no_more_graphs(caplog):
    backend = Full()
    _, graphs, _ = _run_full(backend, (16, 16, 32, 16, 32, 16, 16))
    assert backend.releases == 2
    assert backend.alive == 0
    assert graphs.rows()[0]["refused"] == "graphs were given up: out of memory"
    assert "and no more are captured" in caplog.text


def test_without_memory_and_without_graphs_it_is_the_callers_error():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        _run_full(Full(always=True), (32,))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        _run_full(Full(always=True), (16, 16, 32))


def test_graphs_are_given_up_when_an_eager_step_left_something_in_their_memory(caplog):
    class Leaking(Replaying):
        def left_behind(self):
            return "an eager step left 12 bytes" if self.eager_steps == 2 else None

    model, _, _, graphs = small_step(Leaking())
    for length in (16, 16, 32, 16, 16):
        graphs("glue_qnli", [_texts(model, length)])
    # The graph of 16 tokens went with the eager step of 32, and was captured again.
    assert [(r["bucket"], r["eager"], r["replays"]) for r in graphs.rows()] == [
        ("2 x 16 tokens", 1, 3), ("2 x 32 tokens", 1, 0),
    ]  # fmt: skip
    assert graphs.backend.captures == 2
    assert "an eager step left 12 bytes" in caplog.text


def test_a_capture_that_failed_once_is_tried_again(caplog):
    class Unready(Replaying):
        failures = 0

        def capture(self, step):
            if not self.failures:
                self.failures = 1
                raise RuntimeError("a library was not initialised")
            return super().capture(step)

    backend = Unready()
    model, _, _, graphs = small_step(backend)
    with caplog.at_level("INFO"):
        for _ in range(4):
            graphs("glue_qnli", [_texts(model, 16)])
    assert (backend.eager_steps, backend.replays) == (2, 2)
    assert graphs.rows()[0]["refused"] is None
    assert "capture failed (a library was not initialised); tried again after another step" in caplog.text


def test_the_inputs_of_all_buckets_lie_in_one_block():
    model, _, _, graphs = small_step(Replaying())
    for name in TASKS:
        graphs(name, [random_batch(name, model.config)])
    graphs("detection_coco", [random_batch("detection_coco", model.config, batch=4)])  # larger than the block
    blocks = [block.untyped_storage().data_ptr() for block in graphs.arena.blocks]
    assert len(blocks) == 2
    tensors = [t for known in graphs.captured.values() for b in known.batches for t in b.tensors().values()]
    assert {t.untyped_storage().data_ptr() for t in tensors} == set(blocks)
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in tensors)
    for known in graphs.captured.values():  # those of one bucket do not overlap
        spans = sorted((t.data_ptr(), t.nbytes) for b in known.batches for t in b.tensors().values())
        assert all(start + size <= following for (start, size), (following, _) in zip(spans, spans[1:]))
    assert graphs.arena.bytes == sum(map(len, graphs.arena.blocks))


# ------------------------------------------------------------------------------------------- on a card


@pytest.mark.gpu
def test_graphs_of_several_shapes_take_little_more_than_the_largest():
    device = torch.device("cuda", 0)
    model, _, _, graphs = small_step(CudaGraphs(device), device=device)
    small, large = (random_batch("detection_coco", model.config, batch=n).to(device) for n in (2, 16))
    peaks = []
    for _ in range(3):
        graphs("detection_coco", [large])
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_reserved())
    for _ in range(3):
        graphs("detection_coco", [small])
        graphs("glue_qnli", [random_batch("glue_qnli", model.config, batch=16).to(device)])
        graphs("detection_coco", [large])
    torch.cuda.synchronize()
    assert graphs.backend.pooled, "an eager step left something in the graphs' memory"
    assert sum(r["replays"] for r in graphs.rows()) == 9, graphs.rows()
    # What the eager step took serves the capture and all later steps; rounding to segments takes a little more.
    assert torch.cuda.memory_reserved() <= 1.25 * peaks[0] + 2**26


@pytest.mark.gpu
def test_a_run_on_a_card_replays_and_resumes_to_the_same_bits(root, tmp_path):
    """As ``unit-fast train`` runs it: the loader, two tasks, graphs, cuDNN's deterministic algorithms."""
    config = run_config(root, "coco", "sst2", steps=24, device="cuda", deterministic="on", graph="on", log_every=4)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_at=11)
    run(config, tmp_path / "parts", resume="auto")
    assert state_hash(tmp_path / "parts") == state_hash(tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert "stays eager" not in log, log
    assert "in the graphs' memory" not in log, log
    replayed = re.search(r"(\d+) of 24 steps replayed", log)
    assert replayed, log
    assert int(replayed[1]) >= 8, log


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_replayed_graph_is_the_eager_step(name):
    """Bit for bit, dropout included, and without a read of the device by the host."""
    device = torch.device("cuda", 0)

    def watched(i):
        torch.cuda.synchronize()
        return no_host_reads(device if i > 1 else CPU)  # the first steps initialise libraries

    with arithmetic("fp32", "on", device):
        captured, eager = (small_step(CudaGraphs(device), device=device, warm_up=2) for _ in range(2))
        work = [(name, [random_batch(name, captured[0].config, seed=i)]) for i in range(8)]
        assert_as_eager(captured, eager, work, device, watched)
    assert captured[-1].rows()[0]["replays"] == 6, captured[-1].rows()


# ------------------------------------------------------------------------------------------------- in the trainer


@pytest.fixture
def stand_in(monkeypatch):
    """Runs of the trainer capture with the stand-in, as if on CUDA."""
    monkeypatch.setattr(step_graph, "CudaGraphs", lambda device: Replaying())
    monkeypatch.setattr(step_graph, "wanted", lambda mode, device: None)


def test_a_run_replays_its_steps_at_the_rates_of_the_schedule(root, tmp_path, stand_in, monkeypatch):
    """Those on the device, those in the rows, and across a resume."""
    seen, step = [], MaskedAdamW.step
    monkeypatch.setattr(
        MaskedAdamW, "step", lambda self, *a, **k: (seen.append(self.device_lr.tolist()), step(self, *a, **k))[1]
    )
    config = run_config(root, "sst2", "coco", steps=12, log_every=1)
    run(config, tmp_path / "run", stop_at=4)
    assert run(config, tmp_path / "run", resume="auto").status == "finished"
    expected = [1e-3 * lr_multiplier(k, 4, 12) for k in range(12)]
    assert [rates[0] for rates in seen] == pytest.approx(expected, abs=1e-15)
    assert [r["lr"] for r in rows(tmp_path / "run")] == pytest.approx(expected)
    said = re.findall(
        r"CUDA graphs: \d of \d shapes, (\d+) of (\d+) steps replayed; padding: ", log_of(tmp_path / "run")
    )
    assert [steps for _, steps in said] == ["4", "8"]
    assert int(said[1][0]) > 0
