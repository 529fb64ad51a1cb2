"""The benchmark of whole steps as a card runs it, on a CPU: problems, gates, counted work, rows and tables."""

import json

import pytest
import torch
from rich.console import Console

from benchmarks import _run, bench_step, tables
from benchmarks._kernels import Profile
from benchmarks.step import card, gate, problems, providers, updates, work
from tests.benchmarks.test_profile import TWO_STEPS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        with work._Counting() as counted:
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


# ---------------------------------------------------------------------------------------------------------------- rows


def rows(gpu="NVIDIA H200"):
    """Rows as of a card: one with figures, one without."""
    stamp = {"gpu": gpu, "cpu": "Xeon", "cores": 16, "threads": 2, "driver": "580", "commit": "abc"}
    stamp |= {"versions": {"torch": "2.11.0"}, "date": "2026-11-27T00:00:00Z"}
    case, least = problems.CARD["coco_b2"], work.Work({"bfloat16": 3.1e12}, 1e10)
    device = torch.device("cuda")
    found = Profile.of(TWO_STEPS, 2)
    ours = card.row_of("coco_b2", case, "ours", stamp, least, device, times=[10.0, 8.0, 9.0], found=found, peak=4.0)
    return [ours, card.row_of("coco_b2", case, "eager", stamp, least, device, status="out of memory")]


def test_a_row_of_a_card(capsys):
    ours, eager = rows()
    assert ours["time_ms"] == 9.0
    assert ours["samples_per_s"] == pytest.approx(222.22)
    assert ours["busy_share"] == pytest.approx(1.4 / 9, abs=1e-4)
    assert ours["share_of_bound"] == pytest.approx(3.1 / 0.989 / 9, abs=1e-3)
    assert (ours["launches"], ours["kernels"], ours["waits"]) == (2.0, 1.5, 0.5)
    assert list(ours) == list(eager)
    assert eager["time_ms"] is eager["busy_ms"] is eager["categories"] is None
    assert eager["bound_ms"] == ours["bound_ms"]
    console = Console(width=200)
    console.print(card.table([ours, eager]))
    console.print(card.categories([ours, eager]))
    printed = capsys.readouterr().out
    assert "at least 3.1 TFLOP in bfloat16, 10 GB" in printed
    assert "out of memory" in printed
    assert "AdamW (ours)" in printed
    assert card.line(eager) == "coco_b2 eager: out of memory"
    assert json.loads(json.dumps(ours)) == ours


def test_the_tables_of_a_card():
    ours, eager = rows()
    made = tables.table([ours, eager]).splitlines()
    assert made[2].startswith(
        "| NVIDIA H200 | detection_coco, 2 x 800x1344, 19 objects, bfloat16 | eager | out of memory"
    )
    assert "| ours | 222 | 9 (8.4 to 9.6) |  | 2 | 2 | 0 | 0 / 0 | 0.16 | 4 | 0.35 |" in made[3]
    assert len({line.count("|") for line in made[:4]}) == 1
    assert made[-1] == "Measured on NVIDIA H200; driver 580; torch 2.11.0; commit abc; 2026-11-27."
    kernels = tables.kernels_table([ours, eager]).splitlines()
    assert kernels[0] == "| ms (kernels) of a step on NVIDIA H200 | coco_b2, ours |"
    assert kernels[2] == "| AdamW (ours) | 1.00 (1) |"
    with pytest.raises(ValueError, match="one table would mix NVIDIA H200, NVIDIA H100"):
        tables.table([ours, *rows("NVIDIA H100 80GB HBM3")])
    with pytest.raises(ValueError, match="one table would mix NVIDIA H200, no card"):
        tables.table([ours, {**ours, "device": "cpu", "gpu": None}])
    with pytest.raises(ValueError, match="no row has kernels"):
        tables.kernels_table([eager])


def test_it_runs_small_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--threads", "1", "--rounds", "1", "--case", "qnli_b2", "--json", str(path)]
    assert bench_step.main([*arguments, "--provider", "ours_eager"]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
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


def test_results_of_a_card_have_a_file_of_their_own():
    assert _run.results_path("bench_step", None).name == "bench_step.jsonl"
    assert _run.results_path("bench_step", "NVIDIA H200").name == "bench_step_h200.jsonl"
    assert _run.results_path("bench_step", "NVIDIA A100-SXM4-80GB").name == "bench_step_a100.jsonl"
    assert _run.results_path("bench_step", "Some Card 9 (x)").name == "bench_step_some_card_9_x.jsonl"
