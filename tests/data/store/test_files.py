"""Reading foreign files: JSON, lines, names. Nothing may leave the root, wait for ever or eat memory."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_roots import no_plain_file, opened, whole_root, write
from unit_fast.data.store import files
from unit_fast.errors import UserError


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path):
    value = {"a": [1, 2.5, "é", None, True], "b": {"c": {}}}
    path = write(tmp_path / "a.json", value)
    assert files.read_json(path) == value
    assert files.read_json(write(tmp_path / "b.json", b"\xef\xbb\xbf" + json.dumps(value).encode())) == value


def test_json_drops_keys_at_any_depth(tmp_path):
    path = write(tmp_path / "a.json", {"x": [{"segmentation": [1, 2], "id": 3}], "segmentation": 1})
    assert files.read_json(path, drop=("segmentation",)) == {"x": [{"id": 3}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": ' + b"9" * 400 + b".0}", "not finite"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (rb'{"a": "\ud800"}', "lone surrogate"),
        (rb'{"\udfff": 1}', "lone surrogate"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
    ],
)
def test_hostile_json_is_refused_by_name(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match="bad.json") as info:
        files.read_json(path)
    assert message in str(info.value)


def test_finite_numbers_that_look_large_are_read(tmp_path):
    assert files.read_json(write(tmp_path / "a.json", b'[1e300, 1E+100, 1e-999, "e999"]')) == [
        1e300,
        1e100,
        0.0,
        "e999",
    ]


def test_paired_surrogates_are_text(tmp_path):
    assert files.read_json(write(tmp_path / "a.json", rb'["\ud83d\ude00"]')) == ["\U0001f600"]


def test_size_limit_and_missing_file(tmp_path):
    path = write(tmp_path / "a.json", [1] * 100)
    with pytest.raises(UserError, match="more than the limit of 50"):
        files.read_json(path, limit=50)
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path)


def test_lines_end_only_at_newlines(tmp_path):
    path = write(tmp_path / "a.tsv", "a\u2028b\x0bc\r\nd\n\ne".encode())
    assert list(files.read_lines(path)) == [(1, "a\u2028b\x0bc"), (2, "d"), (3, ""), (4, "e")]
    with pytest.raises(UserError, match=r"b.tsv:2: not UTF-8"):
        list(files.read_lines(write(tmp_path / "b.tsv", b"a\n\xff\n")))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT", 100)
    with pytest.raises(UserError, match="a.tsv:1: line longer"):
        list(files.read_lines(write(tmp_path / "a.tsv", "x" * 101)))


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "..", "~/x", 7, None, "x" * 256, "a/" * 3000]
)
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UserError):
        files.safe_path(tmp_path, name)


def test_links_stay_inside(tmp_path):
    inside, outside = tmp_path / "root" / "images", tmp_path / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    write(outside / "secret.jpg", b"x")
    write(tmp_path / "root" / "other" / "shared.jpg", b"x")
    (inside / "out.jpg").symlink_to(outside / "secret.jpg")
    (inside / "in.jpg").symlink_to(tmp_path / "root" / "other" / "shared.jpg")
    with pytest.raises(UserError, match="link out of the data root"):
        files.safe_path(inside, "out.jpg")
    with pytest.raises(UserError, match="link out of the data root"):
        files.safe_path(inside, "in.jpg")
    assert files.safe_path(inside, "in.jpg", within=tmp_path / "root").name == "shared.jpg"
    # a folder that the user linked himself is the root
    (tmp_path / "linked").symlink_to(outside)
    assert files.safe_path(tmp_path / "linked", "secret.jpg").exists()
    (inside / "loop").symlink_to(inside / "loop")
    with pytest.raises(UserError):
        files.safe_path(inside, "loop/x")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_name_is_inside_or_refused(name):
    root = os.path.abspath("some") + "/root"
    try:
        path = files.safe_path(root, name)
    except UserError:
        return
    assert path.is_relative_to(root)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("coco", "coco/annotations/instances_train2017.json"),
        ("snli_ve", "snli_ve/snli_ve_train.jsonl"),
        ("sst2", "glue/SST-2/train.tsv"),
        ("sst2", "bert/vocab.txt"),
        ("vqa2", "vqa2/trainval_label2ans.json"),
        ("vqa2", "vqa2/imdb_train2017.npy"),
        ("sst2", "glue/sst2/train.parquet"),
    ],
)
def test_only_plain_files_of_a_fitting_size_are_read(tmp_path, kind, task, name):
    root = whole_root(tmp_path)
    if name.endswith("parquet"):
        (root / "glue/SST-2/train.tsv").unlink()
    no_plain_file(kind, root / name)
    with pytest.raises(UserError, match="not a plain file|Is a directory|more than the limit of"):
        opened(task, root)
