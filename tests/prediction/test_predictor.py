"""Prediction from a run folder alone: results, their drawings and the errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests.data_roots import VOCABULARY, picture
from tests.evaluation.common import save_run
from unit_fast.errors import UserError
from unit_fast.evaluation.evaluate import evaluate
from unit_fast.evaluation.labels import LABELS, read_labels
from unit_fast.evaluation.labels import VOCABULARY as VOCABULARY_FILE
from unit_fast.prediction.prediction import Prediction
from unit_fast.prediction.predictor import load
from unit_fast.report.boxes import class_colour
from unit_fast.report.predictions import chosen


def test_labels_hold_every_name(made):
    folder = made[0]
    labels = read_labels(folder)
    assert labels["detection_coco"].classes == {1: "person", 2: "bicycle", 90: "toothbrush"}
    assert labels["detection_visual_genome"].classes[2] == "car"
    assert labels["detection_visual_genome"].attributes == {1: "gray", 2: "green", 3: "tall"}
    assert labels["vqa2"].answers == ["", "yes", "no", "2"]
    assert labels["glue_qqp"].classes == {0: "not_duplicate", 1: "duplicate"}
    assert (folder / VOCABULARY_FILE).read_text().split() == VOCABULARY


@pytest.mark.parametrize("task", ["coco", "vg", "detection_coco"])
def test_boxes_are_those_of_the_evaluation(made, predictor, task):
    folder, config, model = made
    short = "coco" if "coco" in task else task
    name = {"coco": "coco/images/val2017/000000000100.jpg", "vg": "visual_genome/images/VG_100K/2.jpg"}[short]
    path = f"{config.data.root}/{name}"
    out = folder / "eval"
    evaluate(model, config, tasks=[short], out=out)
    found = json.loads((out / f"predictions/{short}_val.json").read_text())
    found = [f for f in found if f["image_id"] in (100, 2)]
    result = predictor.predict(task, image=path, threshold=0.0)
    assert result.task == short
    assert len(result.items) == len(found)
    names = read_labels(folder)[config_name(short)].classes
    for item, row in zip(result.items, sorted(found, key=lambda r: -r["score"])):
        assert item["label"] == names.get(row["category_id"], f"class {row['category_id']}")
        assert item["score"] == pytest.approx(row["score"], abs=1e-6)
        x, y, w, h = row["bbox"]
        expected = [min(max(v, 0), limit) for v, limit in zip((x, y, x + w, y + h), (60, 40, 60, 40))]
        assert item["box"] == pytest.approx(expected, abs=1e-3)


def config_name(short):
    return {"coco": "detection_coco", "vg": "detection_visual_genome"}[short]


def test_the_threshold_leaves_boxes_out(predictor, image):
    every = predictor.predict("coco", image=image, threshold=0.0).items
    middle = every[2]["score"]
    assert predictor.predict("coco", image=image, threshold=middle).items == [i for i in every if i["score"] >= middle]
    nothing = predictor.predict("coco", image=image, threshold=np.float32(1.0), top=np.int64(3))
    assert str(nothing) == "no object above the threshold"
    assert nothing.likeliest == every[0]["score"]


@pytest.mark.parametrize(
    ("task", "text", "labels"),
    [
        ("vqa2", "is it?", {"yes", "no", "2"}),
        ("snli_ve", "a cat", {"entailment", "neutral", "contradiction"}),
        ("sst2", "fine film", {"negative", "positive"}),
        ("qqp", ("who?", "what?"), {"duplicate", "not_duplicate"}),
        ("mnli", ["a", "b"], {"entailment", "neutral", "contradiction"}),
    ],
)
def test_answers_are_ranked_and_named(predictor, image, task, text, labels):
    given = {"image": Image.open(image)} if task in ("vqa2", "snli_ve") else {}
    result = predictor.predict(task, text=text, **given)
    assert {i["label"] for i in result.items} == labels, "<unk> is never an answer"
    scores = [i["score"] for i in result.items]
    assert scores == sorted(scores, reverse=True)
    if task != "vqa2":
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)
    assert len(predictor.predict(task, text=text, top=1, **given).items) == 1
    assert result.items[0]["label"] in str(result).splitlines()[0]
    assert json.loads(json.dumps(result.to_dict()))["text"] == (text if isinstance(text, str) else list(text))


def test_answers_are_those_of_the_evaluation(made, predictor):
    folder, config, model = made
    out = folder / "eval"
    evaluate(model, config, tasks=["vqa2", "sst2"], out=out)
    row = json.loads((out / "predictions/vqa2_val.json").read_text())[0]
    image = f"{config.data.root}/coco/images/val2014/COCO_val2014_000000000100.jpg"
    assert predictor.predict("vqa2", image=image, text="is it?").items[0]["label"] == row["answer"]
    row = json.loads((out / "predictions/sst2_val.jsonl").read_text().splitlines()[0])
    result = predictor.predict("sst2", text='a "fine film')
    assert result.items[0]["label"] == row["label"]
    assert result.items[0]["score"] == pytest.approx(max(row["scores"]), abs=1e-5)


def test_results_are_drawn_and_saved(predictor, image, tmp_path):
    boxes = predictor.predict("coco", image=image, threshold=0.0).save(tmp_path / "boxes.png")
    with Image.open(boxes) as drawn:
        assert drawn.format == "PNG"
        assert max(drawn.size) == 800
        plain = Image.open(image).resize(drawn.size)
        assert drawn.convert("RGB").tobytes() != plain.convert("RGB").tobytes()
    answers = predictor.predict("vqa2", image=image, text="is it?").save(tmp_path / "answers.jpg")
    with Image.open(answers) as drawn:
        assert drawn.format == "JPEG"
    predictor.predict("sst2", text="a film " * 60 + "\u202e \x1b[2J").save(tmp_path / "text.png")
    saved = predictor.predict("sst2", text="a film").save(tmp_path / "x.json")
    assert json.loads(saved.read_text())["predictions"][0]["label"] in ("negative", "positive")


def test_a_drawn_box_is_where_it_should_be():
    item = {"label": "a", "score": 0.9, "box": [25.0, 25.0, 75.0, 75.0]}
    drawn = Prediction(task="coco", items=[item], image=Image.new("RGB", (100, 100), "white")).draw()
    assert drawn.size == (800, 800)
    colour = ImageColor.getrgb(class_colour("a"))
    assert drawn.getpixel((201, 400)) == colour
    assert drawn.getpixel((400, 599)) == colour
    assert drawn.getpixel((400, 400)) == (255, 255, 255)
    assert drawn.getpixel((700, 400)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "coc", "image": "x"}, "task 'coc': this model does not have it; nearest: coco"),
        ({"task": "coco"}, "coco needs an image"),
        ({"task": "coco", "image": "IMAGE", "text": "hm"}, "coco takes no text"),
        ({"task": "sst2", "text": "good", "image": "IMAGE"}, r"sst2 takes no image, only text \(a sentence\)"),
        ({"task": "vqa2", "image": "IMAGE"}, "vqa2 needs a question, found 0 texts"),
        ({"task": "vqa2", "image": "IMAGE", "text": " "}, r"vqa2 needs a question, found 1 text \(empty\)"),
        ({"task": "qnli", "text": "one"}, "qnli needs a question and a sentence, found 1 text"),
        ({"task": "sst2", "text": ("a", "b")}, "sst2 needs a sentence, found 2 texts"),
        ({"task": "sst2", "text": 3}, "sst2 needs a sentence"),
        ({"task": "coco", "image": "absent.jpg"}, "absent.jpg: no such file; give a JPEG or PNG file"),
        ({"task": "coco", "image": "NOT"}, "not a JPEG or PNG image; give a JPEG or PNG file"),
        (
            {"task": "coco", "image": 3},
            "image: expected a path, a PIL image, an array, a tensor or a list of them, found int",
        ),
        ({"task": "coco", "image": "IMAGE", "threshold": 2.0}, "threshold: 2.0 is not between 0 and 1"),
        ({"task": "sst2", "text": "a", "top": 0}, "top: 0 is below 1"),
    ],
)
def test_bad_input_is_named_with_its_remedy(predictor, image, tmp_path, arguments, message):
    (tmp_path / "not.jpg").write_bytes(b"GIF89a")
    places = {"IMAGE": image, "NOT": tmp_path / "not.jpg"}
    arguments = {k: places.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(UserError, match=message):
        predictor.predict(**arguments)


def turned(image, tag: int):
    """The pixels as a camera stores them that notes orientation ``tag``, and the note."""
    kind = Image.Transpose
    how = {
        2: kind.FLIP_LEFT_RIGHT, 3: kind.ROTATE_180, 4: kind.FLIP_TOP_BOTTOM, 5: kind.TRANSPOSE, 6: kind.ROTATE_90,
        7: kind.TRANSVERSE, 8: kind.ROTATE_270,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = tag
    return image.transpose(how[tag]) if tag in how else image, exif


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_photograph_is_seen_as_its_viewers_show_it(predictor, tmp_path, tag, mode):
    grey = (np.random.default_rng(0).random((40, 60)) * 65535).astype(np.uint16)
    upright = Image.fromarray(grey) if mode == "I;16" else Image.fromarray((grey >> 8).astype(np.uint8)).convert(mode)
    upright.save(tmp_path / "upright.png")
    wanted = predictor.predict("coco", image=tmp_path / "upright.png", threshold=0.0)
    stored, exif = turned(upright, tag)
    stored.save(tmp_path / "stored.png", exif=exif)
    for image in (tmp_path / "stored.png", str(tmp_path / "stored.png"), Image.open(tmp_path / "stored.png")):
        found = predictor.predict("coco", image=image, threshold=0.0)
        assert found.items == wanted.items
        assert found.image.size == (60, 40)
        assert found.image.tobytes() == wanted.image.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_note_of_the_orientation_is_no_orientation(predictor, tmp_path, monkeypatch, caplog):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (60, 40), "red").save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert predictor.predict("coco", image=path, threshold=0.0).image.size == (60, 40)

    def fail(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("unit_fast.prediction.inputs.ImageOps.exif_transpose", fail)
    assert predictor.predict("coco", image=path, threshold=0.0).image.size == (60, 40)
    assert "its EXIF record cannot be read (not a TIFF file); taken as stored" in caplog.text


def test_a_pillow_image_that_cannot_be_used_is_named(predictor, image):
    with pytest.raises(UserError, match="image: 0 x 4 pixels"):
        predictor.predict("coco", image=Image.new("RGB", (0, 4)))
    image.write_bytes(image.read_bytes()[:-400])
    with pytest.raises(UserError, match="image: cannot be decoded"):
        predictor.predict("coco", image=Image.open(image))


def test_what_is_not_finite_is_an_error_and_is_not_drawn(made, image, tmp_path, caplog):
    predictor = load(made[0])
    with torch.no_grad():
        predictor.model.class_embeds["detection_coco"].weight.fill_(float("nan"))
    name = "class_embeds.detection_coco.weight"
    with pytest.raises(UserError, match=rf"coco: the model's output is not finite; 1 of \d+ weight tensors .*{name}"):
        predictor.predict("coco", image=image)
    nan = float("nan")
    boxes = [{"label": "a", "score": nan, "box": [1.0] * 4}, {"label": "b", "score": 0.5, "box": [nan, 1.0, 9.0, 9.0]}]
    drawn = Prediction(task="coco", items=boxes, image=Image.new("RGB", (80, 80), "white")).draw()
    assert drawn.getcolors() == [(800 * 800, (255, 255, 255))]
    Prediction(task="sst2", items=[{"label": "a", "score": nan}], text="x").save(tmp_path / "x.png")
    assert chosen([{"score": nan, "label": "a"}, {"score": 0.2, "label": "b"}]) == [{"score": 0.2, "label": "b"}]


def test_loading_weights_that_are_not_finite_says_so(made, tmp_path, caplog):
    folder, config, model = made
    weights = {n: x.clone() for n, x in model.state_dict().items()}
    weights["query_embeds.glue_sst2.weight"][0] = float("inf")
    save_run(tmp_path, weights, config)
    shutil.copy(folder / LABELS, tmp_path)
    load(tmp_path)
    assert "weight tensors are not finite (first: query_embeds.glue_sst2.weight)" in caplog.text


def test_saving_needs_a_known_ending_and_a_folder(predictor, tmp_path):
    result = predictor.predict("sst2", text="a")
    with pytest.raises(UserError, match=r"ends in '.gif'; give a name in .png, .jpg"):
        result.save(tmp_path / "x.gif")
    with pytest.raises(UserError, match="cannot be written"):
        result.save(tmp_path / "absent" / "x.png")


def test_loading_needs_a_run_and_its_names(made, tmp_path):
    folder = made[0]
    with pytest.raises(UserError, match="no such run"):
        load(tmp_path / "absent")
    lonely = tmp_path / "lonely"
    shutil.copytree(folder / "checkpoints" / "step_000001", lonely)
    with pytest.raises(UserError, match="no labels.json in it or above it"):
        load(lonely)
    shutil.copy(folder / LABELS, lonely)
    with pytest.raises(UserError, match="the run folder has no vocab.txt"):
        load(lonely).predict("sst2", text="a")
    (lonely / LABELS).write_text('{"vqa2": []}')
    with pytest.raises(UserError, match=r"labels.json: not a file of names"):
        load(lonely)


@pytest.mark.parametrize("part", ["checkpoints/last", "checkpoints/step_000001/model.safetensors"])
def test_a_checkpoint_finds_the_names_of_its_run(made, part):
    assert load(made[0] / part).labels == read_labels(made[0])


def test_prediction_touches_no_random_state(predictor, image):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    predictor.predict("vqa2", image=image, text="is it?")
    assert torch.equal(before, torch.get_rng_state())


def test_names_from_data_are_printed_safely():
    item = {"label": "a\x1b[2J\u202e", "score": 0.9, "box": [0.0, 0.0, 5.0, 5.0]}
    text = str(Prediction(task="coco", items=[item], image=Image.new("RGB", (9, 9))))
    assert "\x1b" not in text
    assert "\u202e" not in text


# ------------------------------------------------------------------------------------------------- several at once


@pytest.fixture
def folder(tmp_path):
    """Five images of two sizes, in the order of their names."""
    for n, size in enumerate([(60, 40), (30, 50), (60, 40), (60, 40), (30, 50)]):
        picture(tmp_path / "in" / f"{n}.jpg", *size, seed=n)
    return tmp_path / "in"


def same(found, alone) -> None:
    assert [item["label"] for item in found.items] == [item["label"] for item in alone.items]
    for ours, theirs in zip(found.items, alone.items):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours.get("box", []) == pytest.approx(theirs.get("box", []), abs=1e-3)


@pytest.mark.parametrize("task", ["coco", "vg", "vqa2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_several_images_are_computed_in_batches_of_one_size(predictor, folder, task, batch_size, monkeypatch):
    text = {"text": "is it?"} if task == "vqa2" else {}
    alone = [predictor.predict(task, image=f"{folder}/{n}.jpg", threshold=0.0, **text) for n in range(5)]
    batches = []
    forward = predictor.model.forward
    monkeypatch.setattr(predictor.model, "forward", lambda batch: (batches.append(batch), forward(batch))[1])
    found = predictor.predict(task, image=folder, threshold=0.0, batch_size=batch_size, **text)
    assert [p.name for p in found] == [f"{folder}/{n}.jpg" for n in range(5)]
    for ours, theirs in zip(found, alone, strict=True):
        same(ours, theirs)
        assert ours.image.tobytes() == theirs.image.tobytes()
        assert ours.size == (theirs.image.height, theirs.image.width)
    assert sorted(map(len, batches)) == {1: [1] * 5, 2: [1, 2, 2], 8: [2, 3]}[batch_size]
    assert not any(batch.pixel_mask.any() for batch in batches), "padding would change what the model sees"


def test_more_images_than_are_read_together_keep_their_order(predictor, tmp_path):
    for n in range(10):
        picture(tmp_path / "in" / f"{n}.jpg", *((30, 50) if n % 3 else (60, 40)), seed=n)
    found = predictor.predict("coco", image=tmp_path / "in", threshold=0.0, batch_size=1)
    for n, prediction in enumerate(found):
        same(prediction, predictor.predict("coco", image=tmp_path / "in" / f"{n}.jpg", threshold=0.0))


def test_pixels_say_what_their_file_says(predictor, tmp_path):
    path = picture(tmp_path / "x.jpg", 60, 40, seed=3)
    wanted = predictor.predict("coco", image=path, threshold=0.0)
    pixels = np.array(Image.open(path))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (pixels, tensor, tensor.float() / 255, Image.open(path)):
        assert predictor.predict("coco", image=given, threshold=0.0).items == wanted.items
        (one,) = predictor.predict("coco", image=[given], threshold=0.0)
        same(one, wanted)
        assert one.name == "image 1"
        assert one.path is None
        assert one.draw().size == (800, 533)


def test_a_broken_image_among_several_is_named_and_the_rest_goes_on(predictor, folder, caplog):
    (folder / "1.jpg").write_bytes(b"no image")
    (folder / "3.jpg").unlink()
    found = predictor.predict("coco", image=[f"{folder}/{n}.jpg" for n in range(5)], threshold=0.0)
    assert [p.error is None for p in found] == [True, False, True, False, True]
    assert "1.jpg: not a JPEG or PNG image" in found[1].error
    assert "3.jpg: no such file" in caplog.text
    assert found[1].to_dict()["error"] == found[1].error
    assert str(found[3]).startswith("no answer: image ")
    assert found[1].size is None
    assert found[1].items == []
    with pytest.raises(UserError, match="there is nothing to draw"):
        found[1].draw()


def test_texts_of_several(predictor, image):
    one = {text: predictor.predict("sst2", text=text) for text in ("a fine film", "dull", "a b c d e f g h")}
    for ours, text in zip(predictor.predict("sst2", text=list(one), batch_size=2), one, strict=True):
        same(ours, one[text])
        assert ours.text == text
    pairs = [("who?", "what?"), ("a b c", "d")]
    for ours, pair in zip(predictor.predict("qqp", text=pairs), pairs, strict=True):
        same(ours, predictor.predict("qqp", text=pair))
    asked = predictor.predict("vqa2", image=image, text=["is it?", "what is there?"])
    assert [p.text for p in asked] == ["is it?", "what is there?"]
    same(asked[1], predictor.predict("vqa2", image=image, text="what is there?"))
    each = predictor.predict("vqa2", image=[image, image], text=["is it?", "what is there?"])
    same(each[1], asked[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"task": "vqa2", "image": ["IMAGE"] * 2, "text": ["a"] * 3},
            "2 images and 3 texts: give one text, or one for",
        ),
        ({"task": "sst2", "text": ["a", " "]}, "text 2: sst2 needs a sentence"),
        ({"task": "qqp", "text": [("a", "b"), "c"]}, "text 2: qqp needs two questions"),
        ({"task": "sst2", "text": []}, "sst2 needs a sentence, found 0 texts"),
        ({"task": "coco", "image": "IMAGE", "batch_size": 0}, "batch_size: 0 is below 1"),
        ({"task": "coco", "image": "IMAGE", "top": 1.5}, "top: expected a whole number, found float"),
        ({"task": "coco", "image": "IMAGE", "threshold": "high"}, "threshold: high is not between 0 and 1"),
        ({"task": "coco", "image": "http://example.org/x.jpg"}, "addresses are not fetched"),
    ],
)
def test_bad_input_of_several_is_named_before_anything_is_computed(predictor, image, arguments, message):
    if "image" in arguments:
        given = arguments["image"]
        places = [str(image)] * len(given) if isinstance(given, list) else given.replace("IMAGE", str(image))
        arguments = arguments | {"image": places}
    with pytest.raises(UserError, match=message):
        predictor.stream(**arguments)


def test_unknown_words_are_named_once(made, caplog):
    predictor = load(made[0])
    for _ in range(2):
        result = predictor.predict("sst2", text="a fine \u5b57 film \u00a7")
    assert result.unknown == ["\u5b57", "\u00a7"]
    assert result.to_dict()["unknown_words"] == ["\u5b57", "\u00a7"]
    assert caplog.text.count("the model's vocabulary does not have '\u5b57', '\u00a7'") == 1
    assert "unknown_words" not in predictor.predict("sst2", text="a fine film").to_dict()
    predictor.predict("sst2", text=[f"\u5b57 {n}" for n in range(20)])
    assert caplog.text.count("does not have") == 10
    assert caplog.text.count("further texts are not named") == 1


def test_boxes_carry_the_ids_of_their_classes(made, predictor, image):
    ids = {name: i for i, name in read_labels(made[0])["detection_coco"].classes.items()}
    for item in predictor.predict("coco", image=image, threshold=0.0).items:
        assert item["category_id"] == ids.get(item["label"], item["category_id"])


def test_the_run_decides_what_is_likely_enough_unless_told(made, image, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made[0], folder)
    every = sorted(item["score"] for item in load(folder).predict("coco", image=image, threshold=0.0).items)
    assert load(folder).threshold("coco") == 0.5
    (folder / "thresholds.json").write_text(json.dumps({"detection_coco": {"threshold": every[1]}}))
    predictor = load(folder)
    assert predictor.threshold("coco") == every[1]
    assert len(predictor.predict("coco", image=image).items) == len(every) - 1
    assert len(predictor.predict("coco", image=image, threshold=every[2]).items) == len(every) - 2


def test_a_predictor_moves_and_is_short_to_print(made, predictor, image):
    moved = load(made[0])
    assert moved.to("cpu", torch.float64) is moved
    same(moved.predict("coco", image=image, threshold=0.0), predictor.predict("coco", image=image, threshold=0.0))
    with pytest.raises(UserError, match="device 'nowhere'"):
        moved.to("nowhere")
    assert len(repr(predictor)) < 300
    assert "coco" in repr(predictor)
    result = predictor.predict("coco", image=image, threshold=0.0)
    assert len(repr(result)) < 300
    assert f"{len(result.items)} boxes" in repr(result)


def test_a_picture_is_shown_by_the_systems_viewer(predictor, image, monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda picture, title=None: shown.append((picture.size, title)))
    predictor.predict("coco", image=image).show()
    assert shown == [((800, 533), str(image))]


def test_memory_that_runs_out_names_the_batch(made, folder, monkeypatch):
    predictor = load(made[0])

    def fail(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(UserError, match=r"coco: out of memory with 3 at a time; give a smaller batch_size"):
        predictor.predict("coco", image=folder)
