"""Prediction with a trained model: ``load(run).predict(task, image=..., text=...)``."""

import concurrent.futures
import itertools
import logging
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from unit_fast.config import RunConfig
from unit_fast.data import collate
from unit_fast.data.images.engine import decoding_threads
from unit_fast.data.images.geometry import EvalTransform
from unit_fast.data.images.transforms import to_tensor
from unit_fast.data.text.wordpieces import WordPieces
from unit_fast.errors import OutOfMemory, UserError, is_out_of_memory, nearest, printable
from unit_fast.evaluation.labels import VOCABULARY, TaskLabels, find_labels, read_labels
from unit_fast.evaluation.precision import autocast, finite_rows, nonfinite_weights, why_nonfinite
from unit_fast.evaluation.task_results import detections
from unit_fast.numerics import full_precision
from unit_fast.prediction.inputs import TEXT_OF, Source, Text, is_pair, sources, texts
from unit_fast.prediction.prediction import Prediction
from unit_fast.prediction.thresholds import THRESHOLD, read_thresholds
from unit_fast.tasks import Task, get_task
from unit_fast.weights import checkpoint

WINDOW = 4
"""Batches' worth of images that are read together, so that those of one size find each other."""

MOST_TOLD = 10
"""Texts whose unknown words are named."""

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
    return Predictor(
        model, config, read_labels(folder), vocabulary if vocabulary.is_file() else None,
        thresholds=read_thresholds(folder), name=str(path),
    )  # fmt: skip


@dataclass
class _Asked:
    """One question: what it is about, and what became of it."""

    source: Source | None
    text: Text | None
    sample: dict = field(default_factory=dict)
    error: str | None = None
    items: list[dict] = field(default_factory=list)
    likeliest: float | None = None

    @property
    def group(self) -> tuple | None:
        """Questions of one group may share a batch: padded images would change what the model sees."""
        return tuple(self.sample["image"].shape) if "image" in self.sample else None


