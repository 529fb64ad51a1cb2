"""One's own tables from files to predictions: trained, evaluated, moved, resumed, mixed."""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.data_roots import box, picture, write
from tests.small_runs import log_of, rows, run, with_data
from unit_fast.commands import main as cli
from unit_fast.config import RunConfig, default_tasks, load_config
from unit_fast.errors import UserError
from unit_fast.evaluation.labels import read_labels
from unit_fast.model import UniT
from unit_fast.recipes import recipe
from unit_fast.tasks import ANSWER, CLASSIFY, ENTAIL, get_task
from unit_fast.weights import checkpoint
from unit_fast.weights.loading import load_matching

SMALL = {
    "short_side": 48, "max_side": 64, "train_short_sides": (40, 48), "crop_short_sides": (48, 56), "crop_min": 32,
    "crop_max": 48, "engine": "torchvision",
}  # fmt: skip


def small(name: str, root, **changes) -> RunConfig:
    """A recipe in two updates of two samples, with small images."""
    changes = {"steps": 2, "batch_per_process": 2, "eval_every": 0, "save_every": 0, "threads": 1, **changes}
    return with_data(dataclasses.replace(recipe(name), **changes), root=str(root), **SMALL)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with one of everything, and without a vocabulary."""
    root = tmp_path_factory.mktemp("mixed")
    images = []
    for i in range(20):
        picture(root / f"images/{i}.jpg", 60, 40, i)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40})
    boxes = [box(i, i + 1, (5, 900)[i % 2], [5, 5, 20, 20]) for i in range(20)]
    categories = [{"id": 5, "name": "cup"}, {"id": 900, "name": "plate"}]
    write(root / "detect/train.json", {"images": images, "annotations": boxes, "categories": categories})
    shutil.copytree(root / "images", root / "detect/images")
    lines = [f"{i}.jpg,is it number {i % 3}?,{('one', 'two', 'Three')[i % 3]}\n" for i in range(20)]
    write(root / "answer/train.csv", "image,question,answer\n" + "".join(lines))
    write(root / "entail/train.csv", "image,text,label\n" + "".join(f"{i}.jpg,a text,{i % 2}\n" for i in range(20)))
    texts = [{"text": f"film {i}", "mood": ("bad", "good")[i % 2]} for i in range(40)]
    write(root / "classify/train.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    return root


@pytest.fixture(scope="module")
def mixed(root, tmp_path_factory):
    """A run on all but the statements."""
    out = tmp_path_factory.mktemp("runs") / "mixed"
    ratios = {"detect": 0.4, "answer": 0.4, "classify": 0.2}
    config = small("mix", root, ratios=ratios, steps=6, log_every=1)
    config = with_data(config, columns={"classify.label": "mood"})
    assert run(config, out).exit_code == 0
    return out


def call(capsys, *arguments) -> str:
    code = cli.main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def test_a_mix_is_one_model_with_names_in_its_folder(mixed, root):
    config = load_config(mixed / "config.json")
    tasks = config.model.tasks
    assert {name: task.outputs for name, task in tasks.items()} == {"detect": 3, "answer": 4, "classify": 2}
    assert tasks["answer"].classes == ("<unk>", "Three", "one", "two")
    labels = read_labels(mixed)
    assert labels["classify"].classes == {0: "bad", 1: "good"}
    assert labels["answer"].answers == ["<unk>", "Three", "one", "two"]
    assert labels["detect"].category_ids == {0: 5, 1: 900}
    pieces = (mixed / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert {"film", "number", "[PAD]"} < set(pieces)
    assert config.model.text.vocab_size == len(pieces)
    assert {row["task"] for row in rows(mixed)} <= {"detect", "answer", "classify"}
    assert len({row["task"] for row in rows(mixed)}) > 1
    for line in (
        "entail: has no share in ratios and is left out",
        "classify: columns: text is text, label is mood",
        "classify: no validation table: ",
        "vocabulary: there is no bert/vocab.txt",
        "answer: 3 answers: Three, one, two",
    ):
        assert log_of(mixed).count(line) == 1, line
    assert {row["task"] for row in rows(mixed, "eval")} == {"detect", "answer", "classify"}
    assert not list(root.rglob("vocab.txt"))


def test_a_moved_run_evaluates_and_predicts_by_name(mixed, root, tmp_path, capsys):
    moved = shutil.copytree(mixed, tmp_path / "moved", symlinks=True)
    config = json.loads((moved / "config.json").read_text())
    assert config["data"]["vocab"] == str(mixed.resolve() / "vocab.txt")
    hidden = mixed.rename(mixed.with_name("hidden"))
    try:
        found = json.loads(call(capsys, "evaluate", moved, "--json", "--tasks", "answer,classify"))["metrics"]
        assert 0 <= found["answer"]["vqa_accuracy"] <= 1
        assert found["classify"]["count"] > 0
        said = call(capsys, "predict", moved, "--task", "classify", "--text", "a film")
        assert sorted(line.split()[0] for line in said.splitlines()) == ["bad", "good"]
        image = root / "images/0.jpg"
        said = call(capsys, "predict", moved, "--task", "answer", "--image", image, "--text", "is it number 1?")
        assert {line.split()[0] for line in said.splitlines()} == {"Three", "one", "two"}
        lines = (moved / "predictions/classify_val.jsonl").read_text().splitlines()
        assert {json.loads(line)["truth"] for line in lines} <= {"bad", "good"}
    finally:
        hidden.rename(mixed)


def test_a_run_on_other_classes_is_not_gone_on_with(mixed, root, tmp_path):
    other = shutil.copytree(root, tmp_path / "other")
    out = shutil.copytree(mixed, tmp_path / "run", symlinks=True)
    table = other / "classify/train.jsonl"
    config = with_data(load_config(out / "config.json"), root=str(other))
    anew = small("mix", other, ratios=config.ratios, steps=7, log_every=1)
    anew = with_data(anew, columns=config.data.columns)
    write(table, table.read_text() + json.dumps({"text": "so so", "mood": "fair"}) + "\n")
    with pytest.raises(UserError, match=r"the checkpoint has another config: .*classify"):
        run(anew, out, "auto")
    with pytest.raises(UserError, match=r"train.jsonl:41: label 'fair' is none of the 2 classes"):
        run(dataclasses.replace(config, steps=7), out, "auto")
    write(table, "".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert run(anew, out, "auto").exit_code == 0
    assert checkpoint.load_state(out / "checkpoints/last")["step"] == 7


def test_a_run_starts_from_another_with_its_vocabulary(mixed, root, tmp_path):
    out = tmp_path / "entail"
    run(small("entail", root, init_from=str(mixed), eval_every=-1), out)
    assert (out / "vocab.txt").read_bytes() == (mixed / "vocab.txt").read_bytes()
    assert f"word pieces of {mixed}" in log_of(out)
    assert read_labels(out)["entail"].classes == {0: "0", 1: "1"}
    empty = small("mix", tmp_path, ratios={"answer": 1.0, "classify": 1.0})
    with pytest.raises(UserError, match=r"answer: no table .*--ratios.answer 0"):
        run(empty, tmp_path / "none")


def test_pairs_are_predicted_as_pairs(tmp_path, capsys):
    text = "".join(f"a {i},b {i},{'same' if i % 2 else 'other'}\n" for i in range(20))
    write(tmp_path / "data/pairs.csv", f"premise,hypothesis,label\n{text}")
    out = tmp_path / "run"
    run(small("classify", tmp_path / "data"), out)
    assert read_labels(out)["classify"].texts == 2
    said = call(capsys, "predict", out, "--task", "classify", "--text", "a 1", "--text", "b 1")
    assert {line.split()[0] for line in said.splitlines()} == {"same", "other"}
    assert cli.main(["predict", str(out), "--task", "classify", "--text", "a 1"]) == 2
    assert "classify needs two texts, found 1 text" in capsys.readouterr().err


def test_a_dry_run_and_a_check_need_no_options(root, tmp_path, capsys):
    write(tmp_path / "reviews.tsv", "text\tlabel\n" + "".join(f"t {i}\t{i % 2}\n" for i in range(30)))
    said = call(capsys, "train", "--recipe", "classify", "--data-root", tmp_path, "--threads", "1", "--dry-run")
    assert "classify: 2 classes: 0, 1" in said
    assert '"vocab_size": 0' not in said
    said = call(capsys, "data", "check", tmp_path)
    assert "classify train ok" in said
    assert "coco" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reviews.tsv"]


def test_own_tasks_start_from_the_published_ones_they_are_like(root):
    def model(**tasks) -> UniT:
        made = small("answer", root).model
        text = dataclasses.replace(made.text, vocab_size=40)
        return UniT(dataclasses.replace(made, text=text, tasks=tasks))

    published = model(**default_tasks("vqa2", "snli_ve", "sst2", queries=4))
    state = {name: value.clone() for name, value in published.state_dict().items()}
    own = model(**default_tasks("answer", "entail", "classify", queries=4, outputs=7))
    report = load_matching(own, state)
    assert {line.split(":")[0] for line in report.left} == {"answer", "entail", "classify"}
    for task in (ANSWER, ENTAIL, CLASSIFY):
        assert torch.equal(own.query_embeds[task.name].weight, state[f"query_embeds.{task.like}.weight"])
        assert torch.equal(own.classifiers[task.name].dense.weight, state[f"classifiers.{task.like}.dense.weight"])
        table, row = own.text_encoder.task_embedding.weight, get_task(task.like).index
        assert torch.equal(table[task.index], state["text_encoder.task_embedding.weight"][row])
