"""The report: whole and partial runs, hostile text, nothing from outside, and the drawings."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
from PIL import Image

from unit_fast.config import RunConfig, to_json
from unit_fast.errors import UserError
from unit_fast.report import curves, write_report, write_samples
from unit_fast.report.curves import draw_curves, running_mean
from unit_fast.report.html import PUBLISHED, published_values
from unit_fast.report.predictions import chosen, draw_boxes, matched
from unit_fast.report.run import read_run
from unit_fast.tasks import TASKS, get_task

HOSTILE = "</script><img src=x onerror=alert(1)>\"'\x1b[2J\u202e\u2066\x00{{ 7*7 }}"


def make_run(folder, *, tasks=tuple(TASKS), recipe="demo", evaluations=2, text="what is it?", name="cat"):
    """A run folder as training writes it."""
    folder.mkdir(exist_ok=True)
    config = json.loads(to_json(RunConfig(recipe=recipe, steps=100, seed=7)))
    config["model"]["tasks"] = {t: config["model"]["tasks"][t] for t in tasks}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "threads": 2, "versions": {"torch": text}}))
    (folder / "summary.json").write_text(
        json.dumps({"status": "finished", "step": 100, "seconds": 75.2, "bad_images": {"read": 10}})
    )
    (folder / "command.txt").write_text(f"unit-fast train {text}\n", errors="backslashreplace")
    rows = []
    for step in range(5, 101, 5):
        task = tasks[(step // 5) % len(tasks)]
        rows.append(
            {
                "kind": "train", "step": step, "task": task, "loss": 10 / step, "terms": {}, "lr": 1e-4,
                "grad_norm": 2.0, "samples_per_s": 30.0, "data_wait": 0.1, "updates": 5, "nonfinite": 0,
            }
        )  # fmt: skip
    for step in (50, 100)[:evaluations]:
        for key in tasks:
            task = get_task(key)
            value = 0.6 if step == 50 else 0.55
            figures = {task.metric: value, "chance": 0.0 if task.is_detection else 0.25, "count": 40, "loss": 1.5}
            figures |= {"AP50": 0.8} if task.is_detection else {}
            rows.append({"kind": "eval", "step": step, "task": task.short, "weights": "raw", "metrics": figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluations:
        _write_examples(folder, tasks, text, name)
    return folder


def _write_examples(folder, tasks, text, name):
    (folder / "examples").mkdir(exist_ok=True)
    entries = {}
    for task in map(get_task, tasks):
        sample = {"id": 1, "text": [text, text] if task.kind == "glue" else text}
        if task.has_image:
            sample["image"] = f"examples/{task.short}_0.jpg"
            Image.new("RGB", (60, 40), (200, 200, 200)).save(folder / sample["image"])
        if task.is_detection:
            right = {"label": name, "bbox": [5, 5, 20, 20]}
            sample |= {
                "size": [40, 60], "text": None, "truth": [right],
                "prediction": [{**right, "score": 0.9}, {"label": name, "bbox": [30, 5, 20, 20], "score": 0.7}],
            }  # fmt: skip
        else:
            answers = [{"label": name, "score": 0.8}, {"label": "other", "score": 0.2}]
            sample |= {"truth": [{"label": name}], "prediction": answers, "right": True}
        entries[task.short] = {"split": "val", "samples": [sample, {**sample, "right": False}]}
    (folder / "examples.json").write_text(json.dumps(entries))


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.within = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.within.append(tag)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.within:
            self.words.append(data)


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def svg_of(page: Page) -> str:
    source = next(v for tag, name, v in page.attributes if name == "src" and v.startswith("data:image/svg+xml"))
    return base64.b64decode(source.split(",")[1]).decode()


def test_a_whole_run_shows_every_task_with_its_figures(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    for task in TASKS.values():
        assert task.title in page.text
    assert "All 8 evaluated tasks are above chance." in page.text
    assert "0.550" in page.text, "the last figure"
    assert "0.600 step 50" in page.text, "and the best"
    assert "AP50 0.800" in page.text
    assert "1 min 15 s" in page.text
    assert "1 of 1 objects found, 1 wrong box" in page.text
    assert "✓ right" in page.text
    assert "✗ wrong" in page.text
    assert "bad images, read" in page.text
    assert "30 samples/s, 10.0 % of the time waiting" in page.text
    # seed is 7, the default 0
    assert re.search(r"seed 7 0 ", page.text)
    assert page.tags.count("figure") == 4, "two examples of two detection tasks"
    assert (tmp_path / "run" / "curves.svg").read_text().count("<svg") == 1


def test_nothing_comes_from_outside_and_no_script_runs(tmp_path):
    folder = make_run(tmp_path / "run")
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "style", "the policy allows the one style element only"
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:80])
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(v for _, name, v in page.attributes if name == "content" and "default-src" in v)
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"
    for css in (style, svg_of(page), (folder / "curves.svg").read_text()):
        assert not re.search(r"@import|url\((?!#)|<script|<image|<foreignObject|href=\"(?!#)", css)


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    folder = make_run(tmp_path / "run", text=HOSTILE, name=HOSTILE, recipe=HOSTILE)
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    # what gets through is only in the escaped form
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "</script><img src=x onerror=alert(1)>" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert r"\x1b[2J\u202e\u2066\x00" in page.text
    assert "{{ 7*7 }}" in page.text, "text is not a template"
    assert write_samples(folder, 3).is_file()


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("detection_coco", "vqa2"))
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize("tasks", [("glue_sst2",), ("detection_coco",), ("vqa2", "glue_qnli", "glue_qqp")])
def test_few_tasks(tmp_path, tasks):
    page = page_of(make_run(tmp_path / "run", tasks=tasks))
    assert get_task(tasks[0]).title in page.text
    assert ("COCO detection" in page.text) == ("detection_coco" in tasks)


def test_a_run_without_evaluation_says_so(tmp_path):
    page = page_of(make_run(tmp_path / "run", evaluations=0))
    assert "Nothing was evaluated yet." in page.text
    assert page.text.count("not evaluated") >= 8
    assert "examples.json is absent" in page.text
    assert "written by the first evaluation" in page.text
    assert "not evaluated yet" in svg_of(page)


def test_a_run_that_only_has_a_configuration(tmp_path):
    folder = make_run(tmp_path / "run", evaluations=0)
    for name in ("metrics.jsonl", "env.json", "summary.json", "command.txt"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "The run has not trained yet." in page.text
    assert "metrics.jsonl is absent" in page.text
    assert "No training step was logged." in page.text
    assert "no training step" in svg_of(page)


def test_damaged_files_are_said_and_the_rest_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "ta')
    (folder / "env.json").write_text("[1, 2]")
    (folder / "summary.json").write_bytes(b"\xff\xfe")
    (folder / "examples" / "coco_0.jpg").write_bytes(b"no image")
    page = page_of(folder)
    assert "metrics.jsonl: 1 lines could not be used" in page.text
    assert "env.json could not be used: it holds a list" in page.text
    assert "summary.json could not be read" in page.text
    assert "2 images are absent from the run folder" in page.text
    assert "0.550" in page.text


def test_tasks_at_chance_or_without_labels_are_named(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("vqa2", "glue_sst2", "glue_qnli"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "eval" and row["task"] == "sst2":
            row["metrics"]["chance"] = 0.54
        if row["kind"] == "eval" and row["task"] == "qnli":
            row["metrics"] = {"count": 0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    assert "1 of 2 evaluated tasks are above chance; at chance: SST-2. Without a figure: QNLI." in page.text
    assert "no labels in this split" in page.text
    for row in rows:
        if row["kind"] == "eval" and row["task"] == "vqa2":
            row["metrics"]["chance"] = 0.7
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "No task is above chance yet. Without a figure: QNLI." in page_of(folder).text


def test_averaged_weights_do_not_mix_with_the_raw_ones(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("glue_sst2",))
    row = {"kind": "eval", "step": 100, "task": "sst2", "weights": "ema", "metrics": {"accuracy": 0.99, "count": 4}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    page = page_of(folder)
    assert "0.990" not in page.text
    assert "figures of the averaged ones are in metrics.jsonl" in page.text


def test_published_values_stand_beside_a_published_recipe_only(tmp_path):
    page = page_of(make_run(tmp_path / "one", recipe="all8_shared"))
    assert "0.3899" in page.text
    assert "MMF's website" in page.text
    page = page_of(make_run(tmp_path / "other", recipe="demo"))
    assert "Published" not in page.text
    assert published_values({"recipe": "all8_shared_skip"}) == PUBLISHED["all8_shared"]
    assert published_values({"recipe": "all8_separate"}) == {}


def test_published_recipes_exist():
    from unit_fast.recipes import RECIPES

    assert set(PUBLISHED) <= set(RECIPES)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither config.json nor metrics.jsonl"):
        write_report(tmp_path)


def test_images_outside_the_run_folder_are_not_shown(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("detection_coco",))
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    examples = json.loads((folder / "examples.json").read_text())
    for sample, place in zip(examples["coco"]["samples"], ("../secret.jpg", str(tmp_path / "secret.jpg"))):
        sample["image"] = place
    (folder / "examples.json").write_text(json.dumps(examples))
    assert "2 images are absent" in page_of(folder).text


def test_a_running_mean_does_not_lag():
    ramp = [float(i) for i in range(200)]
    assert running_mean(ramp) == pytest.approx(ramp)
    step = running_mean([0.0] * 100 + [1.0] * 100)
    assert step[99] == pytest.approx(1 - step[100])
    assert running_mean([3.0]) == [3.0]
    assert running_mean([]) == []
    spikes = running_mean([float(i % 2) for i in range(400)])
    assert max(abs(x - 0.5) for x in spikes[30:-30]) < 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_curves_of_short_runs_stay_in_the_frame(tmp_path, count, monkeypatch):
    folder = make_run(tmp_path / "run", tasks=("glue_sst2",))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train, last = [row for row in rows if row["kind"] == "train"][:count], [r for r in rows if r["kind"] == "eval"][-1:]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train + last))
    frames = []
    monkeypatch.setattr(curves, "_few_ticks", lambda axis: frames.append(axis))
    draw_curves(read_run(folder))
    axis = frames[0]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    drawn = [point for line in axis.lines for point in zip(*line.get_data())]
    assert len(drawn) > count
    for x, y in drawn:
        assert left <= x < right, "the last marker is whole"
        assert low <= y <= high


def test_pictures_are_enlarged_without_a_script(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    pictures = page.tags.count("img")
    assert page.tags.count("label") == pictures, "every picture is in a label"
    assert sum((tag, name) == ("input", "aria-label") for tag, name, _ in page.attributes) == pictures


def test_people_read_titles_where_files_have_keys(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["ratios"] = dict.fromkeys(TASKS, 0.5)
    (folder / "config.json").write_text(json.dumps(config))
    text = write_report(folder).read_text(encoding="utf-8")
    read = Page(re.sub(r"<details>.*?</details>", "", text, flags=re.S)).text
    assert "ratios: COCO detection" in read
    for name in TASKS:
        assert name not in read or name == "vqa2", name


def test_long_curves_stay_small(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("glue_sst2",))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    lines = (json.dumps({**row, "step": step, "loss": step % 7}) for step in range(1, 20_000))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert len(draw_curves(read_run(folder))) < 200_000


def test_samples_are_drawn_from_the_examples(tmp_path):
    folder = make_run(tmp_path / "run")
    path = write_samples(folder, 1200)
    assert path == folder / "samples" / "step_001200.jpg"
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.width == 4 * 320 + 5 * 8
    assert write_samples(make_run(tmp_path / "text", tasks=("glue_sst2",)), 1) is None
    with pytest.raises(UserError, match="evaluate the run first"):
        write_samples(make_run(tmp_path / "none", evaluations=0), 1)


def test_matching_wants_class_and_overlap_and_meets_a_box_once():
    truth = [{"label": "cat", "bbox": [0, 0, 10, 10]}, {"label": "dog", "bbox": [20, 0, 10, 10]}]
    found = [
        {"label": "cat", "bbox": [0, 0, 10, 10]},
        {"label": "cat", "bbox": [0, 0, 10, 9]},
        {"label": "cat", "bbox": [20, 0, 10, 10]},
        {"label": "dog", "bbox": [26, 0, 10, 10]},
    ]
    assert matched(truth, found) == ([True, False], [True, False, False, False])
    # 8 x 10 of 12 x 10
    assert matched(truth, [{"label": "dog", "bbox": [22, 0, 10, 10]}]) == ([False, True], [True])


def test_the_likeliest_boxes_are_drawn_where_none_is_likely():
    assert scores_of(chosen(apart(0.1, 0.4, 0.3, 0.2))) == [0.4, 0.3, 0.2]
    assert scores_of(chosen(apart(0.1, 0.4, 0.3, 0.2, 0.6))) == [0.6]


def apart(*scores):
    """Boxes that do not touch each other."""
    return [{"label": "cat", "bbox": [20 * i, 0, 10, 10], "score": score} for i, score in enumerate(scores)]


def scores_of(boxes):
    return [box["score"] for box in boxes]


def test_boxes_are_drawn_from_the_chosen_threshold_on():
    assert scores_of(chosen(apart(0.1, 0.4, 0.3, 0.2), 0.3)) == [0.4, 0.3]
    assert scores_of(chosen(apart(0.6, 0.7), 0.65)) == [0.7]
    assert chosen(apart(0.6, 0.7), 0.8) == [], "nothing is likely enough, and nothing is drawn"


def test_an_object_is_drawn_once():
    box = {"label": "cat", "bbox": [0, 0, 10, 10], "score": 0.8}
    again, beside = {**box, "bbox": [1, 0, 10, 10], "score": 0.7}, {**box, "bbox": [5, 0, 10, 10], "score": 0.6}
    assert chosen([again, box, beside]) == [box, beside]
    assert chosen([{**again, "label": "dog"}, box]) == [box, {**again, "label": "dog"}]


def test_the_threshold_of_a_run_is_said_and_used(tmp_path):
    folder = make_run(tmp_path / "run", tasks=("detection_coco", "detection_visual_genome"))
    before = page_of(folder).text
    assert before.count("score of at least 0.5, or the likeliest") == 2
    (folder / "thresholds.json").write_text(
        json.dumps({"detection_coco": {"threshold": 0.8, "f1": 0.61}, "detection_visual_genome": {"threshold": "x"}})
    )
    after = page_of(folder).text
    assert "score of at least 0.80, the threshold with the best F1 (0.61 at IoU 0.5) on the validation split" in after
    assert after.count("score of at least 0.5, or the likeliest") == 1, "what is no number is no threshold"
    assert before.count("1 of 1 objects found, 1 wrong box") == 4
    assert after.count("1 of 1 objects found, 0 wrong boxes") == 2, "the box of score 0.7 is not drawn"
    write_samples(folder, 1)
    (folder / "thresholds.json").write_text("{")
    assert page_of(folder).text.count("score of at least 0.5, or the likeliest") == 2


def test_boxes_beyond_the_image_are_drawn_to_its_border():
    image = Image.new("RGB", (50, 50), "white")
    drawn = draw_boxes(image, [{"label": "x", "bbox": [-20, 20, 100, 100]}], (50, 50), "#ff0000")
    assert drawn.size == (50, 50)
    assert drawn.getpixel((0, 45)) == (255, 0, 0)
    assert image.getpixel((0, 45)) == (255, 255, 255), "the original is left alone"
