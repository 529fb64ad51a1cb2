"""What an evaluation collects, one class a kind of task: sums for the metric, rows of the prediction file, examples.

``Detection`` (COCO, Visual Genome), ``Answers`` (VQA) and ``Classes`` (SNLI-VE, GLUE) have the same methods:
``labelled(sample)``, ``add(output, batch, samples, labelled)``, ``add_unreadable(index)``, ``result(limited, scorer)``,
``write(stem)``, ``example(sample, prediction)``.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.batch import Batch, Output
from unit_fast.detection.boxes import cxcywh_to_xywh, image_scale
from unit_fast.metrics import Accuracy, VqaAccuracy, best_answer, coco_average_precision
from unit_fast.tasks import Task

TOP = 5
"""Answers or classes listed for a sample."""

EXAMPLE_BOXES = 20
"""Most likely boxes kept of an example."""


def detections(output: Output, orig_size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B,Q], classes [B,Q] int64, boxes [B,Q,4] xywh in pixels of the original image) of the last layer.

    The class is the most likely real one, the score its probability; the softmax includes no-object (the last logit).
    ``orig_size`` [B,2] is height and width.
    """
    probabilities = full_precision(output.logits[-1]).softmax(-1)[..., :-1]
    scores, classes = probabilities.max(-1)
    boxes = full_precision(output.boxes[-1])
    size = orig_size.to(boxes)[:, None, [1, 0, 1, 0]]
    return scores, classes, cxcywh_to_xywh(boxes) * size


def full_precision(x: Tensor) -> Tensor:
    """At least single precision."""
    return x if x.dtype == torch.float64 else x.float()


