"""JSON, COCO results and folders of pictures of many predictions."""

import contextlib
import io
import json

import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.data_roots import picture, write
from unit_fast.errors import UserError
from unit_fast.prediction.files import Pictures, write_coco, write_json
from unit_fast.prediction.prediction import Prediction


def prediction(name: str, *items: dict, **more) -> Prediction:
    return Prediction(task="coco", items=list(items), name=name, path=name, **more)


def found(score: float, category: int) -> dict:
    return {"label": "a", "score": score, "box": [1.0, 2.0, 11.0, 22.5], "category_id": category}


def test_json_is_an_object_of_one_and_a_list_of_several(tmp_path):
    one = prediction("a.jpg", found(0.5, 3), size=(40, 60))
    assert json.loads(write_json(one, tmp_path / "x.json").read_text()) == {
        "task": "coco", "image": "a.jpg", "width": 60, "height": 40, "predictions": [found(0.5, 3)],
    }  # fmt: skip
    broken = prediction("b.jpg", error="b.jpg: no such file")
    values = json.loads(write_json([one, broken], tmp_path / "x.json").read_text())
    assert [value.get("error") for value in values] == [None, "b.jpg: no such file"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_coco_results_are_read_by_pycocotools(tmp_path):
    truth = {"images": [{"id": 139, "width": 60, "height": 40}], "annotations": [], "categories": [{"id": 900}]}
    path = write_coco([prediction("in/000000000139.jpg", found(0.5, 900))], tmp_path / "r.json")
    with contextlib.redirect_stdout(io.StringIO()):
        results = COCO(write(tmp_path / "t.json", truth)).loadRes(str(path))
    (row,) = results.anns.values()
    assert (row["image_id"], row["category_id"], row["bbox"]) == (139, 900, [1.0, 2.0, 10.0, 20.5])
    assert (row["score"], row["file_name"]) == (0.5, "000000000139.jpg")


def ids(tmp_path, names, annotations=None) -> list:
    rows = write_coco([prediction(name, found(0.5, 1)) for name in names], tmp_path / "r.json", annotations).read_text()
    return [row["image_id"] for row in json.loads(rows)]


def test_image_ids_are_numbers_in_the_names_or_a_count_or_a_files(tmp_path, caplog):
    assert ids(tmp_path, ["7.jpg", "COCO_val2014_000000000012.jpg"]) == [7, 12]
    assert not caplog.records
    for names in (["7.jpg", "b.jpg"], ["7.jpg", "07.jpg"], ["²7.jpg", "8.jpg"]):
        assert ids(tmp_path, names) == [1, 2]
    assert "image_id counts them from 1; give annotations=" in caplog.text
    images = [{"id": 50, "file_name": "x.jpg"}, {"id": 60, "file_name": "u/y.jpg"}, {"id": 70, "file_name": "v/y.jpg"}]
    annotations = write(tmp_path / "a.json", {"images": images})
    assert ids(tmp_path, ["in/x.jpg", "in/v/y.jpg"], annotations) == [50, 70]
    with pytest.raises(UserError, match=r"a.json: has 2 images called y.jpg"):
        ids(tmp_path, ["y.jpg"], annotations)
    with pytest.raises(UserError, match=r"a.json: has no image called z.jpg"):
        ids(tmp_path, ["z.jpg"], annotations)
    for content in ([], {}, {"images": [{"id": 3}]}):
        with pytest.raises(UserError, match=r"b.json: no list 'images' with 'id' and 'file_name'"):
            ids(tmp_path, ["x.jpg"], write(tmp_path / "b.json", content))


def test_only_boxes_are_coco_results(tmp_path):
    with pytest.raises(UserError, match="sst2 has none"):
        write_coco([Prediction(task="sst2", items=[], text="a")], tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot be written"):
        write_coco([], tmp_path / "absent" / "r.json")


def test_pictures_of_one_name_do_not_replace_each_other(tmp_path):
    pictures = Pictures(tmp_path / "out")
    image = Image.open(picture(tmp_path / "x.jpg", 30, 20))
    written = [pictures.add(prediction(name, image=image), n) for n, name in enumerate(("a/x.jpg", "b/X.png"), 1)]
    written.append(pictures.add(Prediction(task="sst2", items=[], text="a"), 3))
    assert [path.name for path in written] == ["x.jpg", "X_2.jpg", "sst2_0003.jpg"]
    for path in written:
        Image.open(path).load()


def test_pictures_need_a_folder(tmp_path):
    with pytest.raises(UserError, match="several predictions are drawn; give a folder"):
        Pictures(tmp_path / "x.png")
    with pytest.raises(UserError, match="not a folder that can be written"):
        Pictures(write(tmp_path / "file", "x"))
