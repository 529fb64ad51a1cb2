"""A run goes on only with the data it was begun with: what changes meaning is refused, other rows are told."""

import json
import shutil

import numpy as np
import pytest

from tests.small_runs import accept, log_of, make_world, small_config
from unit_fast.data import open_dataset
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError
from unit_fast.evaluation.labels import check_labels
from unit_fast.run.train import train
from unit_fast.weights import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("coco", "vg", "vqa2", "sst2")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(world, run stopped after two of four updates)."""
    folder = tmp_path_factory.mktemp("digests")
    config = small_config(make_world(folder / "world"), *TASKS, steps=4)
    train(config, folder / "run", progress="none", stop_at=2)
    return folder / "world", folder / "run"


def resumed(begun, tmp_path, change):
    """The log of the run resumed on a changed copy of its world."""
    world, run = begun
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    change(tmp_path / "world")
    before = len(log_of(tmp_path / "run"))
    train(small_config(tmp_path / "world", *TASKS, steps=4), tmp_path / "run", "auto", progress="none")
    return log_of(tmp_path / "run")[before:]


def lines(path, change):
    def act(world):
        found = (world / path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        (world / path).unlink()
        (world / path).write_text("\n".join(change(found)) + "\n", encoding="utf-8")

    return act


def content(path, change):
    def act(world):
        found = json.loads((world / path).read_text(encoding="utf-8"))
        found = change(found) or found
        (world / path).unlink()
        (world / path).write_text(json.dumps(found), encoding="utf-8")

    return act


def swapped(found, i=50):
    found[i], found[i + 1] = found[i + 1], found[i]
    return found


def rename(found):
    found["categories"][0]["name"], found["categories"][1]["name"] = (c["name"] for c in found["categories"][1::-1])


def move(found):
    ids = sorted(c["id"] for c in found["categories"])
    moved = dict(zip(ids, ids[1:] + ids[:1]))
    for annotation in found["annotations"]:
        annotation["category_id"] = moved[annotation["category_id"]]


SST, COCO = "glue/SST-2/train.tsv", "coco/annotations/instances_train2017.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lines("bert/vocab.txt", swapped), "vqa2: the vocabulary changed since the checkpoint"),
        (content("vqa2/trainval_label2ans.json", lambda a: [a[0], *a[:0:-1]]), "vqa2: the answers changed"),
        (content(COCO, rename), "coco: the categories changed"),
    ],
    ids=["vocabulary", "answers", "categories"],
)
def test_another_meaning_is_refused(begun, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        resumed(begun, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "task"),
    [
        (lines(SST, lambda rows: [rows[0], *rows[:0:-1]]), "sst2"),
        (lines(SST, lambda rows: rows[:-5]), "sst2"),
        (lines(SST, lambda rows: [rows[0], *(row[:-1] + "10"[int(row[-1])] for row in rows[1:])]), "sst2"),
        (content(COCO, move), "coco"),
        (
            content(COCO, lambda d: d["annotations"][0]["bbox"].__setitem__(0, d["annotations"][0]["bbox"][0] + 1)),
            "coco",
        ),
    ],
    ids=["reordered", "dropped", "labels", "classes", "a box"],
)
def test_other_rows_are_told(begun, tmp_path, change, task):
    log = resumed(begun, tmp_path, change)
    assert log.count("annotations changed since the checkpoint") == 1
    assert f"{task}: the annotations changed since the checkpoint (" in log


def test_the_same_data_elsewhere_is_the_same(begun, tmp_path):
    log = resumed(begun, tmp_path, lambda world: None)
    assert "annotations changed" not in log
    assert "does not say" not in log


def test_a_checkpoint_without_digests_goes_on_and_says_so(begun, tmp_path):
    def forget(_):
        path = (tmp_path / "run/checkpoints/last").resolve() / checkpoint.STATE_JSON
        state = json.loads(path.read_text())
        del state["data"]
        path.write_text(json.dumps(state))
        accept(path.parent)

    log = resumed(begun, tmp_path, forget)
    assert log.count("the checkpoint does not say what its data were") == 1


def test_digests_see_names_types_and_order():
    def digest(**arrays):
        return Content(arrays).digest()

    a = np.arange(6, dtype=np.int32)
    assert digest(a=a) == digest(a=a.copy())
    others = [digest(b=a), digest(a=a.astype(np.int64)), digest(a=a.reshape(2, 3)), digest(a=a[::-1]), digest(a=a, b=a)]
    assert len({digest(a=a), *others}) == 6
    assert digest(x=a[::2]) == digest(x=a[::2].copy())
    assert digest(x=np.zeros((0, 4))) != digest(x=np.zeros((0, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lines("bert/vocab.txt", swapped), "vqa2: the vocabulary is not that of the run"),
        (content("vqa2/trainval_label2ans.json", lambda a: [a[0], *a[:0:-1]]), "vqa2: the answers are not those of"),
        (content(COCO, rename), None),
        (lambda world: None, ""),
    ],
    ids=["vocabulary", "answers", "classes", "nothing"],
)
def test_names_are_compared_with_those_of_a_run(begun, tmp_path, change, message):
    world, run = begun
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    change(tmp_path / "world")
    config = small_config(tmp_path / "world", "coco", "vqa2")
    opened = [
        open_dataset(name, "train", config.data, task, augment=False) for name, task in config.model.tasks.items()
    ]
    if message:
        with pytest.raises(UserError, match=message):
            check_labels(run, opened)
    elif message is None:
        (line,) = check_labels(run, opened)
        assert line.startswith("coco: 2 classes have other names than in the run (first: ")
    else:
        assert check_labels(run, opened) == []