class Predictor:
    """A model with the names of its outputs and its vocabulary.

    labels: data set key -> names. vocabulary: WordPiece file; None for a model without texts. thresholds: data set
    key -> least score of a box unless told otherwise. name: what the model is called in ``repr``.
    """

    def __init__(
        self,
        model,
        config: RunConfig,
        labels: dict[str, TaskLabels],
        vocabulary: Path | None = None,
        *,
        thresholds: dict[str, float] | None = None,
        name: str = "",
    ):
        self.model, self.config, self.labels = model.eval(), config, labels
        self.words = WordPieces(vocabulary, config.model.text.vocab_size) if vocabulary else None
        self.thresholds, self.name = thresholds or {}, name
        self._told: set[str] = set()
        """Texts whose unknown words were named."""

    def __repr__(self) -> str:
        return f"<Predictor {printable(self.name, 80)}: {', '.join(self.tasks)}; on {self.device}>"

    @property
    def tasks(self) -> list[str]:
        """Short names of the tasks the model knows."""
        return [get_task(name).short for name in self.config.model.tasks]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device, dtype: torch.dtype | None = None) -> "Predictor":
        """Move the model, e.g. to ``"cuda"``; returns itself."""
        try:
            self.model.to(device, dtype)
        except (RuntimeError, AssertionError, TypeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"device {device!r}: the model cannot be moved there ({printable(first)})") from None
        return self

    def threshold(self, task: str) -> float:
        """Least score of a reported box where none is asked for: what the run chose on its validation split, else
        0.5."""
        return self.thresholds.get(self._task(task).name, THRESHOLD)

    def predict(
        self, task: str, image=None, text=None, *, threshold: float | None = None, top: int = 5, batch_size: int = 8
    ) -> Prediction | list[Prediction]:
        """What the model says about an image and/or a text; about several, a list in their order.

        Args:
            task: data set key or short name.
            image: the path of a JPEG or PNG file, a PIL image, an array [H,W,3] uint8, or a tensor [3,H,W] of uint8 or
                of numbers from 0 to 1. Several: a folder (all its JPEG and PNG files), a pattern (``"in/*.jpg"``), an
                array [B,H,W,3], a tensor [B,3,H,W], or a list of any of these. A photograph with an EXIF orientation is
                turned as viewers show it, and boxes are in that picture.
            text: a sentence, or two for QNLI, MNLI and QQP; several: a list, of as many as there are images, or asked
                of one image. One text with several images is asked of each.
            threshold: least score of a reported box; None takes ``self.threshold(task)``.
            top: answers or classes reported.
            batch_size: so many images of one size, or texts, are computed together.

        Returns:
            A ``Prediction``, or a list of them. Among several one whose image cannot be read has ``error`` instead of
            an answer, and a line of log.

        Raises:
            UserError: an unknown task, a missing, superfluous or unreadable input, or an output that is not finite.
        """
        found = self.stream(task, image, text, threshold=threshold, top=top, batch_size=batch_size)
        return next(found) if found.single else list(found)

    def stream(
        self, task: str, image=None, text=None, *, threshold: float | None = None, top: int = 5, batch_size: int = 8
    ) -> "Stream":
        """``predict`` one prediction after the other, for more than one wants to wait for or keep in memory."""
        known = self._task(task)
        threshold = self.threshold(task) if threshold is None else threshold
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
            raise UserError(f"threshold: {threshold} is not between 0 and 1")
        for name, value in (("top", top), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise UserError(f"{name}: expected a whole number, found {type(value).__name__}")
            if value < 1:
                raise UserError(f"{name}: {value} is below 1")
        asked = self._asked(known, image, text)
        if isinstance(asked, list):
            return Stream(self._of_many(known, asked, threshold, top, batch_size), len(asked), single=False)
        return Stream(self._of_one(known, asked, threshold, top), 1, single=True)

    # ------------------------------------------------------------------------------------------------- inputs

    def _task(self, name: str) -> Task:
        known = next((get_task(n) for n in self.config.model.tasks if name in (n, get_task(n).short)), None)
        if known is None:
            raise UserError(f"task {printable(name, 60)!r}: this model does not have it; {nearest(name, self.tasks)}")
        return known

    def _asked(self, known: Task, image, text) -> _Asked | list[_Asked]:
        """The question, or the questions."""
        if not known.has_image and image is not None:
            what = TEXT_OF.get(known.short, "a text")
            raise UserError(f"{known.short} takes no image, only text ({what}); leave the image out")
        if known.has_image and image is None:
            raise UserError(f"{known.short} needs an image; give image= (--image) the path of a JPEG or PNG file")
        found = sources(image, self.config.data.max_pixels) if known.has_image else None
        asked = texts(known, text, is_pair(known, self.labels.get(known.name, TaskLabels())))
        if known.has_text and self.words is None:
            raise UserError(
                f"{known.short}: the run folder has no {VOCABULARY}; copy it from the data root's bert folder"
            )
        if isinstance(found, list) and isinstance(asked, list) and len(found) != len(asked):
            raise UserError(f"{len(found)} images and {len(asked)} texts: give one text, or one for each image")
        if not isinstance(found, list) and not isinstance(asked, list):
            return _Asked(found, asked)
        number = len(found) if isinstance(found, list) else len(asked)
        pictures = found if isinstance(found, list) else itertools.repeat(found, number)
        sentences = asked if isinstance(asked, list) else itertools.repeat(asked, number)
        return [_Asked(source, sentence) for source, sentence in zip(pictures, sentences)]

    def _read(self, task: Task, source: Source | None) -> tuple[Image.Image | None, dict, str | None]:
        """(image, its fields of a sample, why it cannot be read)."""
        if source is None:
            return None, {}, None
        try:
            picture = source.read()
            transform = EvalTransform(self.config.data, floor=task.has_text)
            geometry = transform.geometry(picture.height, picture.width)
            return picture, {"image": to_tensor(geometry.apply_image(picture)), "orig_size": geometry.stored}, None
        except UserError as error:
            return None, {}, str(error)

    def _unknown(self, text: Text | None) -> list[str]:
        """Words without word pieces; said once a text."""
        parts = [] if text is None else [text] if isinstance(text, str) else text
        words = list(dict.fromkeys(word for part in parts for word in self.words.unknown(part)))
        key = "\n".join(parts)
        if words and key not in self._told and len(self._told) <= MOST_TOLD:
            self._told.add(key)
            if len(self._told) > MOST_TOLD:
                _log.warning("text: unknown words of further texts are not named")
            else:
                named = ", ".join(repr(printable(word, 40)) for word in words[:5])
                more = f" and {len(words) - 5} more" if len(words) > 5 else ""
                _log.warning(
                    "text %r: the model's vocabulary does not have %s%s: the answer cannot rest on them",
                    printable(key, 80), named, more,
                )  # fmt: skip
        return words

    # ------------------------------------------------------------------------------------------------ answers

    def _of_one(self, task: Task, asked: _Asked, threshold: float, top: int) -> Iterator[Prediction]:
        picture, fields, asked.error = self._read(task, asked.source)
        self._ask(task, [asked], [fields], threshold, top, 1)
        if asked.error is not None:
            raise UserError(asked.error)
        yield self._prediction(task, asked, picture)

    def _of_many(
        self, task: Task, asked: list[_Asked], threshold: float, top: int, batch_size: int
    ) -> Iterator[Prediction]:
        def fields_of(source):
            return self._read(task, source)[1:]  # the pictures themselves would fill the memory

        size = WINDOW * batch_size
        with concurrent.futures.ThreadPoolExecutor(decoding_threads(self.config.data), "read") as pool:
            for window in (asked[start : start + size] for start in range(0, len(asked), size)):
                unique = list(dict.fromkeys(one.source for one in window))
                read = dict(zip(unique, pool.map(fields_of, unique)))
                for one in window:
                    one.error = read[one.source][1]
                self._ask(task, window, [read[one.source][0] for one in window], threshold, top, batch_size)
                for one in window:
                    if one.error is not None:
                        _log.warning("%s", printable(one.error, 600))
                    yield self._prediction(task, one, one.source)
                    one.sample = {}

    def _ask(
        self, task: Task, window: list[_Asked], fields: list[dict], threshold: float, top: int, batch_size: int
    ) -> None:
        """Fill in the answers of a window, or why there is none."""
        groups: dict[tuple | None, list[_Asked]] = {}
        for one, of_image in zip(window, fields):
            try:
                if one.error is None:
                    one.sample = {"sample_id": 0, **of_image, **self._pieces(task, one.text)}
                    groups.setdefault(one.group, []).append(one)
            except UserError as error:
                one.error = str(error)
        for members in groups.values():
            # texts of one length need no padding
            members.sort(key=lambda one: len(one.sample.get("input_ids", ())))
            for start in range(0, len(members), batch_size):
                self._compute(task, members[start : start + batch_size], threshold, top)

    def _pieces(self, task: Task, text: Text | None) -> dict:
        """The fields of a sample that its text gives."""
        if text is None:
            return {}
        ids, segments = self.words.encode(text, self.config.model.tasks[task.name].text_length)
        return {"input_ids": ids, "token_type_ids": segments}

    def _compute(self, task: Task, members: list[_Asked], threshold: float, top: int) -> None:
        batch = collate(task.name, [one.sample for one in members])
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        try:
            with torch.no_grad(), autocast(self.device, self.config.precision):
                output = self.model(batch.to(self.device, dtype))
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"{task.short}: out of memory with {len(members)} at a time; give a smaller batch_size (--batch)"
                ) from error
            raise
        names = self.labels.get(task.name, TaskLabels())
        fine = finite_rows(output).tolist()
        if not all(fine):
            why = f"{task.short}: the model's output is not finite; {why_nonfinite(self.model)}"
            if nonfinite_weights(self.model):  # nothing else will come
                raise UserError(why)
        if task.is_detection:
            found = self._boxes(output, batch, names)
        else:
            found = self._answers(task, output, names, top)
        for one, is_fine, items in zip(members, fine, found):
            if is_fine:
                one.items = items
                if task.is_detection:
                    one.likeliest = max((item["score"] for item in items), default=None)
                    one.items = [item for item in items if item["score"] >= threshold]
            else:
                one.error = why if one.source is None else f"{printable(one.source.name, 400)}: {why}"

    def _boxes(self, output, batch, names: TaskLabels) -> Iterator[list[dict]]:
        """All boxes of each image, the likeliest first."""
        scores, classes, boxes = (x.tolist() for x in detections(output, batch.orig_size.to(self.device)))
        attributes = [[None] * len(row) for row in scores]
        if output.attribute_logits is not None and names.attributes:
            best = output.attribute_logits.max(-1)
            # the head's logits pass a ReLU: nothing above zero means that no attribute is likelier than another
            attributes = [
                [names.attributes.get(i) if v > 0 else None for v, i in zip(*row)]
                for row in zip(best.values.tolist(), best.indices.tolist())
            ]
        for (height, width), *row in zip(batch.orig_size.tolist(), scores, classes, boxes, attributes):
            items = []
            for score, label, (x, y, w, h), attribute in zip(*row):
                corners = [min(max(v, 0.0), limit) for v, limit in zip((x, y, x + w, y + h), (width, height) * 2)]
                item = {"label": names.classes.get(label, f"class {label}"), "score": score, "box": corners}
                item["category_id"] = names.category_ids.get(label, label)
                items.append(item | ({"attribute": attribute} if attribute else {}))
            yield sorted(items, key=lambda item: -item["score"])

    @staticmethod
    def _answers(task: Task, output, names: TaskLabels, top: int) -> Iterator[list[dict]]:
        """The answers to each question, the likeliest first."""
        scores = full_precision(output.scores)
        if task.loss == "bce":
            # answer 0 is <unk> and never given
            values, indices = scores[:, 1:].sigmoid().topk(min(top, scores.shape[1] - 1))
            called, indices = dict(enumerate(names.answers)), indices + 1
        else:
            values, indices = scores.softmax(-1).topk(min(top, scores.shape[1]))
            called = names.classes or dict(enumerate(task.labels))
        for row in zip(indices.tolist(), values.tolist()):
            yield [{"label": called.get(i, f"class {i}"), "score": v} for i, v in zip(*row)]

    def _prediction(self, task: Task, one: _Asked, image: Image.Image | Source | None) -> Prediction:
        source, unknown = one.source, self._unknown(one.text) if one.error is None else []
        return Prediction(
            task=task.short, items=one.items, text=one.text, image=image, size=one.sample.get("orig_size"),
            name=None if source is None else source.name, path=None if source is None else source.path,
            unknown=unknown, error=one.error, likeliest=one.likeliest,
        )  # fmt: skip


class Stream(Iterator[Prediction]):
    """Predictions made as they are asked for; ``len`` tells how many there are in all. ``single``: one image or text
    was given, not a list of one."""

    def __init__(self, predictions: Iterator[Prediction], total: int, *, single: bool):
        self.predictions, self.total, self.single = predictions, total, single

    def __len__(self) -> int:
        return self.total

    def __next__(self) -> Prediction:
        return next(self.predictions)
