"""Tables as users write them: what is read of each kind, and what is refused."""

import json

import pytest

from tests.data_roots import write
from unit_fast.data.readers.by_hash import held_out
from unit_fast.data.readers.tables import open_table
from unit_fast.errors import UserError

ROWS = [{"text": 'a "fine" film, really', "label": "good"}, {"text": "dull\nand long", "label": "bad"}]
QUOTED = 'text,label\n"a ""fine"" film, really",good\n"dull\nand long",bad\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", QUOTED),
        ("t.csv", "\ufeff" + QUOTED.replace("\n", "\r\n")),
        ("t.csv", QUOTED.replace("text,label", "text;label").replace('",', '";')),
        ("t.csv", f"\n{QUOTED}\n \n"),
        ("t.CSV", QUOTED),
        ("t.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("t.json", json.dumps(ROWS)),
    ],
    ids=["csv", "bom and crlf", "semicolons", "blank lines", "capitals", "json lines", "json list"],
)
def test_rows_are_what_was_written(tmp_path, name, content):
    table = open_table(write(tmp_path / name, content))
    assert table.columns == ["text", "label"]
    assert [row for _, row in table.rows()] == ROWS
    assert [row for _, row in table.rows()] == ROWS  # as often as wanted


def test_quotes_in_tab_separated_rows_are_text_and_lines_are_counted(tmp_path):
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"a fine film\t1\n\nlong "one\t0\n')
    assert list(open_table(path).rows()) == [
        (f"{path}:2", {"text": '"a fine film', "label": "1"}),
        (f"{path}:4", {"text": 'long "one', "label": "0"}),
    ]
    path = write(tmp_path / "t.csv", QUOTED)
    assert [where for where, _ in open_table(path).rows()] == [f"{path}:2", f"{path}:3"]


def test_questions_of_vqa2_are_a_table_with_the_annotations_beside_them(tmp_path):
    question = {"question_id": 7, "image_id": 9, "question": "what?"}
    path = write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": [question]})
    (row,) = (row for _, row in open_table(path).rows())
    assert row == question
    said = {"annotations": [{"question_id": 7, "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}]}
    write(tmp_path / "v2_mscoco_train2014_annotations.json", said)
    (row,) = (row for _, row in open_table(path).rows())
    assert row == question | {"answers": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty; its first line must name the columns"),
        ("t.csv", "a,b,a\n1,2,3\n", "column 'a' stands twice"),
        ("t.csv", 'text,label\n"never closed,1\n', r"t.csv:2: not a row of a table .*quotation mark"),
        ("t.csv", b"text,label\n\xff\xfe,1\n", "t.csv:2: not UTF-8"),
        ("t.jsonl", "", "is empty; give an object with keys"),
        ("t.jsonl", "{\n", r"t.jsonl:1: not valid JSON"),
        ("t.jsonl", "[1]\n", "must be an object with keys, found list"),
        ("t.json", {"rows": []}, "must be a list of objects, or VQA v2's questions, found dict"),
        ("t.json", [1], "must be an object with keys, found int"),
        ("t.json", {"questions": [{"question_id": "x"}]}, "question_id must be an integer"),
        ("t.xlsx", b"PK", "not a table; give a file in .csv, .tsv"),
    ],
)
def test_what_is_no_table_is_refused_with_its_name(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as info:
        list(open_table(path).rows())
    assert str(path) in str(info.value)


def test_rows_with_other_numbers_of_cells_say_so(tmp_path):
    path = write(tmp_path / "t.csv", "a,b\n1,2,3\n1\n1,2\n")
    found = [row for _, row in open_table(path).rows()]
    assert [row.get(None, "")[:7] for row in found] == ["3 cells", "1 cells", ""]


def test_a_tenth_is_held_out_whatever_else_is_there():
    keys = [f"image {i // 2}.jpg" for i in range(4000)]
    out = held_out(keys)
    assert 150 < sum(out) / 2 < 250
    assert out[::2] == out[1::2]
    assert held_out(keys[1000:1500]) == out[1000:1500]
    assert held_out(["a"]) == [False]
    for count in range(2, 12):
        assert 0 < sum(held_out([f"k{i}" for i in range(count)])) < count
