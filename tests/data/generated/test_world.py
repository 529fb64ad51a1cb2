"""The generated world: real formats, the same bytes for the same seed, and nothing to be guessed from the text."""

import dataclasses
import hashlib
import io
import json
import math
import random
import re

import pytest
from PIL import Image

from unit_fast.config import ALL_TASKS, DataConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.data.generated import glue as synthetic_glue
from unit_fast.data.generated import scene as synthetic_scene
from unit_fast.data.generated import text as synthetic_text
from unit_fast.data.generated.world import COCO_CATEGORIES, MARKER, VG_ATTRIBUTE_IDS, VG_OBJECT_IDS, generate
from unit_fast.errors import UserError

SCALE = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "w"
    return folder, generate(folder, seed=3, scale=SCALE)


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _open(folder, name, split, **data):
    tasks = default_tasks(*ALL_TASKS)
    tasks["vqa2"] = dataclasses.replace(tasks["vqa2"], outputs=len(synthetic_text.ANSWERS))
    config = DataConfig(root=str(folder), short_side=64, max_side=128, train_short_sides=(64,), augment=False, **data)
    return open_dataset(name, split, config, tasks[name], augment=False)


@pytest.mark.parametrize("task", list(default_tasks(*ALL_TASKS)))
def test_the_readers_open_both_splits(world, task):
    folder, summary = world
    for split in ("train", "val"):
        dataset = _open(folder, task, split)
        assert len(dataset) == summary["counts"][task][split] > 0
        ids = [dataset.sample_id(i) for i in range(len(dataset))]
        assert len(set(ids)) == len(ids)
        for i in range(0, len(dataset), 17):
            assert dataset.get(i, None)["sample_id"] == ids[i]


def test_detection_files_load_with_pycocotools_and_their_boxes_are_inside(world):
    from pycocotools.coco import COCO

    folder, _ = world
    paths = list(folder.glob("coco/annotations/*.json")) + list(folder.glob("visual_genome/annotations/*.json"))
    assert len(paths) == 4
    for path in paths:
        coco = COCO(str(path))
        images, annotations = coco.loadImgs(coco.getImgIds()), coco.loadAnns(coco.getAnnIds())
        assert len({a["id"] for a in annotations}) == len(_read(path)["annotations"])
        valid = VG_OBJECT_IDS.values() if "genome" in str(path) else COCO_CATEGORIES.values()
        assert set(coco.getCatIds()) == set(valid)
        assert {a["category_id"] for a in annotations} == set(valid)
        for a in annotations:
            x, y, w, h = a["bbox"]
            image = coco.imgs[a["image_id"]]
            assert 0 <= x < x + w <= image["width"] == synthetic_scene.SIDE
            assert 0 <= y < y + h <= image["height"] == synthetic_scene.SIDE
            assert a["iscrowd"] or (min(w, h) > 9 and a["area"] > 0)
            if "segmentation" in a:
                assert abs(coco.annToMask(a).sum() - a["area"]) <= 0.15 * a["area"] + 4
            else:
                filled = [v for v in a["attribute_ids_max16"] if v != -1]
                assert len(a["attribute_ids_max16"]) == 16
                assert set(filled) <= set(VG_ATTRIBUTE_IDS.values())
                assert len(filled) == 2
        assert {a["iscrowd"] for a in annotations} == ({0} if "genome" in str(path) else {0, 1}) or "val" in path.name
        folder_of = folder / ("visual_genome/images" if "genome" in str(path) else f"coco/images/{path.stem[10:]}")
        for image in images:
            with Image.open(folder_of / image["file_name"]) as picture:
                assert (picture.format, picture.size) == ("JPEG", (image["width"], image["height"]))


def test_boxes_are_where_the_shapes_are(monkeypatch):
    """The drawn shape, found again by its brightness against a dark ground, has the annotated box."""
    import numpy as np

    monkeypatch.setitem(synthetic_scene.GROUNDS, "black", (34, 34, 38))
    for i in range(60):
        scene = synthetic_scene.draw_scene(random.Random(i))
        for thing in scene.things:
            alone = dataclasses.replace(scene, things=(thing,), ground="black")
            pixels = np.asarray(Image.open(io.BytesIO(synthetic_scene.render(alone))), dtype=float)
            hit = pixels.max(-1) > 125
            edge = synthetic_scene.FRAME + 1  # and what JPEG smears of it
            hit[:edge] = hit[-edge:] = hit[:, :edge] = hit[:, -edge:] = False
            rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            x, y, w, h = thing.box
            assert max(abs(a - b) for a, b in zip(found, (x, y, x + w, y + h))) < 2.5, (i, thing)


