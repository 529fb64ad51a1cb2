"""Prediction with a trained model: ``load(run).predict(task, image=..., text=...)``."""

import logging
from pathlib import Path

import torch
from PIL import Image, ImageOps

from unit_fast.config import RunConfig
from unit_fast.data import BadImage, collate
from unit_fast.data.images.decode import load_image, to_rgb
from unit_fast.data.images.geometry import EvalTransform
from unit_fast.data.images.transforms import to_tensor
from unit_fast.data.text.wordpieces import WordPieces
from unit_fast.errors import UserError, nearest, printable
from unit_fast.evaluation.labels import VOCABULARY, TaskLabels, find_labels, read_labels
from unit_fast.evaluation.precision import autocast, finite_rows, nonfinite_weights, why_nonfinite
from unit_fast.evaluation.task_results import detections
from unit_fast.numerics import full_precision
from unit_fast.prediction.prediction import Prediction
from unit_fast.tasks import Task, get_task
from unit_fast.weights import checkpoint

PAIRS = ("qnli", "mnli", "qqp")
"""Tasks about two sentences."""

TEXT_OF = {
    "vqa2": "a question", "snli_ve": "a hypothesis about the image", "qnli": "a question and a sentence",
    "mnli": "a premise and a hypothesis", "qqp": "two questions", "sst2": "a sentence",
}  # fmt: skip
"""What the text of a task is."""

_log = logging.getLogger("unit_fast.predict")


