"""``check``: a summary of a whole root that never raises on bad data."""

import json
import random

import pytest
from PIL import Image

from tests.data_roots import REAL, box, coco_file, coco_root, needs_real, picture, whole_root, write
from unit_fast.data.check import check
from unit_fast.data.generated.world import generate
from unit_fast.data.layout import PLACES
from unit_fast.errors import UserError
from unit_fast.tasks import TASKS


def by_name(report):
    return {(s.task, s.split): s for s in report.splits}


def kinds(report):
    return {(s.task, s.split, f.severity, f.kind): f.count for s in report.splits for f in s.findings}


def test_a_good_root_is_clean(tmp_path):
    report = check(whole_root(tmp_path))
    assert report.ok, str(report)
    assert {severity for *_, severity, _ in kinds(report)} == {"note"}
    splits = by_name(report)
    assert splits["coco", "train"].samples == 2
    assert splits["coco", "train"].facts["image files"] == 2
    assert splits["coco", "test"].status == "missing"
    assert splits["mnli", "val"].samples == 1
    assert kinds(report)["answers", "", "note", "answer list of another size"] == 1
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_every_oddity_is_counted_with_examples(tmp_path):
    root = whole_root(tmp_path)
    content = coco_file()
    content["images"] += [
        {"id": 30, "file_name": "gone.jpg", "width": 10, "height": 10},
        {"id": 31, "file_name": "../../../../etc/passwd", "width": 10, "height": 10},
        {"id": 32, "file_name": "cut.jpg", "width": 40, "height": 40},
        {"id": 33, "file_name": "text.jpg", "width": 40, "height": 40},
        {"id": 34, "file_name": "other.jpg", "width": 40, "height": 41},
        {"id": 34, "file_name": "twice.jpg", "width": 40, "height": 41},
    ]
    content["annotations"] += [
        *(box(9, 100 + i, 91, [0, 0, 5, 5]) for i in range(5)),
        box(9, 200, 1, [0, 0, -5, 5]),
        box(9, 201, 1, [100, 0, 5, 5]),
        box(9, 202, 1, [0, 0, "x", 5], area=1),
        box(404, 203, 1, [0, 0, 5, 5]),
        box(9, 1, 1, [0, 0, 5, 5]),
    ]
    write(root / "coco/annotations/instances_train2017.json", content)
    images = root / "coco/images/train2017"
    whole = picture(images / "cut.jpg", 40, 40).read_bytes()
    write(images / "cut.jpg", whole[: len(whole) // 2])
    write(images / "text.jpg", "not an image")
    picture(images / "other.jpg", 40, 40)
    expected = {
        ("error", "class id out of range"): 5,
        ("note", "category without a name"): 5,
        ("error", "negative box"): 1,
        ("note", "box without area inside the image"): 1,
        ("note", "box beyond the border, clipped"): 1,
        ("error", "malformed annotation"): 1,
        ("error", "annotation of an unknown image"): 1,
        ("note", "annotation id twice"): 1,
        ("error", "image id twice"): 1,
        ("error", "image missing"): 1,
        ("error", "file name outside the data root"): 1,
        ("error", "image unreadable"): 1,
        ("error", "image of another size than stated"): 1,
    }
    report = check(root)
    assert not report.ok
    found = {(severity, kind): n for (task, split, severity, kind), n in kinds(report).items() if split == "train"
             and task == "coco"}  # fmt: skip
    assert found == expected
    class_ids = next(f for f in by_name(report)["coco", "train"].findings if f.kind == "class id out of range")
    assert len(class_ids.examples) == 3
    assert "annotations[3]: category_id 91 is outside 1..90" in class_ids.examples[0]
    # the file that is cut off is found only by decoding it
    found = {kind: n for (task, _, _, kind), n in kinds(check(root, decode=True)).items() if task == "coco"}
    assert found["image unreadable"] == 2


@pytest.mark.parametrize("decode", [False, True])
def test_photographs_that_viewers_turn_are_counted(tmp_path, decode):
    root = whole_root(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "coco/images/train2017/000000000009.jpg", exif=exif)
    report = check(root, decode=decode)
    assert report.ok
    assert kinds(report)["coco", "train", "note", "image that viewers turn"] == 1


def test_the_summary_prints_and_is_safe_for_a_terminal(tmp_path):
    import rich.console

    root = whole_root(tmp_path)
    content = coco_file()
    content["images"][0]["file_name"] = "\x1b[2J[red]gone[/red].jpg"
    write(root / "coco/annotations/instances_train2017.json", content)
    report = check(root)
    console = rich.console.Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    for text in (console.export_text(), str(report)):
        assert "image missing" in text
        assert "\x1b" not in text
        assert "[red]gone[/red].jpg" in text
        assert "NOT usable as it is: 1 errors" in text


BREAKAGES = ["", "{", "[]", "{}", "null", "[1]", '{"images": 1}', "\x00" * 50, '{"images": [], "a": NaN}']


@pytest.mark.parametrize("content", BREAKAGES, ids=range(len(BREAKAGES)))
def test_any_file_may_be_broken(tmp_path, content):
    """Every annotation file of the root in turn holds nonsense: never an exception, and the rest is still read."""
    root = whole_root(tmp_path)
    files = [p for p in root.rglob("*") if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    assert len(files) > 15
    healthy = {key for key, s in by_name(check(root)).items() if s.samples}
    for path in files:
        kept = path.read_bytes()
        write(path, content)
        report = check(root)
        usable = {key for key, s in by_name(report).items() if s.samples}
        assert len(healthy - usable) <= 12, path
        assert not report.ok, path
        path.write_bytes(kept)
    assert {key for key, s in by_name(check(root)).items() if s.samples} == healthy


def test_random_damage_is_never_an_exception(tmp_path):
    root = whole_root(tmp_path)
    files = [p for p in root.rglob("*") if p.is_file()]
    rng = random.Random(0)
    for _ in range(60):
        path = rng.choice(files)
        kept = path.read_bytes()
        raw = bytearray(kept)
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(bytes(raw[: rng.randint(1, len(raw))]))
        report = check(root, decode=True)
        json.dumps(report.to_dict())
        str(report)
        path.write_bytes(kept)


@pytest.mark.parametrize("imdb", [False, True])
def test_the_generated_world_is_clean(tmp_path, imdb):
    world = generate(tmp_path / "world", seed=1, scale=0.01, imdb=imdb)
    report = check(tmp_path / "world", decode=True)
    assert report.ok, str(report)
    assert set(kinds(report)) <= {("answers", "", "note", "answer list of another size")}, str(report)
    names = {task.name: task.short for task in TASKS.values()}
    for task, splits in world["counts"].items():
        for split, samples in splits.items():
            assert by_name(report)[names[task], split].samples == samples, (task, split)


def test_data_sets_that_are_not_there_are_no_errors(tmp_path):
    report = check(coco_root(tmp_path))
    assert report.ok, str(report)
    assert {s.status for s in report.splits} == {"ok", "missing"}
    # but a text data set without the vocabulary is
    write(tmp_path / "glue/SST-2/train.tsv", "sentence\tlabel\na\t1\n")
    report = check(tmp_path)
    assert not report.ok
    assert "vocabulary not found" in str(report)


def test_nothing_there(tmp_path):
    report = check(tmp_path)
    assert not report.ok
    assert "no usable data found" in str(report)
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "none")


def test_places_are_relative_and_keys_unique_in_meaning():
    for key, places in PLACES.items():
        assert places, key
        assert not any(place.startswith(("/", "..")) for place in places), key
        assert len(set(places)) == len(places), key


@needs_real
def test_the_real_sample_is_clean_but_for_one_question():
    report = check(REAL, decode=True)
    assert report.ok, str(report)
    assert kinds(report) == {("vqa2", "train", "note", "question whose answers are all outside the list"): 1}
    samples = {key: s.samples for key, s in by_name(report).items() if s.samples}
    assert samples == {
        ("coco", "train"): 60, ("coco", "val"): 40, ("vg", "train"): 4, ("vqa2", "train"): 53, ("vqa2", "test"): 13,
        ("snli_ve", "train"): 16, ("sst2", "train"): 1000, ("sst2", "val"): 872, ("qnli", "train"): 320,
        ("qnli", "val"): 700, ("qqp", "train"): 160, ("qqp", "val"): 160, ("mnli", "train"): 240, ("mnli", "val"): 5,
    }  # fmt: skip