def test_both_forms_of_visual_genome_say_the_same(world):
    folder, _ = world
    graphs = {g["image_id"]: g for g in _read(folder / "visual_genome/scene_graphs.json")}
    lines = {}
    for name in ("objects", "attributes"):
        text = (folder / f"visual_genome/1600-400-20/{name}_vocab.txt").read_text()
        lines[name] = {word: i + 1 for i, line in enumerate(text.splitlines()) for word in line.split(",")}
    data = {d["image_id"]: d for d in _read(folder / "visual_genome/image_data.json")}
    val_ids = {i["id"] for i in _read(folder / "coco/annotations/instances_val2017.json")["images"]}
    number = 0
    for split in ("train", "val"):
        content = _read(folder / f"visual_genome/annotations/instances_{split}_split_by_coco_2017.json")
        for image in content["images"]:
            assert (data[image["id"]]["coco_id"] in val_ids) == (split == "val")
        for a in content["annotations"]:
            item = next(o for o in graphs[a["image_id"]]["objects"] if o["object_id"] == a["id"])
            assert a["bbox"] == [item["x"], item["y"], item["w"], item["h"]]
            assert a["category_id"] == lines["objects"][item["names"][0]]
            assert a["attribute_ids_max16"][:2] == [lines["attributes"][word] for word in item["attributes"]]
            number += 1
    assert number == sum(len(g["objects"]) for g in graphs.values())


def test_scene_graphs_alone_give_the_same_samples(world, tmp_path):
    folder, _ = world
    (tmp_path / "visual_genome").mkdir()
    for name in ("images", "1600-400-20", "scene_graphs.json", "image_data.json"):
        (tmp_path / "visual_genome" / name).symlink_to(folder / "visual_genome" / name)
    (tmp_path / "coco").symlink_to(folder / "coco")
    for split in ("train", "val"):
        ours = _open(folder, "detection_visual_genome", split)
        other = _open(
            tmp_path, "detection_visual_genome", split, paths={"vg.images": str(folder / "visual_genome/images")}
        )
        assert len(ours) == len(other)
        a, b = ours.get(5, None), other.get(5, None)
        assert a["image_id"] == b["image_id"]
        for key in ("image", "boxes", "labels", "attributes"):
            assert a[key].equal(b[key]), key


def test_imdb_arrays_hold_the_same_questions(world, tmp_path):
    folder, _ = world
    generate(tmp_path / "w", seed=3, scale=SCALE, imdb=True)
    assert not list((tmp_path / "w/vqa2").glob("*questions.json"))
    for split in ("train", "val"):
        ours, other = _open(folder, "vqa2", split), _open(tmp_path / "w", "vqa2", split)
        assert len(ours) == len(other)
        for i in (0, 7, 31):
            a, b = ours.get(i, None), other.get(i, None)
            assert (a["sample_id"], a["text"]) == (b["sample_id"], b["text"])
            assert a["answer_scores"].equal(b["answer_scores"])


def test_every_text_is_made_of_words_of_the_vocabulary(world):
    folder, _ = world
    vocabulary = (folder / "bert/vocab.txt").read_text().splitlines()
    assert tuple(vocabulary) == synthetic_text.VOCABULARY
    assert len(set(vocabulary)) == len(vocabulary) < 400
    assert vocabulary[0] == "[PAD]"
    for task in ("vqa2", "visual_entailment", "glue_qnli", "glue_mnli_mismatched", "glue_qqp", "glue_sst2"):
        dataset = _open(folder, task, "train")
        for i in range(len(dataset)):
            text = dataset.get(i, None)["text"] if "glue" in task else None
            text = text if text is not None else (dataset.questions[i] if task == "vqa2" else "")
            words = re.findall(r"\w+|[^\w\s]", (text if isinstance(text, str) else " ".join(text)).lower())
            assert set(words) <= set(vocabulary)
    rows = [json.loads(line) for line in (folder / "snli_ve/snli_ve_train.jsonl").read_text().splitlines()]
    words = {word for row in rows for word in re.findall(r"\w+|[^\w\s]", (row["sentence1"] + row["sentence2"]).lower())}
    assert words <= set(vocabulary)


