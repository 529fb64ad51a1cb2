"""Folders in YOLO's and Pascal VOC's format: boxes as pycocotools would have them, every mistake by file and line."""

import json
import os

import numpy as np
import pytest

from tests.data_roots import picture, write
from tests.own_folders import NAMES, scenes, voc, yolo
from unit_fast.commands.main import main
from unit_fast.data.prepare import prepare
from unit_fast.errors import UserError


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("world") / "world")


def read(root, split="train") -> dict:
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


@pytest.mark.parametrize(("kind", "make"), [("yolo", yolo), ("voc", voc)])
def test_images_and_boxes_stay(kind, make, found, tmp_path):
    source, target = make(tmp_path / "source", found), tmp_path / "target"
    before = {p: p.stat().st_mtime_ns for p in source.rglob("*")}
    done = prepare(kind, source, target)
    assert done.classes == list(NAMES)
    assert done.images == {"train": 22, "val": 8}
    for split, images in found.items():
        content = read(target, split)
        names = {i["id"]: i["file_name"] for i in content["images"]}
        assert {n: (i["width"], i["height"]) for n, i in zip(names.values(), content["images"])} == {
            i["path"].name: (i["width"], i["height"]) for i in images
        }
        boxes = sorted((names[a["image_id"]], a["category_id"] - 1, *a["bbox"]) for a in content["annotations"])
        wanted = sorted((i["path"].name, *box) for i in images for box in i["boxes"])
        assert [b[:2] for b in boxes] == [b[:2] for b in wanted]
        assert np.allclose([b[2:] for b in boxes], [b[2:] for b in wanted], atol=1e-5)
        for image in images:
            assert os.path.samefile(target / "images" / split / image["path"].name, image["path"]), "linked"
    assert {p: p.stat().st_mtime_ns for p in source.rglob("*")} == before
    prepare(kind, source, tmp_path / "copied", copy=True)
    assert (tmp_path / "copied/images/val").is_dir()
    assert not any(os.path.samefile(p, target / p.relative_to(tmp_path / "copied"))
                   for p in (tmp_path / "copied/images").rglob("*.jpg"))  # fmt: skip


def yolo_folder(root, rows="0 0.5 0.5 0.2 0.4\n", yaml="names: [bolt, nut]\n", **files):
    picture(root / "images/a.jpg", 100, 50)
    if rows is not None:
        write(root / "labels/a.txt", rows)
    if yaml is not None:
        write(root / "data.yaml", yaml)
    for name, text in files.items():
        write(root / name.replace("__", "/"), text)
    return root


@pytest.mark.parametrize(
    ("rows", "boxes"),
    [
        ("0 0.5 0.5 0.2 0.4", [(1, 40, 15, 20, 20)]),
        ("1 0.5 0.5 0.2 0.4 0.99\n\n", [(2, 40, 15, 20, 20)]),  # with a confidence
        ("0 0.1 0.2 0.5 0.2 0.3 0.8", [(1, 10, 10, 40, 30)]),  # a polygon
        ("1.0 0.05 0.5 0.1001 1.0005", [(2, 0, 0, 10.005, 50)]),  # rounded beyond the border
        ("", None),
        (None, None),
    ],
)
def test_lines_of_yolo(rows, boxes, tmp_path):
    source = yolo_folder(tmp_path / "source", rows)
    picture(source / "images/b.jpg", 10, 10)
    write(source / "labels/b.txt", "0 0.5 0.5 1 1")
    prepare("yolo", source, tmp_path / "target")
    found = [a for a in read(tmp_path / "target")["annotations"] if a["image_id"] == 1]
    assert [a["category_id"] for a in found] == [b[0] for b in boxes or ()]
    assert np.allclose([a["bbox"] for a in found], [b[1:] for b in boxes or ()], atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("2 0.5 0.5 0.2 0.4", r"a.txt:1: class 2: there are 2, from 0 to 1"),
        ("0.5 0.5 0.5 0.2 0.4", r"a.txt:1: class 0.5"),
        ("\n0 0.5 0.5 0.2", r"a.txt:2: has 3 numbers after the class"),
        ("0 0.5 0.5 0.2 0.4 0.1 0.1 0.1", r"has 7 numbers after the class"),
        ("0 50 25 20 20", r"numbers must lie within 0..1, relative to the image"),
        ("0 0.5 0.5 -0.2 0.4", r"a width or height below 0"),
        ("bolt 0.5 0.5 0.2 0.4", r"expected numbers: class cx cy w h"),
        ("0 nan 0.5 0.2 0.4", r"not finite"),
        (None, r"no label file with a box"),
    ],
)
def test_mistakes_in_labels_leave_nothing_behind(rows, message, tmp_path):
    source = yolo_folder(tmp_path / "source", rows)
    with pytest.raises(UserError, match=message):
        prepare("yolo", source, tmp_path / "target")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("yaml", "files", "message"),
    [
        (None, {}, r"no data.yaml with names and no classes.txt"),
        (None, {"classes.txt": "bolt\n\nnut\n"}, r"one name a line, without empty lines"),
        ("names: [a\n", {}, r"data.yaml: not YAML"),
        ("- a\n", {}, r"expected keys"),
        ("names: {0: a, 2: b}\n", {}, r"names: the numbers must go from 0 to 1"),
        ("names: []\n", {}, r"names must be a list"),
        ("train: nowhere\nnames: [a]\n", {}, r"train: nowhere is not there; looked for"),
        ("train: list.txt\nnames: [a]\n", {"list.txt": "images/b.jpg\n"}, r"list.txt:1: images/b.jpg: no such image"),
        ("train: 3\nnames: [a]\n", {}, r"train: expected a path"),
    ],
)
def test_mistakes_in_descriptions(yaml, files, message, tmp_path):
    source = yolo_folder(tmp_path / "source", yaml=yaml, **files)
    with pytest.raises(UserError, match=message):
        prepare("yolo", source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("yaml", "files"),
    [
        (None, {"classes.txt": "bolt\nnut\n"}),
        (None, {"labels__classes.txt": "bolt\r\nnut"}),
        ("names:\n  0: bolt\n  1: nut\n", {}),
        ("path: .\ntrain: images\nval: images\nnames: [bolt, nut]\n", {}),
        ("train: list.txt\nnames: [bolt, nut]\n", {"list.txt": "images/a.jpg\n"}),
        ("train: [images]\ntest: nowhere\nnames: [bolt, nut]\nnc: 2\n", {}),
    ],
)
def test_descriptions_as_tools_write_them(yaml, files, tmp_path):
    done = prepare("yolo", yolo_folder(tmp_path / "source", yaml=yaml, **files), tmp_path / "target")
    assert (done.classes, done.images, done.boxes) == (["bolt", "nut"], {"train": 1}, {"train": 1})


