"""The names behind a model's outputs, kept in the run folder so that a run predicts without its data sets.

``labels.json``: data set key -> ``{"classes": {id: name}}`` (detection; Visual Genome also ``"attributes"``; with
``"category_ids": {class: id}`` where classes are numbered by their order),
``{"answers": [...]}`` (VQA) or ``{"classes": {index: name}}``. Beside it ``vocab.txt``, the word pieces of the texts.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.config import RunConfig
from unit_fast.data.layout import Layout
from unit_fast.data.store.files import read_json
from unit_fast.data.text.wordpieces import load_vocabulary
from unit_fast.data.vocabulary import VOCABULARY
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.task_results import write_aside
from unit_fast.tasks import OWN, get_task

LABELS = "labels.json"


@dataclass(kw_only=True)
class TaskLabels:
    """Names of one data set's outputs."""

    classes: dict[int, str] = field(default_factory=dict)
    """Class id (detection) or index -> name."""
    answers: list[str] = field(default_factory=list)
    """VQA: answer by index."""
    attributes: dict[int, str] = field(default_factory=dict)
    """Visual Genome: attribute id -> name."""
    texts: int = 0
    """Sentences a task of one's own takes; 0 for the others."""
    category_ids: dict[int, int] = field(default_factory=dict)
    """Detection: class -> category id in the files it was trained on, where the class is not itself the id."""


def write_labels(folder: str | Path, config: RunConfig, datasets: dict) -> Path:
    """Write ``labels.json`` and ``vocab.txt`` into the run folder; returns the path of the first.

    datasets: data set key -> an open data set of any split.
    """
    folder, entries = Path(folder), {}
    layout = Layout(config.data)
    for name, dataset in datasets.items():
        task = get_task(name)
        if task.is_detection:
            entries[task.name] = {"classes": {str(k): str(v) for k, v in sorted(dataset.class_names.items())}}
            if dataset.category_ids:
                entries[task.name]["category_ids"] = {str(k): v for k, v in dataset.category_ids.items()}
            if task.attributes and (names := _attribute_names(layout)):
                entries[task.name]["attributes"] = names
        elif task.loss == "bce":
            entries[task.name] = {"answers": [str(answer) for answer in dataset.answers]}
        else:
            entries[task.name] = {"classes": {str(i): label for i, label in dataset.class_names.items()}}
        if task.name in OWN and task.has_text:
            entries[task.name]["texts"] = len(dataset.columns)
    if any(get_task(name).has_text for name in datasets):
        source = layout.find("bert.vocab")
        if not (folder / VOCABULARY).exists() or not source.samefile(folder / VOCABULARY):
            shutil.copyfile(source, folder / VOCABULARY)
    return write_aside(folder / LABELS, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")


def _attribute_names(layout: Layout) -> dict[str, str]:
    """Attribute id -> name from the vocabulary file, where the data root has it."""
    from unit_fast.data.readers.visual_genome import read_vocabulary

    path = layout.find("vg.attribute_vocab")
    return {} if path is None else {str(k): str(v) for k, v in sorted(read_vocabulary(path)[1].items())}


def find_labels(path: str | Path) -> Path | None:
    """The folder with ``labels.json`` that belongs to a run, one of its checkpoints or a weights file; None without."""
    path = Path(path).resolve()
    return next((folder for folder in [path, *list(path.parents)[:4]] if (folder / LABELS).is_file()), None)


def check_labels(folder: str | Path, datasets) -> list[str]:
    """Compare open data sets with the names kept in a run's ``folder``; lines about class names that differ.

    ``UserError`` where the answers or the word pieces are others: what the model was trained on has no meaning then.
    """
    folder, kept, lines = Path(folder), read_labels(folder), []
    for dataset in datasets:
        labels, short = kept.get(dataset.task.name, TaskLabels()), dataset.task.short
        answers = [str(answer) for answer in getattr(dataset, "answers", [])]
        if labels.answers and answers and labels.answers != answers:
            raise UserError(f"{short}: the answers are not those of the run ({folder / LABELS}); give the run's list")
        vocabulary = folder / VOCABULARY if dataset.words is not None else None
        if vocabulary and vocabulary.is_file() and list(load_vocabulary(vocabulary)) != list(dataset.words.vocabulary):
            raise UserError(f"{short}: the vocabulary is not that of the run ({vocabulary}); give the run's own")
        names = dataset.class_names if dataset.task.is_detection else {}
        others = [i for i, name in names.items() if labels.classes.get(i, str(name)) != str(name)]
        if others:
            now, was = printable(names[others[0]]), printable(labels.classes[others[0]])
            lines.append(
                f"{short}: {len(others)} classes have other names than in the run (first: {others[0]} is {now}, was "
                f"{was}): if they mean something else, so do the figures"
            )
    return lines


def read_labels(folder: str | Path) -> dict[str, TaskLabels]:
    """Data set key -> names, from ``folder/labels.json``. ``UserError`` on a file of another form."""
    path = Path(folder) / LABELS
    content = read_json(path)
    try:
        return {
            get_task(name).name: TaskLabels(
                classes={int(k): str(v) for k, v in entry.get("classes", {}).items()},
                answers=[str(answer) for answer in entry.get("answers", [])],
                attributes={int(k): str(v) for k, v in entry.get("attributes", {}).items()},
                texts=int(entry.get("texts", 0)),
                category_ids={int(k): int(v) for k, v in entry.get("category_ids", {}).items()},
            )
            for name, entry in content.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a file of names as training writes it ({error}); copy it from the run") from None
