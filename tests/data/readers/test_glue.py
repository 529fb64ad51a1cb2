"""The GLUE tasks: official tables, Hugging Face's exports, and what all tasks with texts need."""

import sys

import numpy as np
import pytest
import torch

from tests.data_roots import REAL_DATA, data, needs_real, opened, task_config, whole_root, write
from unit_fast.data import MissingSplit, collate, open_dataset
from unit_fast.errors import UserError


def test_glue_tables(tmp_path):
    root = whole_root(tmp_path)
    assert opened("sst2", root).get(1)["text"] == 'a "fine film'
    assert opened("sst2", root).get(1)["label"] == 1
    qnli = opened("qnli", root, "val").get(0)
    assert (qnli["text"], qnli["label"]) == (("who?", "him."), 1)
    assert qnli["token_type_ids"].sum() > 0
    assert opened("qqp", root).get(0)["label"] == 0
    for split in ("train", "val"):
        mnli = opened("mnli", root, split)
        assert len(mnli) == 1  # the row whose gold_label is - is left out
        assert mnli.findings.count("row without a label") == 1
        assert (mnli.get(0)["text"], mnli.get(0)["label"]) == (("premise", "hypothesis"), 1)
        assert mnli.sample_id(0) == 0
    with pytest.raises(MissingSplit, match="SST-2/test.tsv"):
        opened("sst2", root, "test")
    write(root / "glue/SST-2/test.tsv", "index\tsentence\n0\ta b\n")
    test = opened("sst2", root, "test")
    assert "label" not in test.get(0)
    assert collate("sst2", [test.get(0)]).label is None


def test_wrong_glue_tables(tmp_path):
    root = whole_root(tmp_path)
    path = root / "glue/SST-2/train.tsv"
    for content, message in (
        ("sentence\tx\na\t1\n", "column 'label' is missing; found sentence, x"),
        ("", "column 'sentence' is missing"),
        ("sentence\tlabel\na\tmaybe\n", "train.tsv:2: label 'maybe' is not one of negative, positive or 0..1"),
        ("sentence\tlabel\na\t2\n", "train.tsv:2: label '2'"),
        ("sentence\tlabel\na\t\n", "train.tsv:2: label ''"),
        ("sentence\tlabel\n" + "a\n" * 12, "is this the right file?"),
    ):
        write(path, content)
        with pytest.raises(UserError) as info:
            opened("sst2", root)
        assert message in str(info.value)
        assert "train.tsv" in str(info.value)
    write(path, "sentence\tlabel\n" + "a\tpositive\n" * 5 + "b\n" + "a\tb\tc\n" + "c\t0\n")
    dataset = opened("sst2", root)
    assert dataset.labels.tolist() == [1] * 5 + [0]
    assert dataset.sample_id(5) == 7
    assert dataset.findings.count("row with a wrong number of columns") == 2
    assert ":7: 1 columns, the header has 2" in dataset.findings.found["row with a wrong number of columns"].examples[0]


EXPORTS = {
    "sst2": {"sentence": ["a", "b", "c"], "label": [0, 1, -1], "idx": [0, 1, 2]},
    "qnli": {"question": ["a", "b", "c"], "sentence": ["d"] * 3, "label": [0, 1, -1]},
    "qqp": {"question1": ["a", "b", "c"], "question2": ["d"] * 3, "label": [0, 1, -1]},
    "mnli": {"premise": ["a", "b", "c"], "hypothesis": ["d"] * 3, "label": [0, 1, -1]},
}


