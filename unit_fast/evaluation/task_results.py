"""What an evaluation collects, one class a kind of task: sums for the metric, rows of the prediction file, examples.

``Detection`` (COCO, Visual Genome), ``Answers`` (VQA) and ``Classes`` (SNLI-VE, GLUE) have the same methods:
``labelled(sample)``; ``compute(output, batch)``, what is wanted of a batch: tensors [B,...] that stay on the device;
``add(values, members, labelled)`` with these values on the host and (index, sample) of each row;
``add_unreadable(index)``, ``result(limited, scorer)``, ``write(stem)``, ``example(sample, prediction)``. Prediction
files are in the order of the data set, whatever the order in which batches were added.
"""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.batch import Batch, Output
from unit_fast.detection.boxes import cxcywh_to_xywh, image_scale
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.metrics import Accuracy, VqaAccuracy, best_answer, coco_average_precision
from unit_fast.evaluation.thresholds import best_threshold
from unit_fast.files import replace
from unit_fast.numerics import full_precision
from unit_fast.tasks import Task

TOP = 5
"""Answers or classes listed for a sample."""

EXAMPLE_BOXES = 20
"""Most likely boxes kept of an example."""

_log = logging.getLogger("unit_fast.evaluate")


def detections(output: Output, orig_size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B,Q], classes [B,Q] int64, boxes [B,Q,4] xywh in pixels of the original image) of the last layer.

    The class is the most likely real one, the score its probability; the softmax includes no-object (the last logit).
    ``orig_size`` [B,2] is height and width.
    """
    probabilities = full_precision(output.logits[-1]).softmax(-1)[..., :-1]
    scores, classes = probabilities.max(-1)
    boxes = full_precision(output.boxes[-1])
    size = orig_size.to(boxes).flip(-1).repeat(1, 2)[:, None]  # width, height, width, height
    return scores, classes, cxcywh_to_xywh(boxes) * size


class Detection:
    """COCO results of all queries of every image, each image once."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        self.dataset, self.task, self.attributes = dataset, task, attributes
        self.found: dict[int, tuple[object, list[dict]]] = {}
        """Index of the sample -> image id and its boxes; none of an image that could not be read."""
        self.names = dataset.class_names
        self.ids: dict[int, int] = getattr(dataset, "category_ids", {})
        """Class -> category id, where they differ."""
        self.titles = {self.ids.get(label, label): str(name) for label, name in self.names.items()}
        """Category id -> name."""
        self.by_class: list[dict] = []
        """A row a class: name, category id, ``AP``, ``AP50`` and ``objects``."""

    def labelled(self, sample: dict) -> bool:
        return sample.get("labels") is not None

    def compute(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        scores, classes, boxes = detections(output, batch.orig_size)
        values = {"scores": scores, "classes": classes, "boxes": boxes}
        if self.attributes and output.attribute_logits is not None:
            best = full_precision(output.attribute_logits).max(-1)
            values |= {"attribute_scores": best.values, "attributes": best.indices}
        return values

    def add(self, values: dict[str, Tensor], members: list[tuple[int, dict]], labelled: bool) -> list[dict]:
        values = {name: value.tolist() for name, value in values.items()}
        predictions = []
        for row, (index, sample) in enumerate(members):
            # 1e-4 pixels and 1e-8 are below what any threshold sees, and halve the files
            found = [
                {
                    "image_id": sample["image_id"],
                    "category_id": self.ids.get(category, category),
                    "bbox": [round(x, 4) for x in box],
                    "score": round(score, 8),
                }
                for category, box, score in zip(values["classes"][row], values["boxes"][row], values["scores"][row])
            ]
            if "attributes" in values:
                for item, score, label in zip(found, values["attribute_scores"][row], values["attributes"][row]):
                    item.update(attr_label=label, attr_score=round(score, 8))
            self.found[index] = sample["image_id"], found
            predictions.append(sorted(found, key=lambda r: -r["score"])[:EXAMPLE_BOXES])
        return predictions

    def add_unreadable(self, index: int) -> None:
        # without a result it stays in the ground truth; a limited evaluation finds it by its sample id
        self.found[index] = self.dataset.sample_id(index), []

    def results(self) -> list[dict]:
        """COCO results in the order of the data set."""
        return [box for _, (_, found) in sorted(self.found.items(), key=lambda item: item[0]) for box in found]

    def result(self, limited: bool, scorer: str) -> dict:
        if not self.dataset.has_targets:
            return {"count": 0}
        truth = self.dataset.coco_ground_truth()
        known = [image["id"] for image in truth["images"]]
        seen = {image_id for image_id, _ in self.found.values()}
        ids = [i for i in known if i in seen] if limited else known
        results = self.results()
        figures = coco_average_precision(truth, results, ids, scorer, by_class=True)
        rows, titles = figures.pop("by_class"), self.titles
        self.by_class = [{"name": titles[i], "category_id": i, **row} for i, row in rows.items() if i in titles]
        if self.ids:
            figures["by_class"] = self.by_class
        if (best := best_threshold(truth, results, ids)) is not None:
            figures |= {"threshold": round(best.score, 6), "f1": best.f1}
        if self.task.metric not in figures:
            _log.warning(
                "%s: no object in the %d images: their average precision is undefined", self.task.short, len(ids)
            )
        return {**figures, "chance": 0.0, "count": len(ids)}

    def write(self, stem: Path) -> Path:
        if self.by_class:
            write_aside(stem.with_name(f"{stem.name}_by_class.json"), json.dumps(self.by_class, indent=1))
        text = json.dumps(self.results(), separators=(",", ":"), allow_nan=False)
        return write_aside(stem.with_suffix(".json"), text)

    def example(self, sample: dict, prediction: list[dict]) -> dict:
        height, width = (int(x) for x in sample["orig_size"])
        truth = None
        if self.labelled(sample):
            boxes = cxcywh_to_xywh(torch.as_tensor(sample["boxes"]).double().reshape(-1, 4))
            boxes = boxes * image_scale(height, width, boxes)
            labels = torch.as_tensor(sample["labels"]).tolist()
            truth = [
                {"label": self._title(self.ids.get(label, label)), "bbox": [round(x, 2) for x in box]}
                for label, box in zip(labels, boxes.tolist())
            ]
        found = [{"label": self._title(r["category_id"]), "bbox": r["bbox"], "score": r["score"]} for r in prediction]
        return {"truth": truth, "prediction": found, "size": [height, width]}

    def _title(self, category_id: int) -> str:
        return self.titles.get(category_id, str(category_id))


class _Scored:
    """Common to tasks with one row of scores a sample."""

    metric: Accuracy | VqaAccuracy

    def __init__(self, dataset, task: Task, attributes: bool = False):
        self.dataset, self.task = dataset, task
        self.rows: dict[int, dict] = {}
        """Index of the sample -> its row of the prediction file."""

    def add_unreadable(self, index: int) -> None:
        """Nothing: the sample is left out."""

    def result(self, limited: bool, scorer: str) -> dict:
        return self.metric.result()

    def _in_order(self) -> list[dict]:
        """The rows in the order of the data set."""
        return [self.rows[index] for index in sorted(self.rows)]


class Answers(_Scored):
    """VQA: the most likely answer, ``<unk>`` excluded."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        super().__init__(dataset, task)
        self.metric, self.names = VqaAccuracy(), dataset.answers

    def labelled(self, sample: dict) -> bool:
        return sample.get("answer_scores") is not None

    def compute(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        scores = full_precision(output.scores)
        values, indices = scores[:, 1:].sigmoid().topk(min(TOP, scores.shape[1] - 1))
        return {"best": best_answer(scores), "values": values, "indices": indices + 1}

    def add(self, values: dict[str, Tensor], members: list[tuple[int, dict]], labelled: bool) -> list[dict]:
        if labelled:
            targets = torch.stack([torch.as_tensor(sample["answer_scores"]) for _, sample in members])
            self.metric.count_answers(values["best"], targets)
        for (index, sample), best in zip(members, values["best"].tolist()):
            self.rows[index] = {"question_id": _number(sample["sample_id"]), "answer": str(self.names[best])}
        return [self._ranked(i, v) for i, v in zip(values["indices"].tolist(), values["values"].tolist())]

    def _ranked(self, indices, values) -> list[dict]:
        return [{"label": str(self.names[i]), "score": round(v, 6)} for i, v in zip(indices, values)]

    def write(self, stem: Path) -> Path:
        return write_aside(stem.with_suffix(".json"), json.dumps(self._in_order(), allow_nan=False))

    def example(self, sample: dict, prediction: list[dict]) -> dict:
        truth, right = None, None
        if self.labelled(sample):
            targets = torch.as_tensor(sample["answer_scores"])
            values, indices = targets.topk(min(TOP, len(targets)))
            truth = [t for t in self._ranked(indices.tolist(), values.tolist()) if t["score"] > 0]
            right = any(t["label"] == prediction[0]["label"] for t in truth)
        return {"truth": truth, "prediction": prediction, "right": right}


class Classes(_Scored):
    """SNLI-VE, GLUE and one's own labels: the most likely class."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        super().__init__(dataset, task)
        self.metric = Accuracy()
        # a data set that is not one of ours may have no names
        self.names = getattr(dataset, "class_names", None) or dict(enumerate(task.labels))

    def labelled(self, sample: dict) -> bool:
        # test files carry -1
        return sample.get("label") is not None and int(sample["label"]) >= 0

    def compute(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        scores = full_precision(output.scores)
        return {"best": scores.argmax(-1), "probabilities": scores.softmax(-1)}

    def add(self, values: dict[str, Tensor], members: list[tuple[int, dict]], labelled: bool) -> list[dict]:
        probabilities = values["probabilities"].tolist()
        if labelled:
            label = torch.tensor([int(sample["label"]) for _, sample in members])
            self.metric.count_classes(values["best"], label, len(probabilities[0]))
        predictions = []
        for (index, sample), row in zip(members, probabilities):
            ranked = sorted(range(len(row)), key=lambda i: -row[i])
            self.rows[index] = {
                "id": sample["sample_id"],
                "label": self._name(ranked[0]),
                "index": ranked[0],
                "scores": [round(x, 6) for x in row],
                "truth": self._name(int(sample["label"])) if labelled else None,
            }
            predictions.append([{"label": self._name(i), "score": round(row[i], 6)} for i in ranked[:TOP]])
        return predictions

    def _name(self, index: int) -> str:
        return self.names.get(index, str(index))

    def write(self, stem: Path) -> Path:
        rows = (json.dumps(row, allow_nan=False) + "\n" for row in self._in_order())
        return write_aside(stem.with_suffix(".jsonl"), "".join(rows))

    def example(self, sample: dict, prediction: list[dict]) -> dict:
        if not self.labelled(sample):
            return {"truth": None, "prediction": prediction, "right": None}
        truth = self._name(int(sample["label"]))
        return {"truth": [{"label": truth}], "prediction": prediction, "right": truth == prediction[0]["label"]}


KINDS = {"set": Detection, "bce": Answers, "ce": Classes}
"""By ``Task.loss``."""


def _number(sample_id):
    """A question id as the number that the evaluation server wants, where it is one."""
    return int(sample_id) if str(sample_id).isdecimal() else sample_id


def write_aside(path: Path, text: str) -> Path:
    """Write aside and rename: a reader sees the old file or the new one. ``UserError`` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)
    except OSError as error:
        raise UserError(
            f"{printable(path, 400)}: cannot be written ({error.strerror or error}); make room or take another folder"
        ) from error
    return path
