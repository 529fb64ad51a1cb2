"""Look a whole data root over: what is there, and everything odd in it, counted with examples.

The readers are the ones that training uses; here they collect what they find instead of stopping at the first error.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.config import DataConfig, TaskConfig, default_tasks
from unit_fast.data import open_dataset, reader_of
from unit_fast.data.errors import BadImage, EmptySplit, Finding, Findings, MissingSplit
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.decode import header
from unit_fast.data.layout import PLACES, Layout
from unit_fast.data.outputs import resolved_task
from unit_fast.data.readers.dataset import SPLITS
from unit_fast.data.readers.own_rows import unclear_tables
from unit_fast.data.readers.sources import existing
from unit_fast.data.readers.vqa2 import read_answers
from unit_fast.data.shards.member import NOT_IN_SHARDS
from unit_fast.data.store.cache import open_cache
from unit_fast.data.store.files import describe
from unit_fast.data.text.wordpieces import load_vocabulary
from unit_fast.errors import UserError, printable
from unit_fast.tasks import OWN, TASKS, get_task

CLASSES = 12
"""Classes whose boxes are counted in the summary."""


@dataclass
class SplitReport:
    """What was found in one split of one data set."""

    task: str
    """Short task name, or ``vocabulary`` and the like for a file that several share."""
    split: str
    status: str = "ok"
    """``ok``, ``missing`` (no files), ``empty`` (files without a sample of the split) or ``broken`` (cannot be
    opened)."""
    samples: int = 0
    facts: dict = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class CheckReport:
    """The result of ``check``. ``ok`` is True when training could use everything that is there.

    ``str(report)`` is the summary in plain text, ``rich.print(report)`` draws a table, ``to_dict`` is the JSON form.
    """

    root: str
    splits: list[SplitReport]
    decoded: bool = False
    """Whether every image was decoded, not only its header read."""
    lines: list[str] = field(default_factory=list)
    """What follows from the files: classes, and what is kept for validation."""

    @property
    def ok(self) -> bool:
        """No error anywhere, and at least one split is there."""
        severities = [f.severity for s in self.splits for f in s.findings]
        return "error" not in severities and any(s.samples for s in self.splits)

    def to_dict(self) -> dict:
        """Plain values, ready for JSON."""
        return {
            "root": self.root,
            "ok": self.ok,
            "decoded": self.decoded,
            "lines": self.lines,
            "splits": [dataclasses.asdict(split) for split in self.splits],
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(task, split, status, samples, counts or why it is missing) of each split, for a table."""
        return [
            (s.task, s.split, s.status, f"{s.samples:,}" if s.status == "ok" else "", _counts(s.facts))
            for s in self.splits
        ]

    def problems(self) -> list[tuple[str, str, str, str, list[str]]]:
        """(task, split, severity, "N x kind", first examples) of each finding, errors first."""
        found = [(s, f) for s in self.splits for f in s.findings]
        found.sort(key=lambda pair: pair[1].severity != "error")
        return [(s.task, s.split, f.severity, f"{f.count:,} x {f.kind}", f.examples) for s, f in found]

    def _verdict(self) -> str:
        errors = sum(f.count for s in self.splits for f in s.findings if f.severity == "error")
        notes = sum(f.count for s in self.splits for f in s.findings if f.severity == "note")
        what = "all images decoded" if self.decoded else "image headers read"
        if not any(s.samples for s in self.splits):
            return (
                f"{printable(self.root, 400)}: no usable data found: no published data set in its layout and no file "
                "of your own (train/_annotations.coco.json, annotations/instances_*.json and the like; train.csv; a "
                "YOLO or VOC folder is converted by unit-fast data prepare)"
            )
        return f"{'clean' if self.ok else 'NOT usable as it is'}: {errors:,} errors, {notes:,} notes ({what})"

    def __str__(self) -> str:
        lines = [f"data root {printable(self.root, 400)}"]
        lines += [f"  {' '.join(filter(None, row))}" for row in self.rows()]
        lines += [printable(line, 600) for line in self.lines]
        for task, split, severity, title, examples in self.problems():
            lines.append(f"{severity}: {task} {split}: {title}")
            lines += [f"    {printable(example, 400)}" for example in examples]
        return "\n".join([*lines, self._verdict()])

    def __rich_console__(self, console, options):
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"data root {escape(printable(self.root, 400))}", title_justify="left")
        for name, justify in (("data set", "left"), ("split", "left"), ("status", "left"), ("samples", "right")):
            table.add_column(name, justify=justify)
        table.add_column("counts", overflow="fold")
        for row in self.rows():
            table.add_row(*map(escape, row), style="dim" if row[2] in ("missing", "empty") else None)
        yield table
        yield from (escape(printable(line, 600)) for line in self.lines)
        for task, split, severity, title, examples in self.problems():
            yield f"[{'red' if severity == 'error' else 'yellow'}]{severity}[/] {task} {split}: {escape(title)}"
            yield from (f"    {escape(printable(example, 400))}" for example in examples)
        yield f"[{'green' if self.ok else 'red'}]{escape(self._verdict())}[/]"


