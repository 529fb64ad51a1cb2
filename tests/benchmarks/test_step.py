"""The benchmark of whole steps, on a CPU and (tried on one) as a card runs it: problems, gates, counted work, rows."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from benchmarks import bench_step
from benchmarks.runner.machine import ROOT
from benchmarks.step import card, gate, problems, providers, show, updates, work
from tests.benchmarks.common import quick, rows_of, steps_of_a_card

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------------ on a CPU

ON_CPU = ("--device", "cpu")


def test_it_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert quick(bench_step.main, path, *ON_CPU, "--case", "qnli", "--case", "coco") == 0
    rows = rows_of(path)
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider) for case in ("coco", "qnli") for provider in ("eager", "library", "ours")
    ]
    for row in rows:
        assert list(row["phases_ms"]) == ["forward", "losses", "backward", "optimiser"]
        assert all(value > 0 for value in row["phases_ms"].values())
    assert "ours against eager: times as fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["decoder.layers.1.linear2.weight", "text_encoder.layers.0.value.weight", "classifiers.glue_qnli.out.bias"]
)
def test_another_model_is_refused(tmp_path, capsys, monkeypatch, name):
    """One tensor that is not the baseline's, by a twentieth, and there are no figures."""
    build = providers.Ours.__init__

    def spoilt(self, *arguments, **settings):
        build(self, *arguments, **settings)
        with torch.no_grad():
            dict(self.model.named_parameters())[name].mul_(1.05)

    monkeypatch.setattr(providers.Ours, "__init__", spoilt)
    path = tmp_path / "rows.jsonl"
    assert quick(bench_step.main, path, *ON_CPU, "--case", "qnli", "--provider", "eager") == 1
    assert not path.exists()
    assert "ours DIFFERS" in capsys.readouterr().out


def test_gate_runs_the_path_that_is_timed():
    """With the gate's probability dropout is active in the model, and drops nothing."""
    shape, config = problems.QUICK["qnli"], problems.mmf_config(True)
    ours = providers.Ours(shape, config, problems.mmf_state(True))
    first, second = ours.outputs(), ours.outputs()
    assert all(torch.equal(first[key], second[key]) for key in first)
    decoder = ours.model.decoder
    assert decoder.layers[0].p == 0.1  # put back
    before = problems.set_dropout(ours.model, problems.DROPS_NOTHING)
    assert decoder.layers[0].p > 0
    assert len(before) > 5
    assert torch.equal(ours.model(ours.batch).scores, ours.model(ours.batch).scores)
    problems.set_dropout(ours.model, 0.1)
    assert not torch.equal(ours.model(ours.batch).scores, ours.model(ours.batch).scores)


def test_batches_are_what_they_say():
    for shape in problems.CASES.values():
        task, image, tokens, objects, *_ = shape
        if task == "detection_coco" and image[1] > 400:
            continue
        batch = problems.make_batch(*shape[:4])
        inputs, targets = problems.eager_inputs(batch)
        if tokens:
            assert batch.attention_mask.sum(1).tolist() == list(tokens)
            assert batch.input_ids.shape[1] == max(tokens)
            assert inputs["ids"].shape[1] == problems.TASKS[task][4]
            assert torch.equal(inputs["input_mask"].sum(1), batch.attention_mask.sum(1))
        if objects:
            assert [len(t["labels"]) for t in targets] == list(objects)
            low = batch.boxes[..., :2] - batch.boxes[..., 2:] / 2
            high = batch.boxes[..., :2] + batch.boxes[..., 2:] / 2
            assert bool(((low >= -1e-6) & (high <= 1 + 1e-6)).all())


