"""Names of outputs for weights that came from elsewhere: from a file, from what is published, from a data root."""

import json
from pathlib import Path

from unit_fast.config import DataConfig, ModelConfig, RunConfig
from unit_fast.data import MissingSplit, open_dataset
from unit_fast.data.store.files import read_json
from unit_fast.errors import UserError
from unit_fast.evaluation.labels import LABELS, write_labels
from unit_fast.evaluation.task_results import write_aside
from unit_fast.tasks import get_task

_COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, , stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, , backpack, umbrella, , "
    ", handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, , wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, , dining table, , , toilet, , tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, , book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
"""COCO's categories by id from 1; the empty ones are ids that have none."""
COCO = {str(i): name for i, name in enumerate(_COCO.split(", "), start=1) if name.strip()}
COCO_OUTPUTS = 92
"""Logits of a published COCO detector: ids 0 to 90 and no object."""


def write_known_labels(
    folder: Path, model: ModelConfig, *, labels: str | None = None, beside: Path | None = None, root: str | None = None
) -> list[str]:
    """Write ``labels.json`` into ``folder`` with what is known of the outputs of ``model``; short names of the tasks
    whose outputs stay without names.

    labels: a run's labels.json, a COCO annotation file or a Hugging Face config.json. beside: a config.json that stood
    beside the weights. root: a data root, read for the tasks that it has, word pieces included. COCO's names and those
    of the classification tasks are known. ``UserError`` on a labels file of another kind.
    """
    entries: dict[str, dict] = {}
    for name, settings in model.tasks.items():
        task = get_task(name)
        if task.labels and settings.outputs == len(task.labels):
            entries[name] = {"classes": {str(i): label for i, label in enumerate(task.labels)}}
        elif task.short == "coco" and settings.outputs == COCO_OUTPUTS:
            entries[name] = {"classes": COCO}
    if beside is not None and (found := _of_hugging_face(read_json(beside))):
        entries |= _of_detection(model, found)
    if root is not None:
        entries |= _of_root(folder, model, root)
    if labels is not None:
        entries |= _of_file(Path(labels), model)
    write_aside(folder / LABELS, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return [get_task(name).short for name in model.tasks if name not in entries]


def _of_root(folder: Path, model: ModelConfig, root: str) -> dict[str, dict]:
    data, opened = DataConfig(root=root), {}
    for name, settings in model.tasks.items():
        try:
            opened[name] = open_dataset(
                name, "val", data, settings, augment=False, vocab_size=model.text.vocab_size,
                attribute_outputs=model.loss.attribute_outputs,
            )  # fmt: skip
        except MissingSplit:
            continue
    if not opened:
        raise UserError(f"--data-root {root}: has no data of {', '.join(get_task(n).short for n in model.tasks)}")
    return read_json(write_labels(folder, RunConfig(model=model, data=data), opened))


def _of_file(path: Path, model: ModelConfig) -> dict[str, dict]:
    content = read_json(path)
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("categories"), list):
        rows = [row for row in content["categories"] if isinstance(row, dict)]
        names = {str(row.get("id")): str(row.get("name")) for row in rows}
    else:
        names = _of_hugging_face(content)
    if names:
        return _of_detection(model, names)
    found = {name: entry for name, entry in content.items() if name in model.tasks and isinstance(entry, dict)}
    if not found:
        raise UserError(
            f"--labels {path}: neither a run's {LABELS} for a task of the model, nor a COCO annotation file, nor a "
            "Hugging Face config.json with id2label"
        )
    return found


def _of_hugging_face(content) -> dict[str, str]:
    """Class -> name of a config.json; without the places that have no name."""
    names = content.get("id2label") if isinstance(content, dict) else None
    names = names if isinstance(names, dict) else {}
    return {str(i): str(n) for i, n in names.items() if n != "N/A" and n != f"LABEL_{i}"}


def _of_detection(model: ModelConfig, names: dict[str, str]) -> dict[str, dict]:
    """The names for the model's detection tasks, of those that are outputs."""
    found = {}
    for name, settings in model.tasks.items():
        if get_task(name).is_detection and (own := {i: n for i, n in names.items() if _is_class(i, settings.outputs)}):
            found[name] = {"classes": own}
    return found


def _is_class(text: str, outputs: int) -> bool:
    return text.isdecimal() and int(text) < outputs - 1
