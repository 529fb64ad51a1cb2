"""A rehearsal refuses what the run refuses, in the same words, and leaves nothing behind."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch

from tests.small_runs import run, small_config
from unit_fast.commands import main as cli
from unit_fast.config import to_json
from unit_fast.errors import UserError
from unit_fast.run.folder import RunFolder
from unit_fast.run.rehearsal import LEAST, mean_seconds, rehearsal, seconds_per_update

pytestmark = pytest.mark.usefixtures("one_thread")


def config(root, **changes):
    return small_config(root, "sst2", "coco", **({"steps": 4, "eval_every": 0, "eval_limit": 2} | changes))


@pytest.fixture
def world(root, tmp_path):
    shutil.copytree(root, tmp_path / "world")
    return tmp_path / "world"


def files(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_training_table(world, out):
    (world / "glue" / "SST-2" / "train.tsv").unlink()
    return config(world), {}


def an_annotation_file_that_is_not_json(world, out):
    (world / "coco" / "annotations" / "instances_train2017.json").write_text("{")
    return config(world), {}


def a_validation_table_without_its_column(world, out):
    (world / "glue" / "SST-2" / "dev.tsv").write_text("text\nno label\n")
    return config(world), {}


def a_larger_vocabulary(world, out):
    with (world / "bert" / "vocab.txt").open("a") as file:
        file.write("more\n")
    found = config(world)
    text = dataclasses.replace(found.model.text, vocab_size=found.model.text.vocab_size - 1)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, text=text)), {}


def required_weights_that_do_not_fit(world, out):
    return config(world, require_weights=True), {}


def initial_weights_that_are_not_there(world, out):
    return config(world, init_from="nowhere"), {}


def a_card_that_is_not_there(world, out):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    return config(world, device="cuda"), {}


def no_device(world, out):
    return config(world, device="gpu0"), {}


def a_batch_that_does_not_divide(world, out):
    return config(world, batch_per_process=3, accumulate=0, target_batch=64), {}


def a_criterion_without_a_split(world, out):
    (world / "glue" / "SST-2" / "dev.tsv").unlink()
    return config(world, eval_every=1, early_stop=1, criterion="sst2"), {}


def a_folder_with_a_run(world, out):
    run(config(world, steps=1), out)
    return config(world), {}


def a_folder_that_is_a_file(world, out):
    out.write_text("")
    return config(world), {}


def a_folder_below_a_file(world, out):
    out.parent.mkdir(exist_ok=True)
    out.write_text("")
    return config(world), {"out": out / "deeper"}


def another_seed_than_the_checkpoint(world, out):
    run(config(world), out, stop_at=1)
    return config(world, seed=99), {"resume": "auto"}


def a_checkpoint_that_is_damaged(world, out):
    run(config(world), out, stop_at=1)
    weights = next((out / "checkpoints").glob("step_*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return config(world), {"resume": "auto"}


def a_checkpoint_beyond_the_steps(world, out):
    run(config(world), out, stop_at=3)
    return config(world, steps=2), {"resume": "auto"}


def nothing_to_go_on_from(world, out):
    return config(world), {"resume": "nowhere"}


REFUSED = [
    without_training_table, an_annotation_file_that_is_not_json, a_validation_table_without_its_column,
    a_larger_vocabulary, required_weights_that_do_not_fit, initial_weights_that_are_not_there, a_card_that_is_not_there,
    no_device, a_batch_that_does_not_divide, a_criterion_without_a_split,
    a_folder_with_a_run, a_folder_that_is_a_file, a_folder_below_a_file, another_seed_than_the_checkpoint,
    a_checkpoint_that_is_damaged, a_checkpoint_beyond_the_steps, nothing_to_go_on_from,
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_it_refuses_what_the_run_refuses(world, tmp_path, make):
    out = tmp_path / "run"
    wanted, options = make(world, out)
    out = options.pop("out", out)
    before = files(tmp_path)
    with pytest.raises(UserError) as rehearsed, rehearsal(wanted, out, **options):
        pass
    assert files(tmp_path) == before, "nothing was left behind"
    with pytest.raises(UserError) as refused:
        run(wanted, out, **options)
    assert str(rehearsed.value) == str(refused.value)


def test_it_refuses_a_folder_that_another_process_writes(world, tmp_path):
    holder = RunFolder(tmp_path / "run")
    with (
        pytest.raises(UserError, match=r"run: is being written by process \d+"),
        rehearsal(config(world), tmp_path / "run"),
    ):
        pass
    holder.release()
    with rehearsal(config(world), tmp_path / "run"):
        pass


def test_it_refuses_a_tracker_that_is_not_installed(world, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else real(n, *a))
    with (
        pytest.raises(UserError, match="wandb is not installed"),
        rehearsal(config(world, track=("wandb",)), tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("resumed", [False, True])
def test_what_would_run_is_shown_and_nothing_is_written(world, tmp_path, capsys, resumed):
    out = tmp_path / "run"
    if resumed:
        run(config(world), out, stop_at=2)
    before = files(tmp_path)
    with rehearsal(config(world), out, "auto" if resumed else None) as parts:
        assert parts.state.step == (2 if resumed else 0)
        assert set(parts.datasets) == {"glue_sst2", "detection_coco"}
    assert files(tmp_path) == before
    said = capsys.readouterr().out
    assert "ratio and training samples: coco 0.50 (40), sst2 0.50 (40)" in said
    assert ("going on after step 2" in said) == resumed


def test_a_measurement_trains_on_each_task(world, tmp_path, monkeypatch):
    monkeypatch.setattr("unit_fast.run.rehearsal.MEASURED_S", 0.0)
    wanted = config(world, ratios={"glue_sst2": 0.75, "detection_coco": 0.25})
    with rehearsal(wanted, tmp_path / "run") as parts:
        found = seconds_per_update(parts)
        assert parts.state.step == 2 * LEAST
        assert all(parts.state.counts[name] == 2 * LEAST for name in found)
        mean = mean_seconds(parts, found)
    assert mean == pytest.approx(0.75 * found["glue_sst2"] + 0.25 * found["detection_coco"])
    assert min(found.values()) > 0


def test_by_command(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("unit_fast.run.rehearsal.MEASURED_S", 0.0)
    wanted = config(world, batch_per_process=0, accumulate=0, target_batch=4)
    (tmp_path / "small.json").write_text(to_json(wanted))
    before = files(tmp_path)
    command = ["train", "--config-file", str(tmp_path / "small.json"), "--out", str(tmp_path / "run"), "--dry-run"]
    assert cli.main([*command, "--measure"]) == 0
    said = capsys.readouterr().out
    shown = json.loads(said[: said.index("\n}\n") + 3])
    assert (shown["batch_per_process"], shown["accumulate"]) == (4, 1)
    assert "batch 4 x 1 accumulated = 4: the largest" in said
    assert "evaluated on     val: sst2 8, coco 8" in said
    assert "starts from      backbone random, text encoder random" in said
    assert " steps an hour, " in said
    assert files(tmp_path) == before