def test_scenes_have_one_to_three_shapes_and_every_kind_colour_and_size():
    scenes = [synthetic_scene.draw_scene(random.Random(i)) for i in range(600)]
    counts = [len(scene.things) for scene in scenes]
    assert set(counts) == set(range(1, synthetic_scene.MOST + 1))
    assert min(counts.count(n) for n in set(counts)) > 0.1 * len(scenes), "each number can be asked for"
    things = [thing for scene in scenes for thing in scene.things]
    assert {t.kind for t in things} == set(synthetic_scene.KINDS) == set(VG_OBJECT_IDS)
    assert {t.color for t in things} == set(synthetic_scene.COLORS) == set(COCO_CATEGORIES)
    assert {t.size for t in things} == set(synthetic_scene.SIZES)
    assert min(min(t.box[2:]) for t in things) > 9, "an error of three pixels along a side w leaves (w-3)/(w+3) >= 0.5"


def test_answers_are_true_of_the_scenes():
    """Checked from the scene again, independently of how the question was made."""
    rng, kinds_seen = random.Random(5), set()
    for i in range(1500):
        scene = synthetic_scene.draw_scene(random.Random(i))
        asked = rng.choice(list(synthetic_text.QUESTION_KINDS))
        found = synthetic_text.ask(rng, scene, asked)
        if found is None:
            continue
        question, answer = found[:2]
        assert answer in synthetic_text.ANSWERS
        kinds_seen.add(asked)
        words = question.lower().rstrip("?").split()
        mentioned = [k for k in synthetic_scene.KINDS if k in words or synthetic_text.plural(k) in words]
        colors = [c for c in synthetic_scene.COLORS if c in words]
        match = [
            t
            for t in scene.things
            if (not mentioned or t.kind in mentioned) and (not colors or t.color in colors)
        ]  # fmt: skip
        if asked == "color of kind":
            assert {t.color for t in match} == {answer}
        elif asked == "kind of color":
            assert {t.kind for t in match} == {answer}
        elif asked in ("pair", "kind", "color"):
            assert answer == ("yes" if match else "no")
        elif asked in ("count", "count kind"):
            assert int(answer) == len(match)
        elif asked == "ground":
            assert answer == scene.ground
        else:
            (reference,) = match
            relation = re.search("left of|right of|above|below", question).group()
            axis = 0 if "of" in relation else 1
            sign = -1 if relation in ("left of", "above") else 1
            nearer = [t for t in scene.things if sign * (t.center[axis] - reference.center[axis]) > 0]
            assert answer in {t.kind for t in nearer}
    assert kinds_seen == set(synthetic_text.QUESTION_KINDS)


def test_hypotheses_are_true_or_false_of_the_scenes():
    rng = random.Random(6)
    for i in range(900):
        scene = synthetic_scene.draw_scene(random.Random(i))
        label = ("entailment", "contradiction")[i % 2]
        words = synthetic_text.hypothesis(rng, scene, label).lower().rstrip(".").split()
        kinds = [k for k in synthetic_scene.KINDS if k in words]
        colors = [c for c in synthetic_scene.COLORS if c in words]
        if "background" in words:
            true = scene.ground in words
        elif (numbers := [synthetic_text.NUMBERS.index(w) for w in words if w in synthetic_text.NUMBERS]) != []:
            true = numbers == [len(scene.things)]
        else:
            true = any((not kinds or t.kind in kinds) and (not colors or t.color in colors) for t in scene.things)
        assert true == (label == "entailment")


def test_the_text_alone_does_not_give_the_answer(world):
    _, summary = world
    assert 0.15 < summary["blind"]["vqa2"] < 0.5
    # Neutral texts can be told (one in three), the others are a coin toss: 2/3, and three standard deviations of a few
    # samples. The next test asks the same of many.
    samples = summary["counts"]["visual_entailment"]["val"]
    assert abs(summary["blind"]["snli_ve"] - 2 / 3) < 3 * (2 / 9 / samples) ** 0.5


def test_the_best_guess_from_the_text_stays_low_with_many_samples():
    """Even with the validation answers of each text known, as the number of samples grows."""
    from collections import Counter, defaultdict

    rng, votes = random.Random(0), defaultdict(Counter)
    labels = defaultdict(Counter)
    names, weights = list(synthetic_text.QUESTION_KINDS), list(synthetic_text.QUESTION_KINDS.values())
    for i in range(6000):
        scene = synthetic_scene.draw_scene(random.Random(i))
        found = synthetic_text.ask(rng, scene, rng.choices(names, weights)[0])
        if found:
            votes[found[0]][found[1]] += 1
        label = rng.choice(("entailment", "neutral", "contradiction"))
        labels[synthetic_text.hypothesis(rng, scene, label)][label] += 1
    vqa = sum(c.most_common(1)[0][1] for c in votes.values()) / sum(sum(c.values()) for c in votes.values())
    entailment = sum(c.most_common(1)[0][1] for c in labels.values()) / sum(sum(c.values()) for c in labels.values())
    assert vqa < 0.42
    assert entailment < 0.75


