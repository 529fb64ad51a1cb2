"""Files of many predictions: JSON, COCO results, a folder of pictures."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from unit_fast.data.store.files import read_json
from unit_fast.errors import UserError, printable
from unit_fast.prediction.prediction import KINDS, Prediction, write

_NUMBER = re.compile(r"(?:COCO_[a-z]+20[0-9]{2}_)?([0-9]+)")
"""How COCO calls its images."""

_log = logging.getLogger("unit_fast.predict")


def write_json(predictions: Prediction | Sequence[Prediction], path: str | Path) -> Path:
    """Write the plain values (``Prediction.to_dict``) of one prediction, or a list of those of several."""
    one = isinstance(predictions, Prediction)
    values = predictions.to_dict() if one else [prediction.to_dict() for prediction in predictions]
    write(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
    return Path(path)


def write_coco(
    predictions: Prediction | Sequence[Prediction], path: str | Path, annotations: str | Path | dict | None = None
) -> Path:
    """Write boxes as COCO results: a list of ``image_id``, ``category_id``, ``bbox`` [x, y, width, height] in pixels,
    ``score``, and ``file_name``, which COCO's own tools leave alone.

    annotations: a file in COCO's format, whose ``images`` give the ids by file name, or a dict of these. Without it
    the ids are the numbers that the files are called by, as COCO's are, where all are; else images are counted from 1.
    ``category_id`` is the class's id in the training data. ``UserError`` on predictions of another kind, or an image
    that ``annotations`` does not have.
    """
    predictions = [predictions] if isinstance(predictions, Prediction) else list(predictions)
    for prediction in predictions:
        if not prediction.is_detection:
            raise UserError(f"COCO results hold boxes, and {prediction.task} has none; write JSON")
    names = [prediction.name or "image" for prediction in predictions]
    ids = _image_ids(names, annotations)
    rows = []
    for prediction, name, image_id in zip(predictions, names, ids):
        for item in prediction.items:
            x1, y1, x2, y2 = item["box"]
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": item["category_id"],
                    "bbox": [round(v, 4) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(item["score"], 8),
                    "file_name": Path(name).name,
                }
            )
    write(path, json.dumps(rows, allow_nan=False) + "\n")
    return Path(path)


def read_image_ids(path: str | Path) -> dict:
    """File name -> image id of an annotation file in COCO's format. ``UserError`` where it is not one."""
    content = read_json(path, drop=("segmentation",))
    try:
        return {str(image["file_name"]): image["id"] for image in content["images"]}
    except (KeyError, TypeError):
        raise UserError(
            f"{printable(path, 400)}: no list 'images' with 'id' and 'file_name'; give a file in COCO's format"
        ) from None


def _image_ids(names: list[str], annotations: str | Path | dict | None) -> list:
    stems = [Path(name).stem for name in names]
    if annotations is None:
        numbers = [int(found[1]) for stem in stems if (found := _NUMBER.fullmatch(stem))]
        if len(set(numbers)) == len(stems):
            return numbers
        _log.warning(
            "COCO results: the files are not called by numbers, so that image_id counts them from 1; give "
            "annotations= (--annotations FILE) to take the ids of an annotation file"
        )
        return list(range(1, len(names) + 1))
    known = annotations if isinstance(annotations, dict) else read_image_ids(annotations)
    where = "annotations" if isinstance(annotations, dict) else printable(annotations, 400)
    by_name: dict[str, list] = {}
    for file_name, image_id in known.items():
        by_name.setdefault(Path(file_name).name, []).append(image_id)
    found = []
    for name in names:
        exact = [i for file_name, i in known.items() if Path(name).as_posix().endswith("/" + file_name)]
        ids = exact if len(exact) == 1 else by_name.get(Path(name).name, [])
        if len(ids) != 1:
            what = "has no image" if not ids else f"has {len(ids)} images"
            raise UserError(f"{where}: {what} called {printable(Path(name).name)}; give the file of these images")
        found.append(ids[0])
    return found


class Pictures:
    """A folder that takes the picture of one prediction after the other.

    Files are called as their images, texts by their number; names that meet get a number. ``UserError`` where the
    folder cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.taken = Path(folder), set()
        if self.folder.suffix.lower() in KINDS and not self.folder.is_dir():
            raise UserError(f"--save {printable(folder, 400)}: several predictions are drawn; give a folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--save {printable(folder, 400)}: not a folder that can be written ({error.strerror or error})"
            ) from None

    def add(self, prediction: Prediction, number: int) -> Path:
        """Draw the prediction that is the ``number``-th; returns the path of the picture."""
        stem = Path(prediction.name).stem if prediction.path is not None else f"{prediction.task}_{number:04d}"
        name, again = f"{stem}.jpg", 1
        while name.lower() in self.taken:
            again += 1
            name = f"{stem}_{again}.jpg"
        self.taken.add(name.lower())
        return prediction.save(self.folder / name)
