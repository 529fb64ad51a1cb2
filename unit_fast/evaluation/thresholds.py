"""From which score on boxes are worth showing: the threshold with the best F1 on a split, and where a run keeps it."""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from unit_fast.errors import UserError
from unit_fast.files import replace
from unit_fast.overlap import iou, share_inside
from unit_fast.tasks import get_task

FILE = "thresholds.json"
"""Of a run folder: data set key -> ``threshold``, ``f1``, ``iou``, ``split`` and the ``step`` of the evaluation."""

IOU = 0.5


class Threshold(NamedTuple):
    """A score, and what taking the boxes that reach it gives."""

    score: float
    f1: float


def best_threshold(truth: dict, results: list[dict], image_ids=None) -> Threshold | None:
    """The score threshold with the best F1 over all images and categories, or None without objects or results.

    Args:
        truth: COCO ground truth. Crowd regions are neither to be found nor count against a box that lies in one.
        results: COCO results.
        image_ids: of these images alone.

    A box is right where COCOeval says so at IoU ``IOU``: in the order of scores each takes the object of its category
    that it overlaps most of those that are still free. So a second box of one object is wrong. F1 is 2 right /
    (boxes + objects); the threshold lies in the middle between the last score taken and the next.
    """
    wanted = None if image_ids is None else set(image_ids)
    objects, crowds = defaultdict(list), defaultdict(list)
    for a in truth["annotations"]:
        if wanted is None or a["image_id"] in wanted:
            kind = crowds if a.get("iscrowd") else objects
            kind[a["image_id"], a["category_id"]].append(a["bbox"])
    total = sum(map(len, objects.values()))
    free = {key: dict(enumerate(boxes)) for key, boxes in objects.items()}
    judged = []
    for r in sorted(results, key=lambda r: -r["score"]):
        if wanted is not None and r["image_id"] not in wanted:
            continue
        key = r["image_id"], r["category_id"]
        left = free.get(key, {})
        overlap, index = max(((iou(box, r["bbox"]), i) for i, box in left.items()), default=(0.0, -1))
        if overlap >= IOU:
            del left[index]
        elif any(share_inside(r["bbox"], crowd) >= IOU for crowd in crowds.get(key, ())):
            continue
        judged.append((r["score"], overlap >= IOU))
    best, right = None, 0
    for number, (score, hit) in enumerate(judged, 1):
        right += hit
        after = judged[number][0] if number < len(judged) else 0.0
        f1 = 2 * right / (number + total)
        if hit and after < score and (best is None or f1 > best.f1):
            best = Threshold((score + after) / 2, f1)
    return best


def write_thresholds(folder: str | Path, metrics: dict[str, dict], *, split: str, step: int | None = None) -> None:
    """Keep the thresholds among the figures of an evaluation (``evaluate``) in a run folder, those of other tasks too.

    Only those of the split ``val``: predictions are shown by them.
    """
    found = {
        get_task(short).name: {
            "threshold": figures["threshold"], "f1": figures["f1"], "iou": IOU, "split": split, "step": step,
        }
        for short, figures in metrics.items()
        if "threshold" in figures and split == "val"
    }  # fmt: skip
    if found:
        replace(Path(folder) / FILE, json.dumps(read_thresholds(folder) | found, indent=2) + "\n")


def read_thresholds(folder: str | Path) -> dict[str, dict]:
    """What ``write_thresholds`` wrote; empty where there is no file."""
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, an evaluation writes it anew") from None
    return found if isinstance(found, dict) else {}