@pytest.mark.parametrize("task", list(EXPORTS))
@pytest.mark.parametrize("form", ["parquet", "saved", "cache"])
def test_glue_exports(tmp_path, task, form):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    root = tmp_path
    write(root / "bert/vocab.txt", (whole_root(tmp_path / "whole") / "bert/vocab.txt").read_text())
    table = pa.table(EXPORTS[task])
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        folder = root / "glue" / ("mnli_mismatched" if task == "mnli" and split != "train" else task)
        folder.mkdir(parents=True, exist_ok=True)
        if form == "parquet":
            for shard in range(2):
                pq.write_table(table.slice(shard * 2, 2), folder / f"{name}-0000{shard}-of-00002.parquet")
        elif form == "saved":
            (folder / name).mkdir()
            file = str(folder / name / "data-00000-of-00001.arrow")
            with pa.OSFile(file, "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
                writer.write_table(table)
        else:
            with pa.OSFile(str(folder / f"glue-{name}.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
                writer.write_table(table)
        dataset = opened(task, root, split)
        if split == "test":
            assert len(dataset) == 3
            assert "label" not in dataset.get(0)
        else:
            assert dataset.labels.tolist() == [0, 1]
            assert dataset.findings.count("row without a label") == 1
            assert dataset.get(1)["text"] == ("b" if task == "sst2" else ("b", "d"))


def test_glue_exports_that_are_wrong(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    write(tmp_path / "bert/vocab.txt", (whole_root(tmp_path / "whole") / "bert/vocab.txt").read_text())
    path = tmp_path / "glue/sst2/train-00000-of-00001.parquet"
    write(path, b"PAR1 not really")
    with pytest.raises(UserError, match=r"parquet: cannot be read"):
        opened("sst2", tmp_path)
    write(tmp_path / "glue/qnli/train/data.arrow", b"")
    with pytest.raises(UserError, match=r"data.arrow: cannot be read"):
        opened("qnli", tmp_path)
    for columns, message in (
        ({"text": ["a"], "label": [1]}, "column 'sentence' is missing; found text, label"),
        ({"sentence": pa.array([None], pa.string()), "label": [1]}, "sentence must be text"),
        ({"sentence": ["a"], "label": [5]}, "row 1: label 5 is not one of"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(UserError, match=message):
            opened("sst2", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install unit_fast\[hf\]"):
        opened("sst2", tmp_path)


@needs_real
@pytest.mark.parametrize(
    ("task", "train", "val"), [("sst2", 1000, 872), ("qnli", 320, 700), ("qqp", 160, 160), ("mnli", 240, 5)]
)
def test_real_glue(task, train, val):
    for split, rows in (("train", train), ("val", val)):
        dataset = open_dataset(task, split, REAL_DATA, task_config(task), augment=False, vocab_size=30522)
        assert len(dataset) == rows
        assert not dataset.findings.found
        batch = collate(task, [dataset.get(i) for i in range(min(rows, 50))], pad_text_to=128)
        assert batch.input_ids.shape[1] == 128
        assert (batch.input_ids[:, 0] == 101).all()
        assert torch.equal((batch.input_ids != 0).long(), batch.attention_mask)


def test_text_settings(tmp_path):
    root = whole_root(tmp_path)
    with pytest.raises(UserError, match="text_length is 2"):
        opened("sst2", root, config=task_config("sst2", text_length=2))
    settings = data(root)
    with pytest.raises(UserError, match="word table has 7 rows"):
        open_dataset("sst2", "train", settings, task_config("sst2"), augment=False, vocab_size=7)
    (root / "bert/vocab.txt").rename(root / "words.txt")
    with pytest.raises(UserError, match=r"vocabulary not found: bert/vocab.txt"):
        opened("sst2", root)
    assert len(opened("sst2", root, vocab=str(root / "words.txt"))) == 2
    with pytest.raises(UserError, match="does not exist"):
        opened("sst2", root, vocab=str(root / "gone.txt"))


def test_a_parquet_text_that_is_no_text(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = whole_root(tmp_path)
    (root / "glue/SST-2/train.tsv").unlink()
    raw = pyarrow.array([b"good", b"a f\xff\xfe film"], type=pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    (root / "glue/sst2").mkdir()
    table = pyarrow.table({"sentence": texts, "label": np.array([1, 0])})
    parquet.write_table(table, root / "glue/sst2/train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: a row after row 0 cannot be read \(UnicodeDecodeError"):
        opened("sst2", root)
