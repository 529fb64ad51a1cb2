"""Evaluations that cannot be what was asked for: memory, numbers that are not finite, images, arguments, disks."""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.evaluation.common import Oracle, coco_images, save_run
from tests.small_runs import make_world, small_config
from unit_fast.commands import main as cli
from unit_fast.data.bad_images import BadImages
from unit_fast.errors import OutOfMemory, UserError, is_out_of_memory
from unit_fast.evaluation.evaluate import describe, evaluate
from unit_fast.evaluation.labels import VOCABULARY, write_labels
from unit_fast.model import UniT
from unit_fast.run.train import train
from unit_fast.tasks import get_task
from unit_fast.weights import checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run folder with one checkpoint of an untrained model."""
    folder, config = tmp_path_factory.mktemp("run"), small_config(world, "sst2", "coco", "vqa2")
    torch.manual_seed(0)
    save_run(folder, UniT(config.model).state_dict(), config)
    write_labels(folder, config, {})
    shutil.copy(world / "bert" / "vocab.txt", folder / VOCABULARY)
    return folder


def broken(monkeypatch, make):
    """Let every forward pass in evaluation mode raise ``make()``."""
    real = UniT.forward

    def forward(self, batch):
        if not self.training:
            raise make()
        return real(self, batch)

    monkeypatch.setattr(UniT, "forward", forward)


# -------------------------------------------------------------------------------------------------------- memory

MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("make", MEMORY)
def test_out_of_memory_keeps_its_exit_code(world, run, make, monkeypatch, capsys, tmp_path):
    broken(monkeypatch, make)
    config = small_config(world, "sst2", eval_every=0, steps=1)
    with pytest.raises(OutOfMemory, match=r"evaluation of sst2 on val: out of memory, batch 1 \(.*eval-batch") as info:
        evaluate(UniT(config.model), config)
    assert info.value.exit_code == 5
    assert cli.main(["evaluate", str(run), "--tasks", "sst2"]) == 5
    assert "unit-fast: evaluation of sst2 on val: out of memory" in capsys.readouterr().err
    with pytest.raises(OutOfMemory):  # the last evaluation of a run
        train(config, tmp_path / "run", progress="none")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("out_of_memory", 5)
    assert (tmp_path / "run" / "checkpoints" / "last").exists(), "training's work is saved"


def test_other_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("can't allocate memory of this size"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))


# ---------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("task", ["coco", "vqa2", "sst2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(world, task, value, caplog, tmp_path):
    config = small_config(world, "sst2", "coco", "vqa2")
    model = UniT(config.model)
    heads = tuple(f"{kind}.{get_task(task).name}." for kind in ("class_embeds", "classifiers"))
    name, weight = next((n, p) for n, p in model.named_parameters() if n.startswith(heads) and p.dim() == 2)
    with torch.no_grad():
        weight[0, 0] = value
    what = rf"evaluation of {task} on val: the model's output is not finite for sample .*1 of \d+ weight .*{name}"
    with pytest.raises(UserError, match=what):
        evaluate(model, config, tasks=[task], out=tmp_path)
    assert f"first: {name}): figures of such a model say little" in caplog.text
    assert not list(tmp_path.iterdir()), "nothing is written of it"


def test_outputs_that_are_not_finite_are_an_error_with_fine_weights(world):
    config = dataclasses.replace(small_config(world, "vqa2"), eval_batch=4)
    oracle = Oracle(config.model)
    real = oracle.forward

    def forward(batch):
        output = real(batch)
        output.scores[-2:, 3] = float("inf")
        return output

    oracle.forward = forward
    with pytest.raises(UserError, match=r"output is not finite for sample .* and 1 more of its batch; all weights are"):
        evaluate(oracle, config)


def test_a_loss_that_is_not_finite_is_an_error(world):
    config = small_config(world, "sst2")
    oracle = Oracle(config.model)
    oracle.losses = lambda *arguments, **named: {"val/glue_sst2/loss": torch.tensor(float("nan"))}
    with pytest.raises(UserError, match="the model's loss is not finite for sample"):
        evaluate(oracle, config)


def test_the_command_prints_json_of_an_error_too(run, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    folder = (copy / "checkpoints" / "last").resolve()
    weights = checkpoint.load_weights(folder / checkpoint.WEIGHTS)
    config = checkpoint.config_of(folder)
    spoilt = {n: x.fill_(float("nan")) if x.is_floating_point() else x for n, x in weights.items()}
    save_run(copy, spoilt, config, step=2)
    commands = (
        ["evaluate", str(copy), "--tasks", "sst2"],
        ["predict", str(copy), "--task", "sst2", "--text", "good"],
    )
    for command in commands:
        assert cli.main([*command, "--json"]) == 2
        said = capsys.readouterr()
        assert "output is not finite" in json.loads(said.out)["error"]
        assert "output is not finite" in said.err
        assert cli.main(command) == 2
        assert capsys.readouterr().out == ""
    assert not (copy / "evaluation.json").exists()


# -------------------------------------------------------------------------------------------------------- images


def coco_config(world, root, share: float):
    config = small_config(world, "coco", data={"max_bad_share": share})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))


def test_as_many_images_may_be_bad_as_in_training(world, tmp_path):
    root = coco_images(tmp_path, [(40, 32)] * 12)
    config = coco_config(world, root, 0.01)
    allowed = int(BadImages(0.01, read=12).tolerated())
    assert 1 < allowed < 11
    for i in range(allowed):
        (root / f"coco/images/val2017/{i:012d}.jpg").write_bytes(b"not an image")
    results = evaluate(Oracle(config.model), config)["coco"]
    assert results["unreadable"] == allowed
    assert results["count"] == 12
    assert f"{allowed} unreadable images" in describe(get_task("coco"), results)
    (root / f"coco/images/val2017/{allowed:012d}.jpg").unlink()
    with pytest.raises(UserError, match=rf"{allowed + 1} of 12 images could not be read, more than the share of 0.01"):
        evaluate(Oracle(config.model), config)


def test_an_evaluation_stops_when_too_many_are_certainly_bad(world, tmp_path):
    root = coco_images(tmp_path, [(40, 32)] * 12)
    shutil.rmtree(root / "coco/images/val2017")
    (root / "coco/images/val2017").mkdir()
    config = coco_config(world, root, 0.0)
    oracle = Oracle(config.model)
    with pytest.raises(UserError, match=r"1 of 12 images could not be read.*000000000000.jpg: no such file"):
        evaluate(oracle, config)
    config = coco_config(world, root, 0.9)
    with pytest.raises(UserError, match=r"none of 12 samples could be read \(first: .*000000000000.jpg"):
        evaluate(oracle, config)
    assert not oracle.seen


def test_an_image_of_several_questions_is_bad_once(world, caplog):
    config = small_config(world, "vqa2", data={"max_bad_share": 0.0025})
    config = dataclasses.replace(config, eval_limit=0)
    kept = {}
    whole = evaluate(Oracle(config.model), config, datasets=kept)["vqa2"]
    dataset = kept["vqa2", "val"]
    paths = [str(dataset.image_path(i)) for i in range(len(dataset))]
    bad = max(set(paths), key=paths.count)
    assert paths.count(bad) > 1

    real = dataset.image_path
    dataset.image_path = lambda i: real(i).with_name("gone.jpg") if str(real(i)) == bad else real(i)
    results = evaluate(Oracle(config.model), config, datasets=kept)["vqa2"]
    assert results["unreadable"] == 1
    assert results["count"] == whole["count"] - paths.count(bad)
    assert caplog.text.count("no such file") == 1


# ----------------------------------------------------------------------------------------- arguments, order, disk


@pytest.mark.parametrize(
    ("named", "message"),
    [({"limit": -1}, "limit is -1"), ({"tasks": []}, "tasks: none given to evaluate; known: sst2")],
)
def test_arguments_that_ask_for_nothing_are_refused(world, named, message):
    config = small_config(world, "sst2")
    with pytest.raises(UserError, match=message):
        evaluate(Oracle(config.model), config, **named)


def test_a_command_without_data_is_an_error_also_as_json(run, world, capsys, tmp_path):
    assert cli.main(["evaluate", str(run), "--tasks", "sst2", "--split", "test", "--json"]) == 2
    said = capsys.readouterr()
    assert "no task has data for split 'test'" in json.loads(said.out)["error"]


def test_names_of_another_run_are_refused_before_anything_is_evaluated(run, capsys, monkeypatch, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copy / VOCABULARY).write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nother\n")
    monkeypatch.setattr("unit_fast.evaluation.evaluate.TaskRun", None)
    assert cli.main(["evaluate", str(copy), "--tasks", "sst2"]) == 2
    assert "sst2: the vocabulary is not that of the run" in capsys.readouterr().err


def test_a_task_named_twice_is_evaluated_once(world):
    config = small_config(world, "sst2")
    oracle = Oracle(config.model)
    evaluate(oracle, config, tasks=["sst2", "glue_sst2"])
    assert sum(oracle.seen) == evaluate(Oracle(config.model), config)["sst2"]["count"]


def test_prediction_files_are_in_the_order_of_the_data_set(world, tmp_path):
    names = ("coco", "vqa2", "snli_ve", "sst2")
    config, kept = small_config(world, *names), {}
    files = {"coco": "coco_val.json", "vqa2": "vqa2_val.json", "snli_ve": "snli_ve_val.jsonl", "sst2": "sst2_val.jsonl"}
    for size in (1, 5):
        out = tmp_path / str(size)
        evaluate(Oracle(config.model), dataclasses.replace(config, eval_batch=size), out=out, datasets=kept)
        for name in names:
            dataset, text = kept[get_task(name).name, "val"], (out / "predictions" / files[name]).read_text()
            rows = map(json.loads, text.splitlines()) if files[name].endswith("l") else json.loads(text)
            ids = [next(row[k] for k in ("image_id", "question_id", "id") if k in row) for row in rows]
            assert list(dict.fromkeys(map(str, ids))) == [str(dataset.sample_id(i)) for i in range(len(dataset))]


def test_a_disk_that_refuses_is_told_with_the_file(world, tmp_path):
    (tmp_path / "predictions").write_text("in the way")
    config = small_config(world, "sst2")
    with pytest.raises(UserError, match=r"evaluation of sst2 on val: .*sst2_val.jsonl: cannot be written \("):
        evaluate(Oracle(config.model), config, out=tmp_path)


def test_a_ground_truth_without_any_object_is_said(world, tmp_path, caplog):
    config = coco_config(world, coco_images(tmp_path, [(40, 32)] * 2), 0.0)
    results = evaluate(Oracle(config.model), config)["coco"]
    assert results["count"] == 2
    assert "detection_mean_ap" not in results
    assert "coco: no object in the 2 images: their average precision is undefined" in caplog.text
    assert describe(get_task("coco"), results).startswith("no detection_mean_ap: nothing to find")
