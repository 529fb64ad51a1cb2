"""Tuning: what is timed, what is left out, what is written."""

import json
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.registration import REGISTERED

from benchmarks.runner import tune
from benchmarks.runner.main import main
from tests.planted_kernels import launch_matmul, needs_compiler

CPU = torch.device("cpu")


class Op:
    """An op with one operator and two entries; its launcher notes what it was launched with."""

    SHAPES = {"small": (8,), "large": (64,), "larger": (80,)}

    def __init__(self, monkeypatch):
        self.launched = []
        monkeypatch.setitem(REGISTERED, "planted_fwd", SimpleNamespace(launch=self.launch))

    @staticmethod
    def bucket(size):
        return "few" if size < 10 else "many"

    def launch(self, x, factor):
        taken = _tuned.launch_parameters("planted", self.bucket(len(x)), {"block": 4, "warps": 1}, CPU)
        if taken["block"] == 999:
            raise RuntimeError("out of resource: shared memory")
        self.last = taken
        self.launched.append((len(x), taken["block"], taken["warps"]))
        return x * factor + (1.0 if taken["block"] == 666 else 0.0)

    def launches(self, shape, dtype, device):
        return [("planted_fwd", (torch.ones(*shape, dtype=dtype, device=device), 2.0))]

    def candidates(self, shape):
        blocks = (4, 8, 16, 32, 666, 999) if shape[0] > 10 else (4, 8, 666, 999)
        return [
            {"op": "planted", "bucket": self.bucket(shape[0]), "parameters": {"block": b, "warps": w}}
            for b in blocks
            for w in (1, 2)
        ]


@pytest.fixture
def op(monkeypatch, tmp_path):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    _tuned.table.cache_clear()
    yield Op(monkeypatch)
    _tuned.table.cache_clear()


def timer_for(op, milliseconds):
    def timer(function):
        function()
        return milliseconds(op.last["block"], op.last["warps"])

    return timer


def tuned(op, tmp_path, milliseconds, fits=lambda module, bucket, found, card, dtypes: found, **options):
    console = Console(file=StringIO(), width=120)
    found = tune.tune(
        op, "h100", CPU, timer_for(op, milliseconds), console, fits=fits, folder=tmp_path, rounds=3, **options
    )
    return found, console.file.getvalue()


def test_entries_and_who_looks_them_up(op):
    few, many = tune.buckets(op, torch.float32, CPU)
    assert (few.op, few.name, [c[0] for c in few.cases]) == ("planted", "few", ["small"])
    assert (many.name, [c[0] for c in many.cases]) == ("many", ["large", "larger"])
    assert few.candidates[0] == {"block": 4, "warps": 1}
    assert len(few.candidates) == 8


def test_candidates_that_nothing_looks_up_are_an_error(op, monkeypatch):
    monkeypatch.setattr(Op, "SHAPES", {"small": (8,)})
    monkeypatch.setattr(Op, "candidates", lambda self, shape: [{"op": "planted", "bucket": "x", "parameters": {}}])
    with pytest.raises(ValueError, match="candidates for planted/x, which no launch"):
        tune.buckets(op, torch.float32, CPU)


def test_the_fastest_is_written_and_used(op, tmp_path):
    (tmp_path / "h100.json").write_text('{"other": {"b": {"warps": 8}}}')
    found, said = tuned(op, tmp_path, lambda block, warps: 1.0 / (block + warps))
    best = {("planted", "few"): {"block": 8, "warps": 2}, ("planted", "many"): {"block": 32, "warps": 2}}
    assert found == best  # 32 is three steps from the default
    assert json.loads((tmp_path / "h100.json").read_text()) == {
        "other": {"b": {"warps": 8}},
        "planted": {bucket: parameters for (_, bucket), parameters in best.items()},
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "h100.json"]
    assert "block=32, warps=2 <-" in said
    assert "timed 8 of 12 candidates" in said
    with _tuned.assume("h100"):
        assert _tuned.launch_parameters("planted", "few", {"block": 4, "warps": 1}, CPU) == {"block": 8, "warps": 2}


def test_the_walk_ends_where_nothing_near_is_better(op, tmp_path):
    found, said = tuned(op, tmp_path, lambda block, warps: 9.0 if block == 8 else 1.0 / block)
    assert found["planted", "many"] == {"block": 4, "warps": 1}
    assert "timed 4 of 12 candidates" in said


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        ({"x": 4, "y": 2}, {"x": 8, "y": 1}, True),
        ({"x": 4, "y": 2}, {"x": 16, "y": 2}, False),
        ({"x": 0, "y": 2}, {"x": 168, "y": 2}, True),
        ({"x": 1, "y": 1, "z": 1}, {"x": 2, "y": 2, "z": 2}, False),
    ],
)
def test_what_is_near(a, b, answer):
    assert tune.near(a, b) == tune.near(b, a) == answer


def all_near(monkeypatch):
    monkeypatch.setattr(tune, "near", lambda a, b: True)


def test_wrong_and_failing_candidates_are_left_out(op, tmp_path, monkeypatch):
    """Even where they would be the fastest by far."""
    all_near(monkeypatch)
    found, _ = tuned(op, tmp_path, lambda block, warps: 1.0 / block)
    assert {key[1]: parameters["block"] for key, parameters in found.items()} == {"few": 8, "many": 32}


