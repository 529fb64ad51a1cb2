"""``report.html`` of a run: one file that opens from disk, refers to nothing outside itself and runs no script.

All text from data is escaped by the template engine, and control and bidi characters are made visible before.
"""

import base64
import dataclasses
import hashlib
import io
import json
import statistics
from importlib import resources
from pathlib import Path

from PIL import Image

from unit_fast.config import RunConfig, to_dict
from unit_fast.errors import printable
from unit_fast.report.curves import METRIC_NAMES, write_curves
from unit_fast.report.predictions import THRESHOLD, draw_example, example_image, scaled
from unit_fast.report.run import Run, number, read_run, updates
from unit_fast.tasks import TASKS, Task

PUBLISHED = {
    "all8_shared": {
        "coco": 0.3899, "vg": 0.0329, "vqa2": 0.6696, "snli_ve": 0.7316, "qnli": 0.8790, "sst2": 0.8922,
        "mnli": 0.8090, "qqp": 0.9065,
    },
    "all8_shared_no_task_embedding": {
        "coco": 0.3847, "vg": 0.0331, "vqa2": 0.6825, "snli_ve": 0.7407, "qnli": 0.8815, "sst2": 0.8850,
        "mnli": 0.8061, "qqp": 0.9061,
    },
}  # fmt: skip
"""Recipe -> validation results of the authors' checkpoint, from MMF's website (SPEC 5.4). Both started from a COCO
single-task model."""

_MARGIN = 0.02
"""A metric this close to chance is called "at chance"."""

_TEXT_LIMIT = 1500