def _counts(facts) -> str:
    if "why" in facts:
        return printable(facts["why"], 400)
    parts = [f"{name} {value:,}" for name, value in facts.items() if type(value) is int]
    if by_class := facts.get("boxes by class") or facts.get("rows by class"):
        more = f" and {len(by_class) - CLASSES} more" if len(by_class) > CLASSES else ""
        parts.append(f"of them {', '.join(f'{n:,} {name}' for name, n in list(by_class.items())[:CLASSES])}{more}")
    return printable(", ".join(parts), 400)


def check(
    root: str | Path,
    data: DataConfig | None = None,
    *,
    tasks: dict[str, TaskConfig] | None = None,
    decode: bool = False,
    examples: int = 3,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Read every data set under ``root`` and report what is there and what is odd.

    Never raises on bad data: a file that cannot be read becomes a finding.

    Args:
        root: data root.
        data: settings; its ``root`` is replaced. Default: the published ones.
        tasks: data set key -> what the model has for it, to compare class ids, answers and text lengths with. Default:
            the published numbers, with as many VQA answers as the root's own list has (its size is then reported); in a
            root without any published data set the tasks on a user's own files that are there.
        decode: decode every image instead of reading headers only; finds files that are cut off. What is found is
            kept in ``data.cache_dir`` for training with DALI.
        examples: examples kept of each kind of finding.
        progress: called with ``task split`` before each.

    Raises:
        UserError: ``root`` is not a folder or ``data.paths`` has an unknown key.
    """
    data = dataclasses.replace(data or DataConfig(), root=str(root))
    layout = Layout(data)
    checked = CheckedImages(open_cache(data).folder, data.max_pixels) if decode else None
    splits: list[SplitReport] = []
    if tasks is None and (own := _own_tasks(layout)):
        tasks = own
    if tasks is None:
        tasks = default_tasks(*TASKS)
        answers = _shared(splits, layout, "vqa2.answers", "answers", lambda p: read_answers(p, None), examples)
        if answers is not None and len(answers) != tasks["vqa2"].outputs:
            splits[-1].findings.append(
                Finding(
                    "answer list of another size", "note", 1,
                    [f"{len(answers)} answers, the published model has {tasks['vqa2'].outputs}: set the task's outputs "
                     f"to {len(answers)}"],
                )
            )  # fmt: skip
        if answers is not None:
            tasks["vqa2"] = dataclasses.replace(tasks["vqa2"], outputs=len(answers))
    if any(get_task(name).has_text for name in tasks):
        _shared(splits, layout, "bert.vocab", "vocabulary", load_vocabulary, examples)
    lines = []
    uncached = dataclasses.replace(data, cache_dir="")  # a check of the files reads the files
    for name, config in tasks.items():
        try:
            tasks[name], said = resolved_task(name, uncached, config)
        except UserError:  # a split's report says what is wrong
            continue
        lines += said
    seen: dict[str, tuple[int, int] | BadImage | list[str]] = {}
    for name, config in tasks.items():
        for split in SPLITS:
            if progress is not None:
                progress(f"{get_task(name).short} {split}")
            splits.append(_check_split(name, split, data, config, checked, examples, seen))
    if checked:
        checked.close()
    if not any(split.samples for split in splits):
        lines += unclear_tables(layout)
    return CheckReport(str(root), splits, decode, lines)


def _own_tasks(layout: Layout) -> dict[str, TaskConfig]:
    """The tasks on a user's own files that are there, where no published data set is."""
    published = {task.short for task in TASKS.values()}
    keys = [key for key in PLACES if key.split(".")[0] in published and not key.endswith("images")]
    if any(existing(layout, key)[key] for key in keys):
        return {}
    return default_tasks(*(name for name, task in OWN.items() if reader_of(task).present(layout)))


def _shared(splits, layout, key, title, read, examples):
    """Report on a file that several splits use; its value, or None."""
    report = SplitReport(title, "", "missing")
    splits.append(report)
    findings = Findings(strict=False, examples=examples)
    value = None
    try:
        path = layout.find(key)
        if path is not None:
            report.facts["file"] = str(path)
            report.status = "broken"
            value = read(path)
            report.status = "ok"
            report.facts["entries"] = len(value)
    except Exception as error:  # whatever a broken file does to a reader is a finding here
        findings.error("cannot be read", _message(error))
    report.findings = list(findings.found.values())
    return value


def _check_split(name, split, data, config, checked, examples, seen) -> SplitReport:
    report = SplitReport(get_task(name).short, split)
    findings = Findings(strict=False, examples=examples)
    try:
        dataset = open_dataset(name, split, data, config, augment=False, findings=findings)
        report.samples = len(dataset)
        report.facts = dataset.facts
        _check_images(dataset, data, checked, seen, findings)
    except EmptySplit as error:
        report.status = "empty"
        report.facts["why"] = str(error)
        if not error.by_ids:
            findings.error("no usable sample", str(error))
    except MissingSplit:
        report.status = "missing"
    except Exception as error:  # see _shared
        report.status = "broken"
        findings.error("cannot be read", _message(error))
    report.findings = list(findings.found.values())
    return report


def _check_images(dataset, data, checked, seen, findings):
    """Every image of the split: there, readable, of the stated size. ``seen`` spares files that were read before.

    Images are decoded if ``checked`` is given, which then knows them and spares training with DALI its own check.
    """
    for folder, shards in dataset.shards.items():
        if folder not in seen:
            seen[folder] = shards.damage()
        for problem in seen[folder]:
            findings.error("shard missing or damaged", problem)
    if dataset.shards:
        dataset.facts["shards"] = sum(len(shards.shards) for shards in dataset.shards.values())
    images = 0
    for path, stated in dataset.image_paths():
        images += 1
        key = str(path)
        if key not in seen:
            try:
                if checked:
                    checked.forget(path)
                    facts = checked.facts(path)
                    seen[key] = facts.height, facts.width, facts.turned
                else:
                    seen[key] = header(path, data.max_pixels)
            except BadImage as error:
                seen[key] = error
        found = seen[key]
        if isinstance(found, BadImage):
            missing = found.reason in ("no such file", NOT_IN_SHARDS)
            findings.error("image missing" if missing else "image unreadable", str(found))
            continue
        height, width, turned = found
        if turned:
            findings.note(
                "image that viewers turn",
                f"{printable(key, 400)}: its EXIF orientation turns it; training takes it, and its boxes, as stored",
            )
        if stated is not None and (height, width) != stated:
            findings.error(
                "image of another size than stated",
                f"{printable(key, 400)}: {width} x {height} pixels, its annotation says {stated[1]} x {stated[0]}",
            )
    if images:
        dataset.facts["image files"] = images


def _message(error) -> str:
    return str(error) if isinstance(error, UserError) else describe(error)
