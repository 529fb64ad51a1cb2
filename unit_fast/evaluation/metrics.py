"""What the numbers mean (SPEC 5.3): COCO average precision, VQA accuracy, accuracy, and what a constant guess reaches.

Every metric is a sum and a count, so that it does not depend on how the samples were batched.
"""

import collections
import contextlib
import functools
import importlib.util
import io
import logging
import math

import torch
from torch import Tensor

from unit_fast.errors import UserError, nearest, printable

SCORERS = ("auto", "pycocotools", "faster-coco-eval")
"""Implementations of COCO's average precision; they give the same numbers, the second faster."""

AP_KEYS = ("detection_mean_ap", "AP50", "AP75", "APs", "APm", "APl")
"""Names of the first six COCOeval figures: mean over IoU .50:.95, IoU .50, IoU .75, small, medium and large objects."""

_log = logging.getLogger("unit_fast.evaluate")


class VqaAccuracy:
    """Mean soft target at the most likely answer, answer 0 (``<unk>``) excluded."""

    def __init__(self):
        self.total, self.count, self.per_answer = 0.0, 0, None

    def count_answers(self, answers: Tensor, targets: Tensor) -> None:
        """``answers`` [B] int64 given (``best_answer``), ``targets`` [B,A] soft scores in 0..1 of questions
        that have answers; both on the host."""
        targets = targets.detach().double()
        self.total += targets.gather(1, answers[:, None]).sum().item()
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

    def count_classes(self, given: Tensor, label: Tensor, classes: int) -> None:
        """``given`` and ``label`` [B] int64, both on the host; ``classes`` there are."""
        self.right += int((given == label).sum())
        self.count += len(label)
        counts = torch.bincount(label, minlength=classes)
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


def coco_average_precision(
    ground_truth: dict, results: list[dict], image_ids=None, scorer: str = "auto", *, by_class: bool = False
) -> dict:
    """Figures of COCOeval for boxes, those of ``AP_KEYS`` that are defined on this ground truth.

    ``ground_truth`` is a COCO annotation dict (``images``, ``annotations``, ``categories``), ``results`` a COCO result
    list (``image_id``, ``category_id``, ``bbox`` xywh in pixels, ``score``). ``image_ids`` limits the evaluation to
    these images; None takes all of the ground truth, also those without results. A figure is undefined where the ground
    truth has no object of that size.

    Ids may be any numbers or texts. An annotation whose ``area`` is missing or not positive has its box's. One whose
    category is not in ``categories``, or whose image is not in ``images``, is not scored, as by the official tool;
    where there are no categories at all, those of the annotations are taken. All this is said in the log.

    by_class: with ``by_class`` too, category id -> its ``AP``, ``AP50`` (where it has an object) and number of
    ``objects``, crowd regions not counted.

    Raises:
        UserError: results or ``image_ids`` for an image that is not in the ground truth; a score or box that is not
            finite.
    """
    scorer = find_scorer(scorer)
    _say_once(scorer)
    truth, images, categories = _numbered(ground_truth)
    found = [_result(result, number, images, categories) for number, result in enumerate(results)]
    wanted = None
    if image_ids is not None:
        wanted = sorted({_number_of(i, images, "image_ids has image {}") for i in image_ids})
    if scorer == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth = _coco(COCO, truth)
        # loadRes fails on an empty list
        coco_found = coco_truth.loadRes(found) if found else _coco(COCO, {**truth, "annotations": []})
        evaluation = COCOeval(coco_truth, coco_found, "bbox")
        if wanted is not None:
            evaluation.params.imgIds = wanted
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 is COCOeval's "no such object"
    figures = {key: float(value) for key, value in zip(AP_KEYS, evaluation.stats) if value > -1}
    if by_class:
        chosen = set(images.values()) if wanted is None else set(wanted)
        objects = [a for a in truth["annotations"] if a["image_id"] in chosen and not a["iscrowd"]]
        counts = collections.Counter(a["category_id"] for a in objects)
        order = {number: k for k, number in enumerate(evaluation.params.catIds)}
        figures["by_class"] = {
            category: {**_of_class(evaluation.eval["precision"], order[number]), "objects": counts[number]}
            for category, number in categories.items()
        }
    return figures


