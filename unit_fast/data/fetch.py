"""Samples to the batches of one step, unreadable images replaced by other samples."""

import itertools
import time
from dataclasses import dataclass, field

import torch

from unit_fast.batch import Batch, real_places
from unit_fast.data.collate import collate
from unit_fast.data.errors import BadImage
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.geometry import Picture
from unit_fast.data.sampler import Request, Visit, substitute
from unit_fast.errors import UserError

MOST_TRIES = 50
"""Substitutes tried for one unreadable image before the data set is given up."""


@dataclass
class Step:
    """What one step trains on."""

    request: Request
    batches: list[Batch]
    """One a forward pass."""
    images_read: int = 0
    """Images tried, unreadable ones included."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and message of each unreadable image."""
    turned: list[str] = field(default_factory=list)
    """Paths of images that viewers turn, as their EXIF orientation says; here they are as stored."""
    error: str | None = None
    """Message of a user error met by a worker; raised in the training process."""
    read_s: float = 0.0
    """Seconds of one reader that it took."""
    ready: object = None
    """CUDA event after which the batches are on the device."""

    @property
    def task(self) -> str:
        return self.request.task

    @property
    def real(self) -> float:
        """Share of the images' area, or of the texts' places, that is not padding."""
        places = [b.pixel_mask if b.pixel_mask is not None else b.input_ids for b in self.batches]
        return sum(map(real_places, self.batches)) / max(sum(mask.numel() for mask in places), 1)


class Fetcher(torch.utils.data.Dataset):
    """Reads a request's samples and collates them. Runs in the worker processes of torchvision's engine."""

    def __init__(self, datasets: dict, seed: int, pad_text: dict[str, int], model=None):
        self.datasets, self.seed, self.pad_text, self.model = datasets, seed, pad_text, model

    def __getitem__(self, request: Request) -> Step:
        """The step with its pixels, read by the reference engine."""
        begun = time.monotonic()
        step, _ = self._step(request, self.datasets[request.task].get)
        step.read_s = time.monotonic() - begun
        return step

    def describe(self, request: Request, checked: CheckedImages) -> tuple[Step, list[list[Picture]]]:
        """The step without pixels, and what is to be read for each of its batches."""
        dataset = self.datasets[request.task]
        if not dataset.task.has_image:
            step, _ = self._step(request, dataset.get)
            return step, []
        return self._step(request, lambda index, key: dataset.describe(index, key, checked))

    def visited(self, request: Request) -> tuple[object, list[int]]:
        """The data set of a request and the indices of the images it visits."""
        dataset = self.datasets[request.task]
        visits = itertools.chain(*request.micro) if dataset.task.has_image else ()
        return dataset, [visit.index for visit in visits]

    def _step(self, request: Request, get) -> tuple[Step, list[list[Picture]]]:
        step, pictures = Step(request, []), []
        dataset, pad_text = self.datasets[request.task], self.pad_text.get(request.task, 0)
        try:
            for micro in request.micro:
                samples = [self._sample(dataset, get, visit, step) for visit in micro]
                step.batches.append(collate(request.task, samples, pad_text_to=pad_text, model=self.model))
                pictures.append([sample["picture"] for sample in samples if "picture" in sample])
        except UserError as error:
            step.error = str(error)
        return step, pictures[: len(step.batches)]

    def _sample(self, dataset, get, visit: Visit, step: Step) -> dict:
        task = step.task
        for attempt in range(1, MOST_TRIES + 1):
            step.images_read += dataset.task.has_image
            try:
                sample = get(visit.index, visit.key)
            except BadImage as error:
                step.bad.append((str(error.path), str(error)))
                visit = substitute(self.seed, task, len(dataset), visit, attempt)
                continue
            if sample.get("turned"):
                step.turned.append(sample["image_path"])
            return sample
        raise UserError(
            f"{task}: {MOST_TRIES} images in a row could not be read, the last {step.bad[-1][1]}; "
            "check the images with `unit-fast data check ROOT --decode`"
        )
