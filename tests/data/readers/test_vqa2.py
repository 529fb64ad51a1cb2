"""VQA v2: soft scores, answer lists, the official files and the imdb arrays."""

import json

import numpy as np
import pytest

from tests.data_roots import REAL, REAL_DATA, needs_real, opened, task_config, whole_root, write
from unit_fast.data import BadImage, MissingSplit, collate, open_dataset
from unit_fast.data.readers.vqa2 import indices, normalise_answer, read_answers, soft_scores
from unit_fast.errors import UserError


@pytest.mark.parametrize(("count", "score"), [(0, None), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_soft_scores_are_those_of_the_table(count, score):
    got = soft_scores(["cat"] * count + [f"other {i}" for i in range(10 - count)], {"cat": 5})
    assert got == ({} if score is None else {5: pytest.approx(score)})


def test_soft_scores_by_the_definition():
    """SPEC 4.5 restated with annotators one by one."""
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d", "unknown"]
    index_of = {"a": 1, "b": 2, "c": 3, "d": 4}
    for _ in range(300):
        said = [names[i] for i in rng.integers(0, 5, rng.integers(1, 11))]
        ten = list(said)
        while len(ten) < 10:
            ten.append(said[len(ten) % len(said)])
        expected = {}
        for answer in set(ten) & set(index_of):
            scores = [min(1, sum(o == answer for j, o in enumerate(ten) if j != i) / 3) for i in range(10)]
            expected[index_of[answer]] = sum(scores) / 10
        assert soft_scores(said, index_of) == pytest.approx(expected)


def test_few_answers_are_repeated_to_ten():
    index_of = {"a": 1, "b": 2, "c": 3}
    assert soft_scores(["a"], index_of) == {1: 1.0}
    assert soft_scores(["a", "b"], index_of) == {1: 1.0, 2: 1.0}
    # a b c a b c a b c a: 4, 3, 3
    assert soft_scores(["a", "b", "c"], index_of) == pytest.approx({1: 1.0, 2: 0.9, 3: 0.9})
    assert soft_scores([], index_of) == {}


def test_answers_are_normalised():
    assert normalise_answer(" Yes, it's the dog's? ") == "yes it 's the dog 's"
    assert soft_scores(["YES", "yes?", "Yes ", "y,es"] + ["no"] * 6, {"yes": 1})[1] == pytest.approx(1.0)


def test_the_list_is_normalised_as_the_answers_are():
    index_of = indices(["<unk>", "men's", "1,000", "What?", "?", "yes", "man 's", "man's"])
    for said, index in (("men's", 1), ("MEN's?", 1), ("1000", 2), ("1,000", 2), ("what", 3), ("yes", 5)):
        assert soft_scores([said] * 10, index_of) == {index: pytest.approx(1.0)}, said
    # two entries of one normal form: each spelling is its own
    assert soft_scores(["man's"] * 5 + ["man 's"] * 5, index_of) == {7: pytest.approx(1.0), 6: pytest.approx(1.0)}
    assert soft_scores([""] * 10, index_of) == {}


@needs_real
def test_every_published_answer_can_be_given():
    answers = read_answers(REAL / "vqa2/trainval_label2ans.json", 3129)
    index_of = indices(answers)
    assert sum("'s" in answer for answer in answers) == 12
    for index, answer in enumerate(answers[1:], 1):
        assert soft_scores([answer] * 10, index_of) == {index: pytest.approx(1.0)}


@pytest.mark.parametrize("first", ["", "<unk>"])
@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_answer_lists_in_both_forms(tmp_path, first, suffix):
    answers = [first, "yes", "no"]
    content = json.dumps(answers) if suffix == "json" else "\n".join(answers) + "\n"
    assert read_answers(write(tmp_path / f"answers.{suffix}", content), 3) == answers


def test_answer_lists_that_do_not_fit(tmp_path):
    assert read_answers(write(tmp_path / "map.json", {"no": 2, "": 0, "yes": 1}), 3) == ["", "yes", "no"]
    for name, content, message in (
        ("a.json", ["", "yes"], r"a.json: 2 answers, but the model has 4 outputs"),
        ("b.txt", "yes\nno\nmaybe\n", r"b.txt: 3 answers, .*first line should be <unk>"),
        ("c.json", ["yes", "no", "a", "b"], "first answer is 'yes'; index 0 must be <unk>"),
        ("d.json", ["", "no", "no", "b"], "'no' stands twice"),
        ("e.json", {"": 0, "a": 1, "b": 1, "c": 2}, "indices are not 0..3"),
        ("f.json", {"": False, "a": 1, "b": 2, "c": 3}, "indices are not 0..3"),
        ("g.json", [1, 2, 3, 4], "expected a list of answers"),
        ("h.json", 3, "expected a list of answers"),
    ):
        with pytest.raises(UserError, match=message):
            read_answers(write(tmp_path / name, content), 4)
    with pytest.raises(UserError, match="no answers"):
        read_answers(write(tmp_path / "i.json", []), None)


def test_questions_are_split_by_coco_2017(tmp_path):
    root = whole_root(tmp_path)
    train, val = (opened("vqa2", root, split) for split in ("train", "val"))
    assert (train.sample_id(0), val.sample_id(0)) == (9000, 100000)
    sample = train.get(0)
    assert sample["answer_scores"].tolist() == [0.0, 1.0, pytest.approx(0.3), 0.0]
    assert sample["image"].shape == (3, 40, 60)
    assert sample["text"] == "is it?"
    assert sample["image_path"].endswith("COCO_train2014_000000000009.jpg")
    assert sample["image_id"] == 9
    assert train.answers == ["", "yes", "no", "2"]
    batch = collate("vqa2", [sample, val.get(0)])
    assert batch.answer_scores.shape == (2, 4)
    # a train2014 question on an image of val2017 belongs to val
    coco = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    coco["images"][0]["id"] = 9
    coco["annotations"] = []
    write(root / "coco/annotations/instances_val2017.json", coco)
    assert opened("vqa2", root, "val").sample_id(0) == 9000
    assert opened("vqa2", root).sample_id(0) == 100000


def test_without_the_list_the_files_names_split(tmp_path):
    root = whole_root(tmp_path)
    (root / "coco/annotations/instances_val2017.json").unlink()
    assert opened("vqa2", root, "val").sample_id(0) == 100000
    assert "names" in opened("vqa2", root, "val").facts["split by"]


def test_questions_without_answers_can_only_be_predicted(tmp_path):
    root = whole_root(tmp_path)
    (root / "vqa2/v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(MissingSplit, match="questions without answers: 1"):
        opened("vqa2", root, "val")
    test = opened("vqa2", root, "test")
    assert test.sample_id(0) == 100000
    assert "answer_scores" not in test.get(0)
    write(
        root / "vqa2/v2_OpenEnded_mscoco_test2015_questions.json",
        {"questions": [{"image_id": 5, "question_id": 50, "question": "a?"}]},
    )
    test = opened("vqa2", root, "test")
    assert test.sample_id(0) == 50
    with pytest.raises(BadImage, match="COCO_test2015_000000000005.jpg: no such file"):
        test.get(0)


def test_the_2017_folders_serve_for_2014(tmp_path):
    root = whole_root(tmp_path)
    (root / "coco/images/train2014/COCO_train2014_000000000009.jpg").unlink()
    assert opened("vqa2", root).get(0)["image_path"].endswith("train2017/000000000009.jpg")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("v2_OpenEnded_mscoco_train2014_questions", {"question": 7}, "questions[0]: question must be text, found 7"),
        ("v2_OpenEnded_mscoco_train2014_questions", {"image_id": "9"}, "image_id must be an integer"),
        ("v2_OpenEnded_mscoco_train2014_questions", {"image_id": -1}, "image_id -1 is not a COCO image id"),
        ("v2_OpenEnded_mscoco_train2014_questions", {"image_id": 8}, "image_id 8, but its annotation says 9"),
        ("v2_mscoco_train2014_annotations", {"answers": []}, "answers is empty"),
        ("v2_mscoco_train2014_annotations", {"answers": [{"answer": None}]}, "answer must be text"),
        ("v2_mscoco_train2014_annotations", {"answers": ["yes"]}, "must be an object with keys"),
    ],
)
def test_wrong_vqa_records(tmp_path, file, change, message):
    root = whole_root(tmp_path)
    path = root / f"vqa2/{file}.json"
    content = json.loads(path.read_text())
    next(iter(content.values()))[0].update(change)
    write(path, content)
    with pytest.raises(UserError) as info:
        opened("vqa2", root)
    assert message in str(info.value)
    assert file in str(info.value)


def imdb(image_id, part="train2014", **more):
    return {
        "image_id": image_id, "image_name": f"COCO_{part}_{image_id:012d}", "question_id": image_id * 10,
        "question": "wrong", "question_str": "is it?", **more,
    }  # fmt: skip


def save(path, records):
    np.save(path, np.array(records, dtype=object), allow_pickle=True)


def test_imdb_files_are_the_splits_when_they_are_there(tmp_path):
    root = whole_root(tmp_path)
    header = {"version": 1, "dataset_name": "vqa2"}
    save(
        root / "vqa2/imdb_train2017.npy",
        [
            header,
            imdb(9, answers=["yes"] * 10),
            imdb(100, "val2014", valid_answers=["no"], all_answers=["yes"]),
            imdb(9, question_id=np.int64(7), all_answers=["2<copy>"]),
        ],
    )
    save(root / "vqa2/imdb_vg_karpathytrain_not_in_val2017.npy", [header, imdb(9, question_id=77, answers=["2", "x"])])
    save(root / "vqa2/imdb_val2017.npy", [imdb(100, "val2014", answers=["yes"]), imdb(9, question_id=3, answers=[])])
    save(root / "vqa2/imdb_test2015.npy", [header, imdb(9, answers=["yes"])])
    train = opened("vqa2", root)
    assert [train.sample_id(i) for i in range(len(train))] == [90, 1000, 7, 77]
    scores = [train.get(i)["answer_scores"].tolist() for i in range(4)]
    assert scores == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert train.get(1)["image_path"].endswith("COCO_val2014_000000000100.jpg")
    assert train.get(0)["text"] == "is it?"
    val = opened("vqa2", root, "val")
    assert len(val) == 1
    assert val.findings.count("question without answers") == 1
    assert "answer_scores" not in opened("vqa2", root, "test").get(0)
    for wrong, message in (
        ({"image_name": "../../etc/passwd"}, "is not like COCO_train2014"),
        ({"answers": "yes"}, "answers must be a list"),
        ({"answers": [1]}, "must be a list of texts"),
        ({"question_id": "1"}, "question_id must be an integer"),
    ):
        save(root / "vqa2/imdb_train2017.npy", [header, {**imdb(9, answers=["yes"]), **wrong}])
        with pytest.raises(UserError, match="imdb_train2017.npy: record 0") as info:
            opened("vqa2", root)
        assert message in str(info.value)


@needs_real
def test_real_vqa():
    dataset = open_dataset("vqa2", "train", REAL_DATA, task_config("vqa2"), augment=False)
    assert len(dataset) == 53
    assert dataset.facts["questions without answers"] == 13
    with pytest.raises(MissingSplit, match="unit-fast data check"):
        open_dataset("vqa2", "val", REAL_DATA, task_config("vqa2"), augment=False)
    assert len(open_dataset("vqa2", "test", REAL_DATA, task_config("vqa2"), augment=False)) == 13
    with pytest.raises(UserError, match="trainval_label2ans.json: 3129 answers, but the model has 100 outputs"):
        open_dataset("vqa2", "train", REAL_DATA, task_config("vqa2", outputs=100), augment=False)
    annotations = json.loads((REAL / "vqa2/v2_mscoco_train2014_annotations.json").read_text())["annotations"]
    by_question = {a["question_id"]: a for a in annotations}
    found = 0
    for i in range(len(dataset)):
        scores = dataset.get(i)["answer_scores"]
        assert scores[0] == 0
        best = by_question[dataset.sample_id(i)]["multiple_choice_answer"]
        if best in dataset.answers:
            found += 1
            assert scores[dataset.answers.index(best)] == scores.max() > 0
    assert found == 47