def test_what_does_not_fit_is_left_out(op, tmp_path, monkeypatch):
    all_near(monkeypatch)

    def fits(module, bucket, found, card, dtypes):
        most = 32 if len(dtypes) == 1 else 16  # the other dtypes take less
        return [parameters for parameters in found if parameters["block"] <= most]

    found, _ = tuned(op, tmp_path, lambda block, warps: 1.0 / block, fits)
    assert {key[1]: parameters["block"] for key, parameters in found.items()} == {"few": 8, "many": 16}
    with pytest.raises(RuntimeError, match="planted/few: no candidate stays within the limits"):
        tuned(op, tmp_path, lambda block, warps: 1.0, lambda *arguments: [])


def test_entries_are_left_when_time_is_up(op, tmp_path):
    found, said = tuned(op, tmp_path, lambda block, warps: 1.0, minutes=-1)
    assert found == {}
    assert "planted/few: left for another run" in said
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_what_fits_is_what_assembles(tmp_path, monkeypatch):
    """A real kernel under candidates that are fine, spill, take too much shared memory, and do not compile."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    default = {"m": 64, "n": 64, "k": 32, "stages": 2, "warps": 4}

    def launch(*arguments):
        launch_matmul(**_tuned.launch_parameters("planted", "any", default, CPU))

    monkeypatch.setitem(REGISTERED, "planted_fwd", SimpleNamespace(launch=launch))
    module = SimpleNamespace(SHAPES={"any": ()}, launches=lambda shape, dtype, device: [("planted_fwd", ())])
    bucket = tune.Bucket("planted", "any", [default], [("any", "planted_fwd", ())])
    fine = [default, {**default, "n": 32}]
    bad = [
        {"m": 128, "n": 256, "k": 64, "stages": 2, "warps": 4},
        {"m": 128, "n": 128, "k": 128, "stages": 4, "warps": 8},
        {"m": 64, "n": 64, "k": 24, "stages": 2, "warps": 4},
    ]
    found = tune.fitting(module, bucket, [*bad, *fine], "a100", (torch.bfloat16, torch.float16))
    assert found == fine
    assert list((tmp_path / "triton").iterdir())  # Triton finds them there


def test_an_illegal_access_is_not_a_candidate_left_out(op, tmp_path, monkeypatch):
    def launch(x, factor):
        taken = _tuned.launch_parameters("planted", op.bucket(len(x)), {"block": 4, "warps": 1}, CPU)
        if taken["block"] == 8:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        op.last = taken
        return x

    monkeypatch.setitem(REGISTERED, "planted_fwd", SimpleNamespace(launch=launch))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuned(op, tmp_path, lambda block, warps: 1.0)


def test_rounds_are_interleaved(op, tmp_path):
    few = tune.buckets(op, torch.float32, CPU)[0]
    op.launched.clear()
    timer = timer_for(op, lambda block, warps: float(block))
    timed = tune.time_candidates(few, few.candidates[1:3], timer, rounds=2)
    order = [(8, 4, 1), (8, 4, 2), (8, 8, 1)]
    assert op.launched == [order[0], *order, *order, *order]  # the expected result, a run each, two rounds
    assert [t.ratio for t in timed] == pytest.approx([1.0, 1.0, 2.0])


def test_the_default_of_the_card_is_the_baseline(op, monkeypatch):
    """Also where ``candidates`` does not know it or names another first."""
    monkeypatch.setattr(
        Op, "candidates", lambda self, shape: [
            {"op": "planted", "bucket": self.bucket(shape[0]), "parameters": {"block": b, "warps": 1}} for b in (8, 4)
        ],
    )  # fmt: skip
    assert tune.buckets(op, torch.float32, CPU)[0].candidates == [{"block": 4, "warps": 1}, {"block": 8, "warps": 1}]


def test_a_launcher_takes_what_is_tried():
    default = {"block": 4}
    with _tuned.trying(lambda op, bucket, given: {"block": 2 * given["block"]} if bucket == "few" else None):
        assert _tuned.launch_parameters("planted", "few", default, CPU) == {"block": 8}
        assert _tuned.launch_parameters("planted", "many", default, CPU) == default
    assert _tuned.launch_parameters("planted", "few", default, CPU) == default
    with pytest.raises(ValueError, match="'blok'"), _tuned.trying(lambda *given: {"blok": 8}):
        _tuned.launch_parameters("planted", "few", default, CPU)


@pytest.mark.parametrize("card", _tuned.CARDS)
def test_every_card_has_a_table(card):
    assert isinstance(json.loads((_tuned.FOLDER / f"{card}.json").read_text(encoding="utf-8")), dict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a card says")
def test_without_a_card_there_is_one_clear_line(capsys):
    def build(args):
        raise AssertionError("nothing may be built")

    assert main(build, "About.", ["--tune"], ops=["residual_norm"]) == 2
    assert capsys.readouterr().err == (
        "--tune needs a CUDA device: it times the kernels on the card; this machine has none\n"
    )