_ELSEWHERE = ("metrics", "ema_metrics", "environment", "recipe", "steps", "seed", "threads", "device")
"""Entries of the summary that stand in other parts of the page."""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` (and ``curves.svg``) of the run in ``run_dir``; returns its path.

    Reads the run folder only; works on unfinished runs and says what is absent. ``UserError`` where the folder holds no
    run.
    """
    run = read_run(run_dir)
    published = published_values(run.config)
    picture = _data_uri(write_curves(run, published).encode(), "image/svg+xml") if run.tasks else None
    css = _template("report.css")
    page = _environment().from_string(_template("report.html.j2")).render(
        css=css,
        style_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        **_content(run, published),
        curves=picture,
    )  # fmt: skip
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def published_values(config: dict) -> dict[str, float]:
    """Published results by short task name of the recipe that ``config`` (the JSON form) names; empty without."""
    recipe = str(config.get("recipe", ""))
    # variants of a recipe (another optimiser policy) are compared with the same checkpoint
    names = [name for name in PUBLISHED if recipe == name or recipe == f"{name}_skip"]
    return PUBLISHED[names[0]] if names else {}


def _template(name: str) -> str:
    return resources.files("unit_fast.report").joinpath("templates", name).read_text(encoding="utf-8")


def _environment():
    import jinja2
    from markupsafe import Markup

    def visible(value):
        """Every printed value: numbers as they are, text with control and bidi characters made visible."""
        return value if isinstance(value, (Markup, int, float)) else printable(value, _TEXT_LIMIT)

    environment = jinja2.Environment(
        autoescape=True, finalize=visible, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["css"] = Markup
    environment.filters["uri"] = Markup
    return environment


# ---------------------------------------------------------------------------------------------------- content


def _content(run: Run, published: dict[str, float]) -> dict:
    rows = [_headline(run, task, published.get(task.short)) for task in run.tasks]
    summary = {k: v for k, v in run.summary.items() if k not in _ELSEWHERE}
    return {
        "title": run.config.get("recipe") or run.folder.resolve().name,
        "folder": run.folder.resolve().name,
        "verdict": _verdict(run, rows),
        "facts": _facts(run),
        "rows": rows,
        "published": bool(published),
        "detections": [d for task in run.tasks if task.is_detection and (d := _detections(run, task))],
        "by_class": [d for task in run.tasks if task.is_detection and (d := _by_class(run, task))],
        "questions": [d for task in run.tasks if task.kind == "vl" and (d := _questions(run, task))],
        "texts": [d for task in run.tasks if task.kind == "glue" and (d := _questions(run, task))],
        "throughput": _throughput(run),
        "changed": _changed(run.config),
        "config_lines": json.dumps(run.config, indent=2).split("\n") if run.config else [],
        "environment": [(_in_words(key), value) for key, value in _flat(run.env)],
        "summary": [(_in_words(key), value) for key, value in _flat(summary)],
        "command": run.command,
        "notes": run.notes,
    }


def _headline(run: Run, task: Task, published: float | None) -> dict:
    scored = run.scored(task)
    row = {
        "title": task.title, "short": task.short, "metric": METRIC_NAMES[task.metric], "value": None,
        "published": published, "steps": len(run.train.get(task.short, [])),
    }  # fmt: skip
    row["why"] = "no labels in this split" if run.evaluations.get(task.short) else "not evaluated"
    if not scored:
        return row
    latest, best = scored[-1], max(scored, key=lambda row: row["metrics"][task.metric])
    figures = latest["metrics"]
    ap50, chance, loss = (_finite(figures.get(key)) for key in ("AP50", "chance", "loss"))
    return row | {
        "value": figures[task.metric],
        "ap50": ap50,
        "chance": chance,
        "loss": loss,
        "count": figures.get("count"),
        "unreadable": figures.get("unreadable") or 0,
        "step": latest["step"],
        "best": best["metrics"][task.metric],
        "best_step": best["step"],
        "learned": chance is None or figures[task.metric] > chance + (0.001 if task.is_detection else _MARGIN),
        # positions on a bar of 100 units; the value itself is printed beside
        "bar": {
            "value": round(100 * min(max(figures[task.metric], 0.0), 1.0), 2),
            "ap50": round(100 * ap50, 2) if ap50 is not None else None,
            "chance": round(100 * chance, 2) if chance else None,
            "published": round(100 * published, 2) if published else None,
        },
    }


def _finite(value) -> float | None:
    return value if number(value) else None


def _verdict(run: Run, rows: list[dict]) -> str:
    done = [row for row in rows if row["value"] is not None]
    if not done:
        return "Nothing was evaluated yet." if run.train else "The run has not trained yet."
    flat = [row["title"] for row in done if not row["learned"]]
    if not flat:
        text = f"All {len(done)} evaluated tasks are above chance." if len(done) > 1 else "The task is above chance."
    elif len(flat) == len(done):
        text = "No task is above chance yet." if len(done) > 1 else "The task is not above chance yet."
    else:
        text = f"{len(done) - len(flat)} of {len(done)} evaluated tasks are above chance; at chance: {', '.join(flat)}."
    missing = [row["title"] for row in rows if row["value"] is None]
    if missing:
        text += f" Without a figure: {', '.join(missing)}."
    return text


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands under the title: progress, time, batch, speed, seed, machine."""
    config, summary, facts = run.config, run.summary, []
    status = summary.get("status")
    if isinstance(status, str):
        facts.append(("status", status))
    step, steps = summary.get("step", run.last_step), config.get("steps")
    if type(step) is int:
        facts.append(("steps", f"{step:,}" + (f" of {steps:,}" if type(steps) is int and steps != step else "")))
    if number(summary.get("seconds")):
        facts.append(("time", _duration(summary["seconds"])))
    if type(config.get("batch_per_process")) is int and type(config.get("accumulate")) is int:
        facts.append(("batch", str(config["batch_per_process"] * config["accumulate"])))
    speed = _throughput(run)
    if speed and speed["speed"] is not None:
        facts.append(("speed", f"{speed['speed']:.3g} samples/s"))
    if number(summary.get("parameters")):
        facts.append(("parameters", f"{summary['parameters'] / 1e6:.1f} M"))
    for name in ("seed", "device", "threads"):
        value = next((source[name] for source in (summary, run.env, config) if name in source), None)
        if isinstance(value, (str, int)):
            facts.append((name, str(value)[:60]))
    if isinstance(run.env.get("commit"), str):
        facts.append(("commit", run.env["commit"][:12]))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _samples(run: Run, task: Task) -> tuple[str, list[dict]]:
    entry = run.examples.get(task.short)
    if not isinstance(entry, dict) or not isinstance(entry.get("samples"), list):
        return "", []
    return str(entry.get("split", "")), [s for s in entry["samples"] if isinstance(s, dict)]


def _detections(run: Run, task: Task) -> dict | None:
    split, samples = _samples(run, task)
    threshold = run.thresholds.get(task.name, {})
    shown, absent = [], 0
    for sample in samples:
        image = example_image(run.folder, sample)
        if image is None:
            absent += 1
            continue
        truth, prediction, caption = draw_example(image, sample, threshold=threshold.get("threshold"))
        shown.append(
            {"id": sample.get("id"), "truth": _jpeg(truth), "prediction": _jpeg(prediction), "caption": caption}
        )
    if not samples:
        return None
    return {
        "title": task.title, "split": split, "samples": shown, "absent": absent, "above": _above(threshold)
    }  # fmt: skip


def _above(threshold: dict) -> str:
    """Which boxes are drawn, as a sentence."""
    if not threshold:
        return f"Drawn are boxes with a score of at least {THRESHOLD}, or the likeliest where there is none."
    text = f"Drawn are boxes with a score of at least {threshold['threshold']:.2f}, the threshold with the best F1"
    if number(threshold.get("f1")):
        text += f" ({threshold['f1']:.2f} at IoU {threshold.get('iou', 0.5):g})"
    return f"{text} on the validation split."


def _by_class(run: Run, task: Task) -> dict | None:
    """The newest average precision of each class; classes without an object in the split are left out."""
    scored = run.scored(task)
    rows = scored[-1]["metrics"].get("by_class") if scored else None
    keys = ("AP", "AP50", "objects")
    rows = rows if isinstance(rows, list) else []
    rows = [r for r in rows if isinstance(r, dict) and "name" in r and all(number(r.get(key)) for key in keys)]
    return {"title": task.title, "step": scored[-1]["step"], "rows": rows} if rows else None


def _questions(run: Run, task: Task) -> dict | None:
    split, samples = _samples(run, task)
    if not samples:
        return None
    shown = []
    for sample in samples:
        image = example_image(run.folder, sample) if task.has_image else None
        text = sample.get("text")
        shown.append(
            {
                "id": sample.get("id"),
                "image": _jpeg(scaled(image, 260)) if image is not None else None,
                "texts": [str(t) for t in (text if isinstance(text, list) else [text]) if t],
                "truth": [str(t.get("label")) for t in sample.get("truth") or []][:3],
                "answers": [
                    {"label": a["label"], "score": a["score"], "bar": round(100 * min(max(a["score"], 0.0), 1.0), 1)}
                    for a in (sample.get("prediction") or [])[:3]
                ],
                "right": sample.get("right"),
            }
        )
    graded = [s["right"] for s in shown if s["right"] is not None]
    return {"title": task.title, "split": split, "samples": shown, "right": sum(graded), "graded": len(graded)}


def _throughput(run: Run) -> dict | None:
    """Speed of the whole run, and by task the updates, their gradient norm and loss."""
    tasks = []
    for task in run.tasks:
        rows = run.train.get(task.short, [])
        if rows:
            late = rows[-max(1, len(rows) // 10) :]
            tasks.append(
                {
                    "title": task.title,
                    "updates": sum(map(updates, rows)),
                    "nonfinite": sum(row["nonfinite"] for row in rows if type(row.get("nonfinite")) is int),
                    "norm": _median(rows, "grad_norm"),
                    "loss": _mean(late, "loss"),
                }
            )
    if not tasks:
        return None
    every = sorted((row for rows in run.train.values() for row in rows), key=lambda row: row["step"])
    # the first tenth holds warm-up of caches and libraries
    every = every[len(every) // 10 :]
    total = sum(task["updates"] for task in tasks)
    return {
        "tasks": [task | {"share": task["updates"] / total} for task in tasks],
        "speed": _median(every, "samples_per_s"),
        "wait": _median(every, "data_wait"),
    }


def _median(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if number(row.get(key))]
    return statistics.median(values) if values else None


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if number(row.get(key))]
    return sum(values) / len(values) if values else None


def _changed(config: dict) -> list[tuple]:
    """(key, value, default) of every setting that is not the default."""
    defaults = dict(_flat(to_dict(RunConfig())))
    absent = dataclasses.MISSING
    rows = []
    for key, value in _flat(config):
        default = defaults.get(key, absent)
        if default is absent or _plain(default) != _plain(value):
            rows.append((_titled(key), _plain(value), "" if default is absent else _plain(default)))
    return rows


def _titled(key: str) -> str:
    """A setting by its name, data sets by their titles: ``ratios: COCO detection``."""
    parts = key.split(".")
    if not any(part in TASKS for part in parts):
        return key
    text = ""
    for part in parts:
        text += f": {TASKS[part].title}: " if part in TASKS else f"{'.' if text and text[-1] != ' ' else ''}{part}"
    return text.removesuffix(": ").removeprefix(": ")


def _in_words(key: str) -> str:
    """``bad_images.read`` as ``bad images, read``; data sets and tasks by their titles."""
    titles = {task.name: task.title for task in TASKS.values()} | {task.short: task.title for task in TASKS.values()}
    return ", ".join(titles.get(part, part.replace("_", " ")) for part in key.split("."))


def _plain(value) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)


def _flat(values: dict, prefix: str = "") -> list[tuple]:
    """(dotted key, value) of nested dicts."""
    out = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _jpeg(image: Image.Image) -> str:
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=84)
    return _data_uri(data.getvalue(), "image/jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
