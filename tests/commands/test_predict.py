"""``unit-fast predict``: one image or many, what it prints and writes, and how it ends."""

import json

import pytest
from PIL import Image

from tests.data_roots import picture, write
from tests.prediction.common import make_run
from unit_fast.commands import main as cli
from unit_fast.commands.command_line import split_lists


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, tmp_path_factory.mktemp("data"))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Three images, the second of them broken."""
    for n in (1, 2, 3):
        picture(tmp_path / "in" / f"{n}.jpg", 60, 40, seed=n)
    (tmp_path / "in" / "2.jpg").write_bytes(b"broken")
    return tmp_path / "in"


def predict(capsys, run, *arguments) -> tuple[int, str, str]:
    code = cli.main(["predict", str(run), *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_folder_is_shown_image_by_image_and_the_broken_one_is_named(capsys, run, folder, tmp_path):
    out = tmp_path / "drawn"
    code, said, errors = predict(capsys, run, "--task", "coco", "--image", folder, "--threshold", 0, "--save", out)
    assert code == 1
    assert [line for line in said.splitlines() if line.startswith("[")] == [
        f"[{n}/3] {folder}/{n}.jpg" for n in (1, 2, 3)
    ]
    assert "2.jpg: not a JPEG or PNG image" in said
    assert "1 of 3 have no answer" in errors
    assert sorted(path.name for path in out.iterdir()) == ["1.jpg", "3.jpg"]
    for path in out.iterdir():
        assert Image.open(path).size == (800, 533)


@pytest.mark.parametrize("form", ["twice", "pattern", "expanded", "mixed"])
def test_images_given_in_any_way_are_all_predicted(capsys, run, folder, form):
    first, third = folder / "1.jpg", folder / "3.jpg"
    given = {
        "twice": ["--image", first, "--image", third],
        "pattern": ["--image", f"{folder}/[13].jpg"],
        "expanded": ["--image", first, third],
        "mixed": ["--image", f"{folder}/1*", f"--image={third}"],
    }[form]
    code, said, _ = predict(capsys, run, *given, "--task", "coco", "--json")
    assert code == 0
    assert [found["image"] for found in json.loads(said)] == [str(first), str(third)]


def test_json_and_coco_files(capsys, run, folder, tmp_path):
    values, results = tmp_path / "x.json", tmp_path / "r.json"
    code, said, errors = predict(
        capsys, run, "--task", "coco", "--image", folder, "--threshold", 0, "--json", values, "--coco", results,
        "--batch", 1, "--threads", 1,
    )  # fmt: skip
    assert code == 1
    assert "label" in said, "the table is still printed"
    assert f"written: {values}" in errors
    one, broken, three = json.loads(values.read_text())
    assert one["image"] == f"{folder}/1.jpg"
    assert (one["width"], one["height"]) == (60, 40)
    assert "not a JPEG" in broken["error"]
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == {1, 3}
    assert len(rows) == len(one["predictions"]) + len(three["predictions"])
    images = [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in (1, 2, 3)]
    truth = write(tmp_path / "truth.json", {"images": images})
    predict(
        capsys, run, "--task", "coco", "--image", folder, "--threshold", 0, "--coco", results, "--annotations", truth
    )
    assert {row["image_id"] for row in json.loads(results.read_text())} == {11, 13}


def test_one_image_gives_one_object(capsys, run, folder, tmp_path):
    code, said, _ = predict(capsys, run, "--task", "coco", "--image", folder / "1.jpg", "--json")
    assert code == 0
    assert json.loads(said)["image"] == f"{folder}/1.jpg"
    code, said, _ = predict(capsys, run, "--task", "coco", "--image", folder / "1.jpg", "--json", tmp_path / "x.json")
    assert code == 0
    assert json.loads((tmp_path / "x.json").read_text())["task"] == "coco"


def test_texts_from_a_file(capsys, run, folder, tmp_path):
    questions = write(tmp_path / "q.txt", "is it?\nwhat is there?\n")
    code, said, _ = predict(capsys, run, "--task", "vqa2", "--image", folder / "1.jpg", "--texts", questions, "--json")
    assert code == 0
    assert [found["text"] for found in json.loads(said)] == ["is it?", "what is there?"]
    code, said, _ = predict(capsys, run, "--task", "sst2", "--text", "dull", "--text", "a fine film")
    assert code == 0
    assert "[1/2] dull\n" in said
    code, said, _ = predict(capsys, run, "--task", "qnli", "--texts", write(tmp_path / "p.tsv", "a\tb\n"))
    assert code == 0
    assert "[1/1] a | b\n" in said


def test_the_runs_own_threshold_is_taken_and_said(capsys, run, folder):
    (run / "thresholds.json").write_text(json.dumps({"detection_coco": {"threshold": 0.0}}))
    try:
        code, said, errors = predict(capsys, run, "--task", "coco", "--image", folder / "1.jpg")
        assert "boxes of at least 0, as the run chose on its validation split" in errors
        assert said.startswith("label ")
        code, said, errors = predict(capsys, run, "--task", "coco", "--image", folder / "1.jpg", "--threshold", 1)
        assert "boxes of at least" not in errors
        assert said == "no object above the threshold\n"
        assert "the likeliest box has 0." in errors
    finally:
        (run / "thresholds.json").unlink()


def test_unknown_words_warn(capsys, run, caplog):
    code, _, _ = predict(capsys, run, "--task", "sst2", "--text", "a \u5b57 film")
    assert code == 0
    assert "does not have '\u5b57'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--task", "coco", "--image", "FOLDER/2.jpg"], "2.jpg: not a JPEG or PNG image"),
        (["--task", "coco", "--image", "https://example.org/x.jpg"], "addresses are not fetched; download it"),
        (["--task", "coco", "--image", "FOLDER/none*"], "no file is called like this"),
        (["--task", "coco", "--image", "FOLDER", "--save", "FOLDER/x.png"], "give a folder"),
        (["--task", "coco", "--image", "FOLDER", "--coco", "FOLDER/no/x.json"], "there is no such folder; make it"),
        (["--task", "coco", "--image", "FOLDER", "--json", "FOLDER/no/x.json"], "there is no such folder; make it"),
        (["--task", "coco", "--image", "FOLDER", "--annotations", "x"], "gives ids to --coco FILE"),
        (["--task", "coco", "--image", "FOLDER", "--batch", "0"], "batch_size: 0 is below 1"),
        (["--task", "sst2", "--text", "a", "--coco", "x.json"], "sst2 has no boxes"),
        (["--task", "sst2", "--text", "a", "--texts", "x"], "give one of them"),
        (["--task", "sst2", "--texts", "FOLDER/absent.txt"], "absent.txt: cannot be read"),
        (["--task", "coco", "--image"], "--image"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(capsys, run, folder, arguments, text):
    before = sorted(folder.iterdir())
    code, _, errors = predict(capsys, run, *[a.replace("FOLDER", str(folder)) for a in arguments])
    lines = [line for line in errors.splitlines() if not line.startswith("WARNING")]
    assert (code, len(lines)) == (2, 1), errors
    assert text in lines[0]
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("RUN --image a b --task coco", "RUN --image a --image b --task coco"),
        ("RUN --image a --image b", "RUN --image a --image b"),
        ("RUN --image=a --json", "RUN --image=a --json"),
        ("--image a RUN --task coco", "--image a RUN --task coco"),
        ("RUN --image", "RUN --image"),
        ("RUN --image --json", "RUN --image --json"),
        ("RUN --json x.json --task coco", "RUN --json-file x.json --task coco"),
        ("RUN --json=x.json", "RUN --json-file=x.json"),
        ("--json RUN --task coco", "--json RUN --task coco"),
        ("RUN --freeze image,text --json", "RUN --freeze image text --json"),
    ],
)
def test_what_the_shell_hands_over_is_sorted(given, expected):
    assert split_lists(given.split()) == expected.split()