def _of_class(precision, k: int) -> dict[str, float]:
    """``AP`` and ``AP50`` of the category at place ``k``, from COCOeval's [IoU, recall, category, area, most boxes]."""
    values = precision[:, :, k, 0, -1]
    return {} if (values < 0).all() else {"AP": float(values[values > -1].mean()), "AP50": float(values[0].mean())}


def _coco(kind, dataset: dict):
    coco = kind()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _numbered(ground_truth: dict) -> tuple[dict, dict, dict]:
    """(the parts of a ground truth that boxes need, image id -> number, category id -> number).

    The scorers keep ids in arrays of doubles, or of fixed width: ids from 2^53 on would collide. So images and
    categories are numbered from 1, in the order of their ids, on which the order of equal scores depends. Annotations
    are numbered from 1 too: COCOeval writes the id of the matched object and takes 0 for "unmatched", so that an object
    with id 0 would count as missed.
    """
    images = _numbers(image["id"] for image in ground_truth["images"])
    known = {c["id"]: str(c.get("name", c["id"])) for c in ground_truth.get("categories") or ()}
    used = {a["category_id"] for a in ground_truth["annotations"]}
    if used and not known:
        _log.warning("the ground truth has no categories: scored by the %d category ids of its annotations", len(used))
        known = {i: str(i) for i in used}
    if unnamed := used - known.keys():
        count = sum(a["category_id"] in unnamed for a in ground_truth["annotations"])
        _log.warning(
            "%d annotations are left out of the average precision, as by pycocotools: their categories (%s) are not "
            "among the ground truth's", count, printable(", ".join(map(str, _sorted(unnamed)))),
        )  # fmt: skip
    categories = _numbers(known)
    if strangers := sum(a["image_id"] not in images for a in ground_truth["annotations"]):
        _log.warning("%d annotations are of images that the ground truth does not list, and not scored", strangers)
    annotations = []
    for a in ground_truth["annotations"]:
        if a["category_id"] in unnamed or a["image_id"] not in images:
            continue
        box = [float(x) for x in a["bbox"]]
        area = float(a["area"]) if a.get("area") is not None else 0.0
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": images[a["image_id"]],
                "category_id": categories[a["category_id"]],
                "bbox": box,
                "area": area if area > 0 else box[2] * box[3],
                "iscrowd": int(a.get("iscrowd") or 0),
            }
        )
    sizes = {images[image["id"]]: image for image in ground_truth["images"]}
    truth = {
        "images": [{"id": n, **{k: i[k] for k in ("width", "height") if k in i}} for n, i in sorted(sizes.items())],
        "annotations": annotations,
        "categories": [{"id": number, "name": known[i]} for i, number in categories.items()],
    }
    return truth, images, categories


def _result(result: dict, number: int, images: dict, categories: dict) -> dict:
    """A result as ``loadRes`` takes it; a category that the ground truth does not have is number 0, never scored."""
    values = [float(x) for x in (*result["bbox"], result["score"])]
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"results[{number}]: box {values[:4]} with score {values[4]} is not finite; look at the model's weights"
        )
    return {
        "image_id": _number_of(result["image_id"], images, "results are for image {}"),
        "category_id": categories.get(result["category_id"], 0),
        "bbox": values[:4],
        "score": values[4],
    }


def _number_of(image_id, images: dict, what: str) -> int:
    if image_id not in images:
        raise UserError(
            f"{what.format(printable(repr(image_id)))}, which the ground truth does not have: they belong to another "
            "split"
        )
    return images[image_id]


def _sorted(ids) -> list:
    """Numbers first, then texts."""
    return sorted(set(ids), key=lambda i: (isinstance(i, str), i))


def _numbers(ids) -> dict:
    """Id -> its number from 1 on, in order."""
    return {i: number for number, i in enumerate(_sorted(ids), 1)}
