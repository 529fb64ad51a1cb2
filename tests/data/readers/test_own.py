"""One's own tables: columns by their names, classes and answers in order, images found, wrong files refused."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data_roots import VOCABULARY, data, picture, task_config, write
from unit_fast.data import BadImage, MissingSplit, open_dataset
from unit_fast.data.check import check
from unit_fast.data.errors import Findings
from unit_fast.data.layout import Layout
from unit_fast.data.outputs import resolved_task
from unit_fast.data.readers.own import Answer, Classify, Entail
from unit_fast.data.readers.own_rows import unclear_tables
from unit_fast.errors import UserError

REVIEWS = "text,label\n" + "".join(f"film {i},{'good' if i % 3 else 'bad'}\n" for i in range(12))


def own_root(root, **tables):
    """Tables by name (``train_csv=...``), a vocabulary and three images."""
    write(root / "bert/vocab.txt", "\n".join(VOCABULARY) + "\n")
    for name, content in tables.items():
        write(root / name.replace("_", "."), content)
    for i in range(3):
        picture(root / f"images/{i}.jpg", 60, 40)
    return root


def opened(task, root, split="train", *, findings=None, classes=(), **changes):
    config = dataclasses.replace(task_config(task), classes=classes, outputs=len(classes))
    settings = data(root, short_side=40, max_side=100, **changes)
    return open_dataset(task, split, settings, config, augment=False, findings=findings)


def outputs(task, root, **changes):
    """(classes, what is told) of the tables."""
    found, lines = resolved_task(task, data(root, **changes), task_config(task))
    assert found.outputs == len(found.classes)
    return found.classes, "\n".join(lines)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "B"], ("B", "a", "b")),
        (["10", "9", "1"], ("1", "9", "10")),
        ([10, 9.0, 1], ("1", "9", "10")),
        ([True, False], ("false", "true")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["0.5", "-1", "1e1"], ("-1", "0.5", "1e1")),
        (["nan", "1"], ("1", "nan")),
        ([" a ", "a", "b"], ("a", "b")),
    ],
)
def test_classes_have_a_fixed_order(tmp_path, labels, classes):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    own_root(tmp_path, train_jsonl=text, val_jsonl=text)
    assert outputs("classify", tmp_path)[0] == classes
    own_root(tmp_path, train_jsonl="".join(reversed(text.splitlines(keepends=True))))
    assert outputs("classify", tmp_path)[0] == classes


@pytest.mark.parametrize(
    ("task", "header", "columns"),
    [
        ("classify", "Review,Stars", {"label": "Stars"}),
        ("classify", "Text A,Text B,CLASS", {}),
        ("classify", "premise,hypothesis,gold_label", {}),
        ("classify", "words,id,mood", {"classify.text": "words", "classify.label": "mood"}),
        ("entail", "file name,Caption,label", {}),
        ("entail", "foto,text,label", {"image": "foto"}),
        ("answer", "image,question,answers,question_id", {}),
        ("answer", "img_path,Question,label", {}),
    ],
)
def test_columns_by_their_usual_names_or_as_given(tmp_path, task, header, columns):
    names, rows = header.split(","), []
    for i in range(3):
        cells = dict.fromkeys(names, f"some {i}")
        cells |= dict.fromkeys(("foto", "file name", "image", "img_path"), f"{i}.jpg")
        cells |= dict.fromkeys(("Stars", "CLASS", "gold_label", "mood", "label", "answers"), f"x{i}")
        cells |= {"id": f"{70 + i}", "question_id": f"{70 + i}"}
        rows.append(",".join(cells[name] for name in names) + "\n")
    own_root(tmp_path, train_csv=f"{header}\n{''.join(rows)}", val_csv=f"{header}\n{''.join(rows)}")
    classes, told = outputs(task, tmp_path, columns=columns)
    assert [name for name in classes if name != "<unk>"] == ["x0", "x1", "x2"]
    assert "columns: " in told
    dataset = opened(task, tmp_path, classes=classes, columns=columns)
    sample = dataset.get(1)
    texts = 2 if "text b" in header.lower() or "premise" in header else 1
    assert sample["text"] == (("some 1", "some 1") if texts == 2 else "some 1")
    assert sample["sample_id"] == (71 if {"id", "question_id"} & set(names) else 1)
    assert bool(sample["token_type_ids"].sum()) == (texts == 2)
    if task == "answer":
        assert sample["answer_scores"].tolist() == [0, 0, 1, 0]
    else:
        assert sample["label"] == 1
    assert Layout(data(tmp_path)).find(f"{task}.train") is not None


def test_answers_are_counted_by_question_and_rare_ones_left_out(tmp_path):
    said = [["Yes"] * 9 + ["no"], ["yes", "No", "no"], "yes", "['red', 'yes']", '["Red"]', "O'Neil's", "3,000"]
    rows = [{"image": f"{i % 3}", "question": "is it?", "answer": answer} for i, answer in enumerate(said)]
    own_root(tmp_path, train_json=rows, val_json=rows)
    classes, told = outputs("answer", tmp_path)
    assert classes == ("<unk>", "3,000", "O'Neil's", "Red", "Yes", "no")
    assert "5 answers" in told
    classes, told = outputs("answer", tmp_path, answer_min_count=2)
    assert classes == ("<unk>", "Red", "Yes", "no")
    assert "2 rarer answers are left out" in told
    assert "2 training questions have no other" in told
    assert outputs("answer", tmp_path, answers_kept=2)[0] == ("<unk>", "Yes", "no")
    dataset = opened("answer", tmp_path, classes=classes)
    scores = np.array([dataset.get(i)["answer_scores"].numpy() for i in range(7)])
    # of ten annotators nine said yes: those nine and the tenth agree with at least three others
    assert scores[0] == pytest.approx([0, 0, 1.0, 0.3], abs=0.01)
    assert scores[2].tolist() == [0, 0, 1, 0]
    assert not scores[5:].any()
    assert dataset.findings.count("question whose answers are all outside the list") == 2


def test_without_a_validation_table_a_part_of_the_images_is_held_out(tmp_path):
    rows = "".join(f"{i // 2 % 3}.jpg,text {i},{'a' if i % 2 else 'b'}\n" for i in range(30))
    own_root(tmp_path, reviews_csv=f"image,caption,label\n{rows}")
    classes, told = outputs("entail", tmp_path)
    assert "no validation table: 10 of 30 rows" in told
    train, val = (opened("entail", tmp_path, split, classes=classes) for split in ("train", "val"))
    assert len(train) == 20
    assert len(val) == 10
    assert not set(train.images) & set(val.images)
    assert {train.sample_id(i) for i in range(20)} | {val.sample_id(i) for i in range(10)} == set(range(30))
    with pytest.raises(MissingSplit, match="test.csv"):
        opened("entail", tmp_path, "test", classes=classes)


def test_images_are_found_beside_the_table_in_a_folder_by_stem_and_by_number(tmp_path):
    names = ["sub/a.jpg", "images/1.jpg", "2", "0.jpg", "9"]
    rows = "".join(f"{name},t,{i % 2}\n" for i, name in enumerate(names))
    root = own_root(tmp_path, entail_train_csv="")
    write(root / "entail/train.csv", f"image,text,label\n{rows}")
    write(root / "entail/test.csv", f"image,text\n{names[0]},t\n")
    picture(root / "entail/sub/a.jpg", 30, 20)
    picture(root / "images/COCO_train2014_000000000009.jpg", 30, 20)
    dataset = opened("entail", root, classes=("0", "1"))
    val = opened("entail", root, "val", classes=("0", "1"))
    found = {d.images[i]: d.image_path(i) for d in (dataset, val) for i in range(len(d))}
    assert [str(found[name].relative_to(root)) for name in names] == [
        "entail/sub/a.jpg", "images/1.jpg", "images/2.jpg", "images/0.jpg",
        "images/COCO_train2014_000000000009.jpg",
    ]  # fmt: skip
    test = opened("entail", root, "test", classes=("0", "1"))
    assert "label" not in test.get(0)
    assert test.rows.values["labelled"] is False


@pytest.mark.parametrize(
    ("task", "table", "message"),
    [
        ("classify", "words,label\na,b\n", r"no column for the text .*found words, label; nearest|known: words"),
        ("classify", "text,lable\na,b\n", r"train.csv: no column for the label .*; nearest: lable"),
        ("classify", "text,label\nx,a\ny,\n", r"train.csv:3: the label \(label\) is empty"),
        ("classify", "text,label\nx,a\n,b\n", r"train.csv:3: the text \(text\) is empty"),
        ("classify", "text,label\nx,a\ny,a\n", r"train.csv: only the label 'a'; there must be two classes"),
        ("classify", "text,label\n", r"only|is empty|no row"),
        ("classify", "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(99)), r"different labels .*label=COLUMN"),
        ("classify", "text,label\nx,a,c\ny,b\n", r"train.csv:2: 3 cells, the first line names 2 columns"),
        ("entail", "image,text,label\n0.jpg,x,a\n,y,b\n", r"train.csv:3: the image \(image\) is empty"),
        ("entail", "image,text,label\n0.jpg,x,a\n7.jpg,y,b\n", r"1 of 2 images are missing, the first is '7.jpg'"),
        ("entail", "image,text,label\n0.jpg,x,a\n../x.jpg,y,b\n", r"'../x.jpg' \(file name .* leaves its folder"),
        ("answer", "image,question,answer\n0.jpg,x,a\n1.jpg,y,[]\n", r"train.csv:3: the answer \(answer\) is empty"),
        ("answer", "image,question,answer\n0.jpg,x,a\n1.jpg,y,a\n", r"1 answers are given to at least 1 questions"),
    ],
)
def test_wrong_tables_are_refused_in_one_line(tmp_path, task, table, message):
    own_root(tmp_path, train_csv=table, val_csv=table)
    with pytest.raises(UserError, match=message) as info:
        opened(task, tmp_path, classes=outputs(task, tmp_path)[0])
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("task", "rows", "kind"),
    [
        ("classify", [{"text": ["a"], "label": "x"}], "the text must be a text or a number, found list"),
        ("classify", [{"text": "a", "label": ["x", "y"]}], "the label must be a text or a number, found list"),
        ("classify", [{"text": "a", "label": "x"}, 3], "must be an object with keys, found int"),
    ],
)
def test_wrong_values_are_refused_with_their_row(tmp_path, task, rows, kind):
    own_root(tmp_path, train_json=[{"text": "p", "label": "x"}, {"text": "q", "label": "y"}, *rows], val_csv=REVIEWS)
    with pytest.raises(UserError, match=rf"train.json: row \d: .*{kind}|train.json: row \d: {kind}"):
        opened(task, tmp_path, classes=outputs(task, tmp_path)[0])


def test_wrong_settings_and_unclear_files_say_what_to_give(tmp_path):
    root = own_root(tmp_path, a_csv=REVIEWS, b_csv=REVIEWS)
    with pytest.raises(UserError, match=r"which of a.csv, b.csv is the training table\?.*classify.train=a.csv"):
        outputs("classify", root)
    classes, _ = outputs("classify", root, paths={"classify.train": "a.csv", "classify.val": "b.csv"})
    assert classes == ("bad", "good")
    with pytest.raises(UserError, match="data.columns: unknown key 'txt'; nearest: text"):
        outputs("classify", root, paths={"classify.train": "a.csv"}, columns={"txt": "text"})
    with pytest.raises(UserError, match="a.csv: data.columns: label is 'lable', no column; nearest: label"):
        outputs("classify", root, paths={"classify.train": "a.csv"}, columns={"label": "lable"})
    (root / "a.csv").unlink()
    (root / "b.csv").unlink()
    with pytest.raises(MissingSplit, match=r"classify: no table in .*give train.csv and val.csv"):
        outputs("classify", root)


def test_a_run_keeps_its_classes_whatever_a_table_has(tmp_path):
    root = own_root(tmp_path, train_csv=REVIEWS, val_csv="text,label\nx,good\ny,terrible\n")
    classes, told = outputs("classify", root)
    assert classes == ("bad", "good", "terrible")
    assert "1 of the classes are in no training row (terrible; 1 validation rows)" in told
    one = opened("classify", root, "val", classes=("bad", "good", "terrible"))
    assert [one.get(i)["label"] for i in range(2)] == [1, 2]
    assert one.class_names == {0: "bad", 1: "good", 2: "terrible"}
    with pytest.raises(UserError, match=r"val.csv:3: label 'terrible' is none of the 2 classes; nearest|known: bad"):
        opened("classify", root, "val", classes=("bad", "good"))
    with pytest.raises(UserError, match=r"outputs: is 7, but the tables have 3; give 0"):
        resolved_task("classify", data(root), dataclasses.replace(task_config("classify"), outputs=7))


def test_digests_know_other_classes_and_other_rows(tmp_path):
    root = own_root(tmp_path, train_csv=REVIEWS, val_csv=REVIEWS)
    before = opened("classify", root, classes=("bad", "good")).digest()
    assert opened("classify", root, classes=("bad", "good")).digest() == before
    assert opened("classify", root, classes=("good", "bad")).digest()["meaning"] != before["meaning"]
    write(root / "train.csv", REVIEWS.replace("film 3", "film three"))
    assert opened("classify", root, classes=("bad", "good")).digest()["rows"] != before["rows"]


def test_the_cache_gives_what_the_file_gives(tmp_path):
    rows = "".join(f"image {i} {'long ' * 20},{i % 3}.jpg,x{i % 4}\n" for i in range(9000))
    root = own_root(tmp_path / "root", train_csv=f"text,image,label\n{rows}")
    classes = tuple(f"x{i}" for i in range(4))
    (tmp_path / "cache").mkdir()
    first, again, plain = (
        opened("entail", root, classes=classes, cache_dir=folder)
        for folder in (str(tmp_path / "cache"), str(tmp_path / "cache"), "")
    )
    assert again.rows.name is not None
    assert first.digest() == again.digest() == plain.digest()
    assert first.facts == again.facts == plain.facts
    assert [again.get(i)["label"] for i in (0, 5)] == [plain.get(i)["label"] for i in (0, 5)]


@pytest.mark.parametrize(
    ("table", "task"),
    [
        ("image,question,answer\n0.jpg,x,a\n", Answer),
        ("image,text,label\n0.jpg,x,a\n", Entail),
        ("image,question,label\n0.jpg,x,a\n", Entail),
        ("text,label\nx,a\n", Classify),
        ("a,b\nx,a\n", None),
    ],
)
def test_what_a_table_is_for_is_seen_by_its_columns(tmp_path, table, task):
    root = own_root(tmp_path, train_csv=table)
    found = [reader for reader in (Answer, Entail, Classify) if reader.present(Layout(data(root)))]
    assert found == ([task] if task else [])
    told = str(check(root))
    assert ("a, b are not called as those of a task" in told) == (task is None)
    assert len(unclear_tables(Layout(data(root)))) == (task is None)
    given = Layout(data(root, columns={"classify.text": "a", "classify.label": "b"}))
    assert Classify.present(given)


def test_a_check_names_every_wrong_row_and_needs_no_vocabulary(tmp_path):
    table = "image,text,label\n0.jpg,x,a\n1.jpg,,b\n1.jpg,y,\n8.jpg,y,b\n../a.jpg,y,b\n"
    root = own_root(tmp_path, train_csv=table, val_csv="image,text,label\n0.jpg,x,a\n")
    (root / "bert/vocab.txt").unlink()
    findings = Findings(strict=False)
    dataset = opened("entail", root, classes=("a", "b"), findings=findings)
    paths = [path for path, _ in dataset.image_paths()]
    assert findings.count("malformed row") == 2
    assert findings.count("file name outside the data root") == 1
    assert [path.name for path in paths if not path.exists()] == ["8.jpg"]
    with pytest.raises(BadImage, match="leaves its folder"):
        dataset.image_path(list(dataset.images).index("../a.jpg"))