def test_memory_child():
    command = [sys.executable, "-m", "benchmarks.bench_step", "--quick", "--threads", "1"]
    command += ["--memory-child", "qnli", "ours"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert 0.1 < figures["host_gib"] < 4
    assert figures["device_gib"] is None


# ------------------------------------------------------------------------------------------------------------ problems


def test_the_problems_of_a_card():
    assert len(problems.CARD) == 24
    for name, case in problems.CARD.items():
        batch = int(name.rpartition("_b")[2])
        task, image, tokens, objects = case
        assert problems.samples(case) == batch
        assert (image is None) == task.startswith("glue")
        assert bool(objects) == task.startswith("detection")
        assert len(tokens) in (0, batch)
        assert len(objects) in (0, batch)
        assert max(tokens, default=0) <= problems.TASKS[task][4]
    assert problems.CARD["coco_b8"][1] == (8, 800, 1344)
    assert problems.CARD["vqa2_b1"][1] == (1, 800, 1184)
    assert problems.CARD["sst2_b2"][2] == (9, 11)
    assert problems.CARD["qnli_b16"][2] == problems.QNLI_TOKENS * 2
    assert problems.brief(problems.CARD["qnli_b8"]) == "glue_qnli, 8 x 28 to 81 tokens (baseline padded to 128)"
    assert problems.brief(problems.CARD["vg_b2"]) == "detection_visual_genome, 2 x 800x1344, 19 objects"


def test_cases_are_chosen_by_name_or_by_task():
    assert list(card.cases_of(None, problems.CARD)) == list(problems.CARD)
    assert list(card.cases_of(["coco"], problems.CARD)) == ["coco_b2", "coco_b8", "coco_b16", "coco_b1"]
    assert list(card.cases_of(["sst2_b1", "qnli_b8"], problems.CARD)) == ["qnli_b8", "sst2_b1"]


@pytest.mark.parametrize(
    "case",
    [
        ("detection_visual_genome", (1, 64, 64), (), (3,)),
        pytest.param(("visual_entailment", (1, 64, 64), (6,), ()), marks=pytest.mark.long),
    ],
    ids=("vg", "snli_ve"),
)
def test_every_tasks_step_passes_the_gate(case, capsys):
    """Visual Genome with its attributes; the gate's bound here is float32's."""
    assert gate.authors("x", case, quick=True, device=CPU, console=Console(width=200))
    assert capsys.readouterr().out.count(": equal:") == 2


def test_the_gate_sees_another_model(capsys):
    def spoilt(*arguments, **settings):
        made = providers.Ours(*arguments, **settings)
        with torch.no_grad():
            dict(made.model.named_parameters())["classifiers.glue_sst2.out.bias"][0].add_(0.1)
        return made

    case = ("glue_sst2", None, (8,), ())
    assert not gate.authors("x", case, quick=True, device=CPU, console=Console(width=200), ours=spoilt)
    printed = capsys.readouterr().out
    assert "library against the authors' formulation in float32: equal" in printed
    assert "ours against the authors' formulation in float32: DIFFERS" in printed


def test_what_low_precision_may_do():
    exact, low = {"loss/a": torch.tensor([2.0])}, {"loss/a": torch.tensor([2.1])}
    assert gate.allowed(exact, low, True)["loss/a"] == pytest.approx(2 * 0.05 + 1e-2)
    assert gate.allowed(exact, exact, False)["loss/a"] == pytest.approx(1e-4)
    assert gate.allowed(exact, {}, True)["loss/a"] == float("inf")
    parts = {"grad/a.b.c.d": torch.ones(2), "grad/a.b.c.e": torch.zeros(1, 1), "grad/a.b.x": torch.ones(1), **exact}
    assert {k: v.tolist() for k, v in gate.by_part(parts).items()} == {
        "grad/a.b.c": [1.0, 1.0, 0.0], "grad/a.b.x": [1.0], "loss/a": [2.0],
    }  # fmt: skip


def test_the_gate_sees_a_replay_that_differs(capsys):
    class Other(updates.Step):
        def __init__(self, case, config, device, graph):
            super().__init__(case, config, device, graph)
            self.optimizer.max_norm = 1e-9 if graph else 0.1

    case, console = ("glue_sst2", None, (8,), ()), Console(width=200)
    assert not gate.captured("x", case, quick=True, device=CPU, console=console, step=Other)
    assert "DIFFERS" in capsys.readouterr().out


def test_pairs_become_queries():
    labels = torch.tensor([[5, 6, -1], [7, -1, -1]])
    pairs = [[(torch.tensor([1, 4]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([0]))]]
    assert providers.queries_of(pairs, labels).tolist() == [[[4, 1, -1], [2, -1, -1]]]


# ---------------------------------------------------------------------------------------------------------------- work


def test_work_is_counted_by_operator():
    """A product, a convolution and both directions of attention, by hand."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from unit_fast import ops

    with FakeTensorMode(allow_non_fake_inputs=False), ops.kernels("fused"):
        a, b = torch.empty(3, 5), torch.empty(5, 7)
        q, k, v = (torch.empty(2, n, 4, 32, dtype=torch.bfloat16, requires_grad=True) for n in (9, 11, 11))
        with work.Counting() as counted:
            a @ b
            torch.relu(a)  # a pass between: not counted
            out = ops.attention(q, k, v)
            out.backward(torch.empty_like(out))
    pair = 2 * 2 * 4 * 9 * 11 * 32
    assert counted.flops == {"float32": 2 * 3 * 5 * 7, "bfloat16": 2 * pair + 5 * pair}
    assert counted.bytes > 4 * (15 + 35 + 21)


def test_the_bound_is_the_longer_of_both():
    found = work.Work({"bfloat16": 989e9, "float32": 67e9}, bytes=4.8e9)
    assert found.bound_ms("NVIDIA H200") == pytest.approx(2.0)
    assert work.Work({"bfloat16": 989e9}, bytes=4.8e10).bound_ms("NVIDIA H200") == pytest.approx(10.0)
    assert found.bound_ms("another card") is None
    assert found.bound_ms(None) is None


def test_the_work_of_a_small_step():
    found = work.count(("glue_sst2", None, (8,), ()), quick=True)
    assert set(found.flops) == {"bfloat16"}
    assert found.bytes > 28 * 30522 * 48  # the word table is among what is updated


# --------------------------------------------------------------------------------------------------------- on a card


def test_a_row_of_a_card(capsys):
    ours, eager = steps_of_a_card()
    assert ours["time_ms"] == 9.0
    assert ours["samples_per_s"] == pytest.approx(222.22)
    assert ours["busy_share"] == pytest.approx(1.4 / 9, abs=1e-4)
    assert ours["share_of_bound"] == pytest.approx(3.1 / 0.989 / 9, abs=1e-3)
    assert (ours["launches"], ours["kernels"], ours["waits"]) == (2.0, 1.5, 0.5)
    assert list(ours) == list(eager)
    assert eager["time_ms"] is eager["busy_ms"] is eager["categories"] is None
    assert eager["bound_ms"] == ours["bound_ms"]
    console = Console(width=200)
    console.print(show.table([ours, eager]))
    console.print(show.categories([ours, eager]))
    printed = capsys.readouterr().out
    assert "at least 3.1 TFLOP in bfloat16, 10 GB" in printed
    assert "out of memory" in printed
    assert "AdamW (ours)" in printed
    assert show.line(eager) == "coco_b2 eager: out of memory"
    assert json.loads(json.dumps(ours)) == ours


def test_it_runs_small_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert quick(bench_step.main, path, "--case", "qnli_b2", "--provider", "ours_eager") == 0
    found = rows_of(path)
    assert [(r["case"], r["provider"], r["device"]) for r in found] == [
        ("qnli_b2", provider, "cpu") for provider in ("ours", "ours_eager")
    ]
    for row in found:
        assert row["time_ms"] > 0
        assert row["work"]["flops"]["float32"] > 0
        assert row["kernels"] is row["share_of_bound"] is None
    printed = capsys.readouterr().out
    assert "tried on a CPU" in printed
    assert "compiled" not in printed.partition("not compared.")[2]  # it was not asked for
    assert "replayed updates against eager ones: equal" in " ".join(printed.split())


def test_a_replay_that_never_came_is_an_error():
    class Graphs:
        def check(self):
            pass

        def rows(self):
            return [{"replays": 0, "refused": None}]

    made = object.__new__(updates.Step)
    made.graphs, made.update = Graphs(), lambda: None
    with pytest.raises(RuntimeError, match="no step was replayed"):
        card.figures(made, CPU, rounds=1, warmup=1)


def test_a_peer_that_does_not_compile_has_a_row_that_says_so(monkeypatch):
    def make(*arguments):
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(card, "make", make)
    args = bench_step.parser().parse_args(["--quick"])
    case, least, stamp = problems.QUICK_CARD["qnli_b2"], work.Work({"float32": 1.0}, 1.0), {"gpu": None}
    row = card.measure("qnli_b2", case, "compiled", args, CPU, stamp, least)
    assert row["status"] == "failed: ValueError: no such thing"
    with pytest.raises(ValueError, match="no such thing"):
        card.measure("qnli_b2", case, "library", args, CPU, stamp, least)


def test_no_compiler_no_compiled_peer(monkeypatch):
    assert "asks for it" in card.why_not_compiled(True, False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "needs a C compiler" in card.why_not_compiled(False, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a card says")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--minutes", "3"], "leave it out"),
        (["--quick", "--case", "coco_b99"], "coco_b2"),
        (["--quick", "--provider", "theirs"], "ours_eager"),
        (["--quick", "--rounds", "0"], "at least 1"),
    ],
)
def test_wrong_option(capsys, arguments, word):
    assert bench_step.main([*arguments, "--no-results"]) == 2
    assert word in capsys.readouterr().err


def test_memory_is_refused_where_it_is_always_measured():
    args = bench_step.parser().parse_args(["--memory"])
    assert "always measured" in card.refused(args, on_card=True)
    assert card.refused(args, on_card=False) is None