class Detection:
    """COCO results of all queries of every image, each image once."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        self.dataset, self.task, self.attributes = dataset, task, attributes
        self.results, self.images = [], set()
        self.names, self.labelled_images = dataset.class_names, 0

    def labelled(self, sample: dict) -> bool:
        return sample.get("labels") is not None

    def add(self, output: Output, batch: Batch, samples: list[dict], labelled: bool) -> list[dict]:
        self.labelled_images += len(samples) * labelled
        scores, classes, boxes = (x.cpu() for x in detections(output, batch.orig_size))
        attributes = None
        if self.attributes and output.attribute_logits is not None:
            attributes = [x.cpu().tolist() for x in full_precision(output.attribute_logits).max(-1)]
        predictions = []
        for row, sample in enumerate(samples):
            # 1e-4 pixels and 1e-8 are below what any threshold sees, and halve the files
            found = [
                {
                    "image_id": sample["image_id"],
                    "category_id": category,
                    "bbox": [round(x, 4) for x in box],
                    "score": round(score, 8),
                }
                for category, box, score in zip(classes[row].tolist(), boxes[row].tolist(), scores[row].tolist())
            ]
            if attributes is not None:
                for item, score, label in zip(found, attributes[0][row], attributes[1][row]):
                    item.update(attr_label=label, attr_score=round(score, 8))
            if sample["image_id"] not in self.images:
                self.images.add(sample["image_id"])
                self.results += found
            predictions.append(sorted(found, key=lambda r: -r["score"])[:EXAMPLE_BOXES])
        return predictions

    def add_unreadable(self, index: int) -> None:
        # without a result it stays in the ground truth; a limited evaluation finds it by its sample id
        self.images.add(self.dataset.sample_id(index))

    def result(self, limited: bool, scorer: str) -> dict:
        if not self.labelled_images:
            return {"count": 0}
        truth = self.dataset.coco_ground_truth()
        known = [image["id"] for image in truth["images"]]
        ids = [i for i in known if i in self.images] if limited else known
        return {
            **coco_average_precision(truth, self.results, ids, scorer),
            "chance": 0.0,
            "count": len(ids),
        }

    def write(self, stem: Path) -> Path:
        return write_aside(stem.with_suffix(".json"), json.dumps(self.results, separators=(",", ":")))

    def example(self, sample: dict, prediction: list[dict]) -> dict:
        height, width = (int(x) for x in sample["orig_size"])
        truth = None
        if self.labelled(sample):
            boxes = cxcywh_to_xywh(torch.as_tensor(sample["boxes"]).double().reshape(-1, 4))
            boxes = boxes * image_scale(height, width, boxes)
            labels = torch.as_tensor(sample["labels"]).tolist()
            truth = [
                {"label": self._name(label), "bbox": [round(x, 2) for x in box]}
                for label, box in zip(labels, boxes.tolist())
            ]
        found = [{"label": self._name(r["category_id"]), "bbox": r["bbox"], "score": r["score"]} for r in prediction]
        return {"truth": truth, "prediction": found, "size": [height, width]}

    def _name(self, category: int) -> str:
        return str(self.names.get(category, category))


class _Scored:
    """Common to tasks with one row of scores a sample."""

    metric: Accuracy | VqaAccuracy

    def __init__(self, dataset, task: Task, attributes: bool = False):
        self.dataset, self.task, self.rows = dataset, task, []

    def add_unreadable(self, index: int) -> None:
        """Nothing: the sample is left out."""

    def result(self, limited: bool, scorer: str) -> dict:
        return self.metric.result()


class Answers(_Scored):
    """VQA: the most likely answer, ``<unk>`` excluded."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        super().__init__(dataset, task)
        self.metric, self.names = VqaAccuracy(), dataset.answers

    def labelled(self, sample: dict) -> bool:
        return sample.get("answer_scores") is not None

    def add(self, output: Output, batch: Batch, samples: list[dict], labelled: bool) -> list[dict]:
        scores = full_precision(output.scores)
        if labelled:
            self.metric.add(scores, batch.answer_scores)
        best = best_answer(scores).tolist()
        self.rows += [
            {"question_id": _number(s["sample_id"]), "answer": str(self.names[i])} for s, i in zip(samples, best)
        ]
        values, indices = scores[:, 1:].sigmoid().topk(min(TOP, scores.shape[1] - 1))
        return [self._ranked(i, v) for i, v in zip((indices + 1).tolist(), values.tolist())]

    def _ranked(self, indices, values) -> list[dict]:
        return [{"label": str(self.names[i]), "score": round(v, 6)} for i, v in zip(indices, values)]

    def write(self, stem: Path) -> Path:
        return write_aside(stem.with_suffix(".json"), json.dumps(self.rows))

    def example(self, sample: dict, prediction: list[dict]) -> dict:
        truth, right = None, None
        if self.labelled(sample):
            targets = torch.as_tensor(sample["answer_scores"])
            values, indices = targets.topk(min(TOP, len(targets)))
            truth = [t for t in self._ranked(indices.tolist(), values.tolist()) if t["score"] > 0]
            right = any(t["label"] == prediction[0]["label"] for t in truth)
        return {"truth": truth, "prediction": prediction, "right": right}


class Classes(_Scored):
    """SNLI-VE and GLUE: the most likely class."""

    def __init__(self, dataset, task: Task, attributes: bool = False):
        super().__init__(dataset, task)
        self.metric = Accuracy()

    def labelled(self, sample: dict) -> bool:
        # test files carry -1
        return sample.get("label") is not None and int(sample["label"]) >= 0

    def add(self, output: Output, batch: Batch, samples: list[dict], labelled: bool) -> list[dict]:
        scores = full_precision(output.scores)
        if labelled:
            self.metric.add(scores, batch.label)
        probabilities = scores.softmax(-1)
        predictions = []
        for sample, row in zip(samples, probabilities.tolist()):
            ranked = sorted(range(len(row)), key=lambda i: -row[i])
            self.rows.append(
                {
                    "id": sample["sample_id"],
                    "label": self._name(ranked[0]),
                    "index": ranked[0],
                    "scores": [round(x, 6) for x in row],
                    "truth": self._name(int(sample["label"])) if self.labelled(sample) else None,
                }
            )
            predictions.append([{"label": self._name(i), "score": round(row[i], 6)} for i in ranked[:TOP]])
        return predictions

    def _name(self, index: int) -> str:
        return self.task.labels[index] if index < len(self.task.labels) else str(index)

    def write(self, stem: Path) -> Path:
        return write_aside(stem.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in self.rows))

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
    """Write aside and rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path
