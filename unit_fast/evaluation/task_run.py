"""One pass of a model over one split of one task: batches in, predictions, sums and a few examples out."""

import contextlib
import logging
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from unit_fast.batch import Batch, Output
from unit_fast.config import RunConfig
from unit_fast.data import BadImage
from unit_fast.data.bad_images import BadImages
from unit_fast.data.images.decode import load_image
from unit_fast.data.images.engine import engine_of
from unit_fast.data.split_reader import SplitReader, groups
from unit_fast.errors import UserError, printable
from unit_fast.evaluation.precision import autocast, finite_rows, why_nonfinite
from unit_fast.evaluation.readback import Readback
from unit_fast.evaluation.task_results import KINDS
from unit_fast.numerics import in_full_precision
from unit_fast.tasks import Task

EXAMPLES = 8
"""Samples of each task kept for the report: evenly spread over the split, the same at every evaluation."""

WINDOW, WINDOW_ON_GPU = 8, 4096
"""Batches, and samples on a GPU, that are grouped by size together."""

READ_EVERY = 32
"""Batches whose values are fetched from the device in one copy."""

_log = logging.getLogger("unit_fast.evaluate")


class TaskRun:
    """One pass over one split of one task; predictions, sums and examples."""

    def __init__(self, model, config: RunConfig, task: Task, dataset, split, device, limit, progress, attributes):
        self.model, self.config, self.task, self.dataset, self.split = model, config, task, dataset, split
        self.device = device
        self.kind = KINDS[task.loss](dataset, task, attributes)
        self.loss, self.loss_count = 0.0, 0
        self.images: set[str] = set()
        """Images that were read; a data set may have several samples of one."""
        self.bad_images: dict[str, str] = {}
        """Path and message of those that could not be."""
        total = len(dataset)
        self.limited = 0 < limit < total
        self.indices = spread(total, limit if self.limited else total)
        self.shown = {self.indices[i] for i in spread(len(self.indices), EXAMPLES)}
        self.examples = {}
        started = time.perf_counter()
        self._run(progress)
        self.seconds = time.perf_counter() - started

    def _run(self, progress: bool) -> None:
        """All batches. The device is read once in ``READ_EVERY`` of them, while the next ones are computed."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        waiting, flying, done = [], None, 0
        with (
            _progress_bar(f"evaluate {self.task.short}", len(self.indices), progress) as advance,
            contextlib.closing(self._groups()) as groups,
        ):
            for batch, members, labelled in groups:
                batch = batch.to(self.device, dtype)
                with autocast(self.device, self.config.precision):
                    output = self.model(batch)
                waiting.append((members, labelled, self._values(output, batch, labelled)))
                if len(waiting) == READ_EVERY:
                    flying = self._read_back(waiting, flying)
                    waiting = []
                advance(len(members))
                done += len(members)
            if waiting:
                flying = self._read_back(waiting, flying)
            if flying:
                self._take(*flying)
        self._judge(len(self.images) + len(self.bad_images))
        if not done:
            raise UserError(f"none of {len(self.indices)} samples could be read (first: {self._first_bad()})")

    def _values(self, output: Output, batch: Batch, labelled: bool) -> dict[str, Tensor]:
        """What is wanted of a batch, still on the device."""
        values = {**self.kind.compute(output, batch), "finite": finite_rows(output)}
        if labelled:
            values["loss"] = self._loss(in_full_precision(output), batch)
        return values

    def _loss(self, output: Output, batch: Batch) -> Tensor:
        """The loss of each sample [B] as a batch of it alone has it; where that does not depend on the batch, [1] the
        mean.

        Detection losses are divided by the number of objects of the batch: image by image they do not depend on how
        images were batched, and equal the published runs' one image a process.
        """
        if not self.task.is_detection:
            return sum(self.model.losses(output, batch, split=self.split).values()).reshape(1)
        query = self.model.match(output, batch)
        rows = (
            sum(self.model.losses(*pick(output, batch, row), query[:, row : row + 1], self.split).values())
            for row in range(len(batch))
        )
        return torch.stack(list(rows))

    def _read_back(self, waiting: list, flying: tuple | None) -> tuple:
        """Send for the values of ``waiting`` batches, and take those sent for before, which by now have come."""
        sent = [(members, labelled) for members, labelled, _ in waiting], Readback([values for *_, values in waiting])
        if flying:
            self._take(*flying)
        return sent

    def _take(self, batches: list[tuple[list, bool]], sent: Readback) -> None:
        """Count values that have come."""
        for (members, labelled), values in zip(batches, sent.take()):
            finite = values.pop("finite").tolist()
            if not all(finite):
                self._not_finite([sample for (_, sample), fine in zip(members, finite) if not fine], "output")
            if labelled:
                losses = values.pop("loss").tolist()
                if not all(map(math.isfinite, losses)):
                    self._not_finite([sample for _, sample in members], "loss")
                self.loss += sum(losses) if self.task.is_detection else losses[0] * len(members)
                self.loss_count += len(members)
            predictions = self.kind.add(values, members, labelled)
            for (index, sample), prediction in zip(members, predictions):
                if index in self.shown:
                    self.examples[index] = self._example(sample, prediction)

    def _not_finite(self, samples: list[dict], what: str) -> None:
        """Predictions made of NaN are some class or box or other, and a metric of them says nothing."""
        raise UserError(
            f"the model's {what} is not finite for sample {printable(samples[0]['sample_id'])}"
            f"{f' and {len(samples) - 1} more of its batch' if len(samples) > 1 else ''}; {why_nonfinite(self.model)}"
        )

    def _groups(self):
        """(batch, (index, sample without pixels) of its rows, whether they have labels) of all readable samples."""
        config, on_gpu = self.config, self.device.type == "cuda"
        size = config.eval_batch
        # On a CPU figures stay what they are to the last digit: the reference engine reads, and what is grouped is
        # what always was. On a GPU batches are fuller, and decoded as for training.
        window = WINDOW_ON_GPU if on_gpu else size * WINDOW
        reader = SplitReader(
            self.dataset, self.task, groups(self.dataset, self.task, self.indices, size, window), size,
            labelled=self.kind.labelled, data=config.data, device=self.device,
            pad_text=config.model.tasks[self.task.name].text_length if config.data.pad_text else 0,
            engine=engine_of(config.data) if on_gpu and self.task.has_image else None,
        )  # fmt: skip
        with reader:
            for part in reader:
                for index, error in part.unreadable:
                    self._unreadable(index, error)
                for batch, members, labelled in zip(part.batches, part.members, part.labelled):
                    self.images.update(str(s["image_path"]) for _, s in members if s.get("image_path"))
                    yield batch, members, labelled

    def _unreadable(self, index: int, error: BadImage) -> None:
        self.kind.add_unreadable(index)
        if error.path not in self.bad_images:
            self.bad_images[error.path] = printable(error, 400)
            _log.warning("%s: %s", self.task.short, self.bad_images[error.path])
        self._judge(len(self.indices))

    def _judge(self, images: int) -> None:
        """``UserError`` when more of so many images are bad than training would bear."""
        share, bad = self.config.data.max_bad_share, len(self.bad_images)
        if bad > BadImages(share, read=images).tolerated():
            raise UserError(
                f"{bad} of {images} images could not be read, more than the share of {share:g} allowed (first: "
                f"{self._first_bad()}). Repair them or raise --data.max-bad-share"
            )

    def _first_bad(self) -> str:
        return next(iter(self.bad_images.values()))

    def _example(self, sample: dict, prediction) -> dict:
        text = sample.get("text")
        return {
            "id": sample["sample_id"],
            "text": list(text) if isinstance(text, (tuple, list)) else text,
            "image_path": str(sample["image_path"]) if sample.get("image_path") else None,
            **self.kind.example(sample, prediction),
        }

    def metrics(self, scorer: str) -> dict:
        figures = self.kind.result(self.limited, scorer)
        if self.loss_count:
            figures["loss"] = self.loss / self.loss_count
        if self.bad_images:
            figures["unreadable"] = len(self.bad_images)
        figures["seconds"] = round(self.seconds, 3)
        return figures

    def write_predictions(self, folder: Path) -> Path:
        return self.kind.write(folder / f"{self.task.short}_{self.split}")

    def write_examples(self, out: Path) -> dict:
        """The examples, with a small copy of each image under ``out/examples/``: a run folder can be moved."""
        rows = []
        for number, index in enumerate(i for i in self.indices if i in self.examples):
            row = self.examples[index]
            if row["image_path"]:
                row["image"] = f"examples/{self.task.short}_{self.split}_{number}.jpg"
                try:
                    _write_thumbnail(self.dataset.image_path(index), out / row["image"], self.config.data.max_pixels)
                except BadImage as error:  # it was there when it was evaluated
                    _log.warning("%s: example without its picture: %s", self.task.short, error)
                    del row["image"]
            rows.append(row)
        return {"split": self.split, "samples": rows}


def spread(total: int, count: int) -> list[int]:
    """``count`` indices evenly spread over ``range(total)``, all of it where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def pick(output: Output, batch: Batch, row: int) -> tuple[Output, Batch]:
    """Output and batch of the one sample ``row``."""
    one = slice(row, row + 1)
    layered = {"hidden_states", "logits", "boxes", "layer_scores"}
    values = {k: v for k, v in vars(output).items() if isinstance(v, Tensor)}
    output = Output(**{k: v[:, one] if k in layered else v[one] for k, v in values.items()})
    lists = {k: v[one] for k in ("sample_ids", "sizes") if (v := getattr(batch, k)) is not None}
    return output, Batch(task=batch.task, **{k: v[one] for k, v in batch.tensors().items()}, **lists)


@contextlib.contextmanager
def _progress_bar(title: str, total: int, wanted: bool):
    """Yields ``advance(samples)``; draws on a terminal only, and leaves nothing behind."""
    if not wanted or not sys.stderr.isatty():
        yield lambda samples: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(title, total=total)
        yield lambda samples: bar.advance(job, samples)


def _write_thumbnail(source, target: Path, max_pixels: int) -> None:
    image = load_image(source, max_pixels)
    image.thumbnail((512, 512))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "JPEG", quality=85)
    except OSError as error:
        raise UserError(
            f"{printable(target, 400)}: cannot be written ({error.strerror or error}); make room or take another folder"
        ) from error