@pytest.mark.parametrize("draw", [synthetic_glue.sst2, synthetic_glue.qnli, synthetic_glue.qqp, "mnli"])
def test_labels_are_balanced(draw):
    rng = random.Random(1)
    function = (lambda r: synthetic_glue.mnli(r, "fiction")) if draw == "mnli" else draw
    labels = [function(rng)[-1] for _ in range(3000)]
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    assert len(shares) == (3 if draw == "mnli" else 2)
    assert max(shares) - min(shares) < 0.06


def test_validation_sentences_are_new_and_their_words_are_not(world):
    folder, _ = world
    columns = {"SST-2": ["sentence"], "QNLI": ["question", "sentence"], "QQP": ["question1", "question2"]}
    columns["MNLI"] = ["sentence1", "sentence2"]

    def rows(path):
        header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
        assert all(len(line) == len(header) for line in lines)
        return header, [dict(zip(header, line)) for line in lines]

    for task, names in columns.items():
        header, train = rows(folder / f"glue/{task}/train.tsv")
        seen = {tuple(r[n] for n in names) for r in train}
        words = {w for texts in seen for text in texts for w in re.findall(r"\w+", text.lower())}
        parts = ("dev_matched", "dev_mismatched") if task == "MNLI" else ("dev",)
        for part in parts:
            dev_header, dev = rows(folder / f"glue/{task}/{part}.tsv")
            assert (len(header), len(dev_header)) == {"MNLI": (12, 16)}.get(task, (len(header), len(header)))
            new = {tuple(r[n] for n in names) for r in dev}
            assert not new & seen
            unseen = {w for texts in new for text in texts for w in re.findall(r"\w+", text.lower())} - words
            assert not unseen
    genres = [{r["genre"] for r in rows(folder / f"glue/MNLI/{part}.tsv")[1]} for part in ("train", "dev_mismatched")]
    assert not genres[0] & genres[1]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(world, tmp_path):
    folder, summary = world
    again = generate(tmp_path / "a", seed=3, scale=SCALE)
    assert {k: v for k, v in again.items() if k != "folder"} == {k: v for k, v in summary.items() if k != "folder"}
    ours = _digest(folder)
    assert _digest(tmp_path / "a") == ours
    generate(tmp_path / "b", seed=4, scale=SCALE)
    other = _digest(tmp_path / "b")
    constant = {"bert/vocab.txt"} | {k for k in ours if "_vocab.txt" in k or "label2ans" in k or "ans2label" in k}
    assert {k for k in ours if other.get(k) == ours[k]} == constant


def test_a_generated_folder_is_replaced_and_a_foreign_one_refused(tmp_path):
    target = tmp_path / "w"
    target.mkdir()
    done = []
    generate(target, seed=1, scale=0.01, progress=lambda *at: done.append(at))
    assert done[-1][0] == done[-1][1] == len(done)
    assert _read(target / MARKER)["seed"] == 1
    generate(target, seed=2, scale=0.01)
    assert _read(target / MARKER)["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["w"]

    (target / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.txt, which unit-fast did not generate.*new or empty folder"):
        generate(target, scale=0.01)
    foreign = tmp_path / "f"
    (foreign / "coco").mkdir(parents=True)
    with pytest.raises(UserError, match="f holds coco, which unit-fast did not generate"):
        generate(foreign, scale=0.01)
    with pytest.raises(UserError, match="is a file; give a folder"):
        generate(target / "mine.txt", scale=0.01)
    assert (target / "mine.txt").read_text() == "precious"


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "w"
    generate(target, seed=1, scale=0.01)
    before = _digest(target)

    def full(done, total):
        if done > 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        generate(target, seed=2, scale=0.01, progress=full)
    assert _digest(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf, "big"])
def test_a_bad_scale_is_one_message(tmp_path, scale):
    with pytest.raises(UserError, match="scale must be a number above 0"):
        generate(tmp_path / "w", scale=scale)