def load(path: str | Path, *, device=None, ema: bool = False) -> "Predictor":
    """The model of a run folder (best checkpoint, else the last), of a checkpoint folder or of a weights file.

    device: ``cuda`` where there is one by default. ema: the averaged weights of a run that kept them. ``UserError``
    where there is no such run or its names (``labels.json``) are missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, config = checkpoint.load_model(path, ema=ema, device=device)
    if weights := nonfinite_weights(model):
        _log.warning("%s: %s: what such a model says means little", printable(path, 400), weights)
    folder = find_labels(path)
    if folder is None:
        raise UserError(
            f"{path}: no labels.json in it or above it, so the outputs have no names; give the run folder, or copy "
            f"labels.json and vocab.txt of the run beside the checkpoint"
        )
    vocabulary = folder / VOCABULARY
    return Predictor(model, config, read_labels(folder), vocabulary if vocabulary.is_file() else None)


class Predictor:
    """A model with the names of its outputs and its vocabulary.

    labels: data set key -> names. vocabulary: WordPiece file; None for a model without texts.
    """

    def __init__(self, model, config: RunConfig, labels: dict[str, TaskLabels], vocabulary: Path | None = None):
        self.model, self.config, self.labels = model.eval(), config, labels
        self.words = WordPieces(vocabulary, config.model.text.vocab_size) if vocabulary else None

    @property
    def tasks(self) -> list[str]:
        """Short names of the tasks the model knows."""
        return [get_task(name).short for name in self.config.model.tasks]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def predict(self, task: str, image=None, text=None, *, threshold: float = 0.5, top: int = 5) -> Prediction:
        """What the model says about an image and/or a text.

        task: data set key or short name. image: path of a JPEG or PNG file, or a PIL image; one with an EXIF
        orientation is turned as viewers show it, and boxes are in that picture. text: a sentence, or two
        for QNLI, MNLI and QQP. threshold: least score of a reported box. top: answers or classes reported. Returns a
        ``Prediction``. ``UserError`` on an unknown task, a missing, superfluous or unreadable input, or an output that
        is not finite.
        """
        known = self._task(task)
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold: {threshold} is not between 0 and 1")
        if top < 1:
            raise UserError(f"top: {top} is below 1")
        picture = self._image(known, image)
        text = self._text(known, text)
        sample = {"sample_id": 0}
        if picture is not None:
            transform = EvalTransform(self.config.data, floor=known.has_text)
            geometry = transform.geometry(picture.height, picture.width)
            sample |= {"image": to_tensor(geometry.apply_image(picture)), "orig_size": geometry.stored}
        if text is not None:
            ids, segments = self.words.encode(text, self.config.model.tasks[known.name].text_length)
            sample |= {"input_ids": ids, "token_type_ids": segments}
        batch = collate(known.name, [sample])
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        with torch.no_grad(), autocast(self.device, self.config.precision):
            output = self.model(batch.to(self.device, dtype))
        if not finite_rows(output).all():
            raise UserError(f"{known.short}: the model's output is not finite; {why_nonfinite(self.model)}")
        names = self.labels.get(known.name, TaskLabels())
        items = (
            self._boxes(known, output, batch, names, threshold)
            if known.is_detection
            else self._answers(known, output, names, top)
        )
        return Prediction(task=known.short, items=items, text=text, image=picture)

    def _boxes(self, task: Task, output, batch, names: TaskLabels, threshold: float) -> list[dict]:
        scores, classes, boxes = (x[0].tolist() for x in detections(output, batch.orig_size.to(self.device)))
        attributes = [None] * len(scores)
        if output.attribute_logits is not None and names.attributes:
            best = output.attribute_logits[0].max(-1)
            # the head's logits pass a ReLU: nothing above zero means that no attribute is likelier than another
            attributes = [
                names.attributes.get(i) if v > 0 else None for v, i in zip(best.values.tolist(), best.indices.tolist())
            ]
        height, width = batch.orig_size[0].tolist()
        items = []
        for score, label, (x, y, w, h), attribute in zip(scores, classes, boxes, attributes):
            if score >= threshold:
                corners = [min(max(v, 0.0), limit) for v, limit in zip((x, y, x + w, y + h), (width, height) * 2)]
                item = {"label": names.classes.get(label, f"class {label}"), "score": score, "box": corners}
                items.append(item | ({"attribute": attribute} if attribute else {}))
        return sorted(items, key=lambda item: -item["score"])

    @staticmethod
    def _answers(task: Task, output, names: TaskLabels, top: int) -> list[dict]:
        scores = full_precision(output.scores[0])
        if task.loss == "bce":
            # answer 0 is <unk> and never given
            values, indices = scores[1:].sigmoid().topk(min(top, len(scores) - 1))
            called = dict(enumerate(names.answers))
            indices = (indices + 1).tolist()
        else:
            values, indices = scores.softmax(-1).topk(min(top, len(scores)))
            called, indices = names.classes or dict(enumerate(task.labels)), indices.tolist()
        return [{"label": called.get(i, f"class {i}"), "score": v} for i, v in zip(indices, values.tolist())]

    # ------------------------------------------------------------------------------------------------- inputs

    def _task(self, name: str) -> Task:
        known = next((get_task(n) for n in self.config.model.tasks if name in (n, get_task(n).short)), None)
        if known is None:
            raise UserError(f"task {printable(name, 60)!r}: this model does not have it; {nearest(name, self.tasks)}")
        return known

    def _image(self, task: Task, image) -> Image.Image | None:
        if not task.has_image:
            if image is not None:
                raise UserError(f"{task.short} takes no image, only text ({TEXT_OF[task.short]}); leave the image out")
            return None
        if image is None:
            raise UserError(f"{task.short} needs an image; give image= (--image) the path of a JPEG or PNG file")
        if isinstance(image, Image.Image):
            if not 0 < image.width * image.height <= self.config.data.max_pixels:
                limit = self.config.data.max_pixels
                raise UserError(f"image: {image.width} x {image.height} pixels, the limit is {limit:,}; scale it")
            try:
                return _upright(to_rgb(image))
            except Exception as error:  # a file that Pillow reads only now
                raise UserError(
                    f"image: cannot be decoded ({printable(error)}); give a whole JPEG or PNG file"
                ) from error
        if not isinstance(image, (str, Path)):
            raise UserError(f"image: expected a path or a PIL image, found {type(image).__name__}")
        try:
            return _upright(load_image(image, self.config.data.max_pixels))
        except BadImage as error:
            raise UserError(f"image {printable(error.path, 400)}: {error.reason}; give a JPEG or PNG file") from None

    def _text(self, task: Task, text) -> str | tuple[str, str] | None:
        if not task.has_text:
            if text is not None and text != "":
                raise UserError(f"{task.short} takes no text, only an image; leave the text out")
            return None
        parts = list(text) if isinstance(text, (list, tuple)) else [] if text is None else [text]
        wanted = 2 if task.short in PAIRS else 1
        if len(parts) != wanted or not all(isinstance(part, str) and part.strip() for part in parts):
            how = 'text=("...", "...") (--text twice)' if wanted == 2 else 'text="..." (--text)'
            raise UserError(
                f"{task.short} needs {TEXT_OF[task.short]}, found {len(parts)} text{'' if len(parts) == 1 else 's'}"
                f"{' (empty)' if any(not str(part).strip() for part in parts) else ''}; give {how}"
            )
        if self.words is None:
            raise UserError(
                f"{task.short}: the run folder has no {VOCABULARY}; copy it from the data root's bert folder"
            )
        return tuple(parts) if wanted == 2 else parts[0]


def _upright(image: Image.Image) -> Image.Image:
    """A photograph as its camera held it upright. A damaged EXIF record tells no orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # foreign bytes fail in many ways
        _log.warning("image: its EXIF record cannot be read (%s); taken as stored", printable(error))
        return image