def thing(name="bolt", box=(11, 6, 30, 25), difficult="0") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    name = f"<name>{name}</name>" if name is not None else ""
    return f"<object>{name}<difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def voc_folder(root, objects, size="<size><width>100</width><height>50</height></size>", before=""):
    picture(root / "a.jpg", 100, 50)
    write(root / "a.xml", f"{before}<annotation>{size}{objects}</annotation>")
    return root


def test_boxes_of_voc_count_from_one(tmp_path):
    size = "<size><width>0</width><height>0</height></size>"  # some tools know none
    objects = thing() + thing("nut", (0, 0, 100, 50), "1") + thing(box=(1.5, 1, 2.5, 3))
    done = prepare("voc", voc_folder(tmp_path / "source", objects, size), tmp_path / "target")
    found = read(tmp_path / "target")["annotations"]
    assert [a["bbox"] for a in found] == [[10, 5, 20, 20], [0, 0, 100, 50], [0.5, 0, 2, 3]]
    assert [a["iscrowd"] for a in found] == [0, 1, 0], "difficult ones are not scored"
    assert [a["category_id"] for a in found] == [1, 2, 1]
    assert any("1 objects are marked difficult" in line for line in done.lines)


@pytest.mark.parametrize(
    ("objects", "more", "message"),
    [
        (thing(None), {}, r"a.xml: object 0: has no name"),
        (thing(box=(9, 1, 5, 5)), {}, r"xmax and ymax must not be below"),
        (thing(box=("a", 1, 5, 5)), {}, r"xmin must be a number, found 'a'"),
        (thing(box=("inf", 1, 5, 5)), {}, r"xmin must be a number, found .inf."),
        (thing(box=(1, 1, 5)), {}, r"ymax must be a number, found 'nothing'"),
        ("<object>", {}, r"not XML"),
        ("", {}, r"no object in 1 XML files"),
        (thing(), {"before": '<!DOCTYPE a [<!ENTITY b "c">]>'}, r"has a document type"),
        (thing(), {"size": "<size><width>50</width><height>100</height></size>"}, r"its boxes are of another picture"),
    ],
)
def test_mistakes_in_voc(objects, more, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare("voc", voc_folder(tmp_path / "source", objects, **more), tmp_path / "target")
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_an_image_that_is_not_there_or_damaged(tmp_path):
    source = voc_folder(tmp_path / "source", thing())
    write(source / "a.jpg", "not an image")
    with pytest.raises(UserError, match="a.jpg: not a JPEG or PNG image"):
        prepare("voc", source, tmp_path / "target")
    (source / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"its image a.jpg \(.jpeg, .png\) is not in"):
        prepare("voc", source, tmp_path / "target")


def test_where_to(tmp_path, capsys):
    source, target = yolo_folder(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    assert main(["data", "prepare", "--from", "yolo", str(source), str(target)]) == 0
    assert f"train: unit-fast train --recipe detect --data-root {target}" in capsys.readouterr().out
    assert main(["data", "prepare", "--from", "yolo", str(source), str(target)]) == 2
    assert "is there and not an empty folder; give another one" in capsys.readouterr().err
    assert main(["data", "prepare", "--from", "yolo", str(tmp_path / "none"), str(tmp_path / "t")]) == 2
    assert "no such folder; give one in YOLO format" in capsys.readouterr().err
    write(tmp_path / "file", "")
    assert main(["data", "prepare", "--from", "yolo", str(source), str(tmp_path / "file/t")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_images_of_one_name_from_two_folders(tmp_path):
    source = tmp_path / "source"
    for folder in ("one", "two"):
        picture(source / folder / "images/a.jpg", 10, 10)
        write(source / folder / "labels/a.txt", "0 0.5 0.5 1 1")
    write(source / "data.yaml", "train: [one/images, two/images]\nnames: [bolt]\n")
    prepare("yolo", source, tmp_path / "target")
    assert [i["file_name"] for i in read(tmp_path / "target")["images"]] == ["a.jpg", "a_2.jpg"]
    assert sorted(p.name for p in (tmp_path / "target/images/train").iterdir()) == ["a.jpg", "a_2.jpg"]
