"""What the numbers mean (SPEC 5.3): COCO average precision, VQA accuracy, accuracy, and what a constant guess reaches.

Every metric is a sum and a count, so that it does not depend on how the samples were batched.
"""

import contextlib
import functools
import importlib.util
import io
import logging

import torch
from torch import Tensor

from unit_fast.errors import UserError, nearest

SCORERS = ("auto", "pycocotools", "faster-coco-eval")
"""Implementations of COCO's average precision; they give the same numbers, the second faster."""

AP_KEYS = ("detection_mean_ap", "AP50", "AP75", "APs", "APm", "APl")
"""Names of the first six COCOeval figures: mean over IoU .50:.95, IoU .50, IoU .75, small, medium and large objects."""

_log = logging.getLogger("unit_fast.evaluate")


class VqaAccuracy:
    """Mean soft target at the most likely answer, answer 0 (``<unk>``) excluded."""

    def __init__(self):
        self.total, self.count, self.per_answer = 0.0, 0, None

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """``scores`` [B,A] logits, ``targets`` [B,A] soft scores in 0..1 of questions that have answers."""
        targets = targets.detach().double().cpu()
        self.total += targets.gather(1, best_answer(scores).cpu()[:, None]).sum().item()
        self.count += len(targets)
        self.per_answer = targets.sum(0) + (0.0 if self.per_answer is None else self.per_answer)

    def result(self) -> dict:
        """``vqa_accuracy``, ``chance`` (the best constant answer's accuracy on these questions), ``count``."""
        if not self.count:
            return {"count": 0}
        constant = self.per_answer[1:].max().item() / self.count
        return {"vqa_accuracy": self.total / self.count, "chance": constant, "count": self.count}


class Accuracy:
    """Share of samples whose most likely class is the true one."""

    def __init__(self):
        self.right, self.count, self.per_class = 0, 0, None

    def add(self, scores: Tensor, label: Tensor) -> None:
        """``scores`` [B,K] logits, ``label`` [B] int64."""
        label = label.cpu()
        self.right += int((scores.detach().argmax(-1).cpu() == label).sum())
        self.count += len(label)
        counts = torch.bincount(label, minlength=scores.shape[-1])
        self.per_class = counts + (0 if self.per_class is None else self.per_class)

    def result(self) -> dict:
        """``accuracy``, ``chance`` (the largest class's share), ``count``."""
        if not self.count:
            return {"count": 0}
        chance = self.per_class.max().item() / self.count
        return {"accuracy": self.right / self.count, "chance": chance, "count": self.count}


def best_answer(scores: Tensor) -> Tensor:
    """[B] int64: the most likely answer of ``scores`` [B,A]; answer 0 (``<unk>``) is never given."""
    return scores.detach()[:, 1:].argmax(-1) + 1


def find_scorer(name: str = "auto") -> str:
    """The scorer in force: ``auto`` takes faster-coco-eval where it is installed. ``UserError`` on an absent one."""
    if name not in SCORERS:
        raise UserError(f"coco_scorer: {name!r} is not one; {nearest(name, SCORERS)}")
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if name == "faster-coco-eval" and not installed:
        raise UserError(
            "coco_scorer: faster-coco-eval is not installed; pip install faster-coco-eval or choose pycocotools"
        )
    return name if name != "auto" else "faster-coco-eval" if installed else "pycocotools"


@functools.cache
def _say_once(scorer: str) -> None:
    _log.info("COCO average precision by %s", scorer)


def coco_average_precision(ground_truth: dict, results: list[dict], image_ids=None, scorer: str = "auto") -> dict:
    """Figures of COCOeval for boxes, those of ``AP_KEYS`` that are defined on this ground truth.

    ``ground_truth`` is a COCO annotation dict (``images``, ``annotations``, ``categories``), ``results`` a COCO result
    list (``image_id``, ``category_id``, ``bbox`` xywh in pixels, ``score``). ``image_ids`` limits the evaluation to
    these images; None takes all of the ground truth, also those without results. A figure is undefined where the ground
    truth has no object of that size.
    """
    scorer = find_scorer(scorer)
    _say_once(scorer)
    truth = _plain(ground_truth)
    known = {image["id"] for image in truth["images"]}
    unknown = [r["image_id"] for r in results if r["image_id"] not in known]
    if unknown:
        raise UserError(
            f"results are for image {unknown[0]!r}, which the ground truth does not have: they belong to another split"
        )
    if scorer == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth = _coco(COCO, truth)
        # copies, since loadRes writes into its list; and it fails on an empty one
        copies = [{k: r[k] for k in ("image_id", "category_id", "bbox", "score")} for r in results]
        found = coco_truth.loadRes(copies) if copies else _coco(COCO, {**truth, "annotations": []})
        evaluation = COCOeval(coco_truth, found, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(set(image_ids))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 is COCOeval's "no such object"
    return {key: float(value) for key, value in zip(AP_KEYS, evaluation.stats) if value > -1}


def _coco(kind, dataset: dict):
    coco = kind()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _plain(ground_truth: dict) -> dict:
    """The parts of a ground truth that boxes need.

    Annotations are numbered from 1: COCOeval writes the id of the matched object and takes 0 for "unmatched", so that
    an object with id 0 would count as missed.
    """
    annotations = [
        {
            "id": number,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [float(x) for x in a["bbox"]],
            "area": float(a["area"]) if a.get("area") is not None else float(a["bbox"][2]) * float(a["bbox"][3]),
            "iscrowd": int(a.get("iscrowd", 0)),
        }
        for number, a in enumerate(ground_truth["annotations"], start=1)
    ]
    images = [{k: image[k] for k in ("id", "width", "height") if k in image} for image in ground_truth["images"]]
    categories = [{"id": c["id"], "name": str(c.get("name", c["id"]))} for c in ground_truth["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}
