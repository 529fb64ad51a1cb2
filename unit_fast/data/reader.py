"""Steps with pixels by DALI: described, decoded and placed a few steps ahead, in the order of the requests.

A step is first described (which images, what happens to them, all else of the batch), then its images are fed to DALI,
and when their turn comes they are placed into the batch. An image that DALI cannot decode although Pillow could, or
that has changed since it was checked, costs the pipeline: a new one is made, the steps that were under way are
described again, and Pillow decodes the offender from then on.
"""

import collections
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unit_fast.config import DataConfig
from unit_fast.data.checked import CheckedImages
from unit_fast.data.dali import DecodeFailed, Pipeline, check
from unit_fast.data.decode import load_image, read_bytes
from unit_fast.data.errors import BadImage
from unit_fast.data.images import Buffers, Picture, place
from unit_fast.errors import printable

AHEAD = 2
"""Steps described and being decoded while the one before is placed."""
MOST_REPAIRS = 10
"""Pipelines lost in a row, without a step in between, before reading is given up."""

_log = logging.getLogger("unit_fast.data")


@dataclass
class _Underway:
    """A step whose images are with DALI."""

    request: object
    step: object
    pictures: list[list[Picture]]
    """One list a forward pass; empty for tasks without images."""


class DaliSteps:
    """Iterates over the ``Step`` of each request.

    Args:
        fetcher: describes a request (``loader.Fetcher``).
        requested: the requests, in order; taken a few steps ahead.
        data: engine settings.
        checked: what is known of the images.
        most: largest batch.
        threads: DALI's threads, and as many that place pixels.
        device: where the pixels are wanted. On a CUDA device the images are copied there as decoded, and placed there.
    """

    def __init__(
        self,
        fetcher,
        requested: Iterable,
        data: DataConfig,
        checked: CheckedImages,
        most: int,
        threads: int,
        device: torch.device,
    ):
        check(data.dali_graph, data.decoder, device)
        self.fetcher, self.requested, self.data, self.checked = fetcher, requested, data, checked
        self.most, self.threads, self.device = most, threads, device
        self.buffers, self.pipeline, self.repairs = Buffers(), None, 0
        self.pool = _single_threaded(threads)
        self.underway: collections.deque[_Underway] = collections.deque()

    def __iter__(self) -> Iterator:
        begun = time.monotonic()
        try:
            for request in self.requested:
                self.underway.append(self._begin(request))
                if len(self.underway) > AHEAD:
                    step = self._finish()
                    step.read_s = time.monotonic() - begun
                    yield step
                    begun = time.monotonic()
            while self.underway:
                step = self._finish()
                step.read_s = time.monotonic() - begun
                yield step
                begun = time.monotonic()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.checked.close()

    # ------------------------------------------------------------------------------------------------------- begin

    def _begin(self, request) -> _Underway:
        """Describe a step and feed its images to DALI."""
        # those not yet checked, by all threads at once
        list(self.pool.map(self._check, self.fetcher.image_paths(request)))
        for _ in range(MOST_REPAIRS):
            step, pictures = self.fetcher.describe(request, self.checked)
            try:
                encoded = [[self._encoded(p.path) for p in group] for group in pictures]
            except BadImage as error:  # gone or changed since a moment ago: the description will find that out
                changing = error
                self.checked.forget(error.path)
                continue
            for group, contents, batch in zip(pictures, encoded, step.batches):
                if group:
                    self._pipeline().feed(contents, [p.geometry for p in group], batch.pixel_mask.shape[1:])
            return _Underway(request, step, pictures)
        raise BadImage(changing.path, f"changes while it is read ({changing.reason})")

    def _check(self, path) -> None:
        with contextlib.suppress(BadImage):  # the description meets it again, and replaces it
            self.checked.facts(path)

    def _encoded(self, path) -> bytes:
        """What DALI is given: the file, or what Pillow made of it, uncompressed."""
        if self.checked.facts(path).plain:
            return read_bytes(path)
        image = load_image(path, self.checked.max_pixels)
        return b"P6\n%d %d\n255\n" % image.size + image.tobytes()

    def _pipeline(self) -> Pipeline:
        if self.pipeline is None:
            data = self.data
            self.pipeline = Pipeline(self.most, self.threads, data.dali_graph, data.decoder, self.device)
        return self.pipeline

    # ------------------------------------------------------------------------------------------------------ finish

    def _finish(self):
        """The oldest step under way, with its pixels."""
        while True:
            head = self.underway[0]
            try:
                for group, batch in zip(head.pictures, head.step.batches):
                    if group:
                        batch.image = self._placed(self.pipeline.take(), group, tuple(batch.pixel_mask.shape))
            except DecodeFailed as error:
                self._repair(error)
                continue
            self.repairs = 0
            self.underway.popleft()
            return head.step

    def _placed(self, decoded: list[Tensor] | Tensor, group: list[Picture], shape: tuple[int, int, int]) -> Tensor:
        """[B,3,H,W] of a batch whose images DALI has decoded."""
        if isinstance(decoded, Tensor):
            return decoded
        images, height, width = shape
        if self.device.type == "cuda":
            out = torch.empty(images, 3, height, width, device=self.device)
            for pixels, picture, there in zip(decoded, group, out):
                if not pixels.is_cuda:
                    pixels = pixels.pin_memory().to(self.device, non_blocking=True)
                place(pixels, picture.geometry, there)
            return out
        out = self.buffers.empty(images, 3, height, width)
        list(self.pool.map(place, decoded, [p.geometry for p in group], out))
        return out

    def _repair(self, error: DecodeFailed) -> None:
        """Find the images that DALI cannot decode, leave them to Pillow, and begin all steps under way again."""
        self.repairs += 1
        self.pipeline = None
        if self.repairs > MOST_REPAIRS:
            raise RuntimeError(f"DALI failed {MOST_REPAIRS} times in a row, the last: {error}")
        paths = {str(p.path): p.path for u in self.underway for group in u.pictures for p in group}
        offenders = [path for path in paths.values() if not self._decodes(path)]
        if not offenders:
            raise RuntimeError(f"DALI failed, but decodes each image of the batches alone: {error}")
        for path in offenders:
            self.checked.forget(path)
            try:
                self.checked.refuse(path)
                _log.warning("%s: DALI cannot decode it, Pillow can and does from now on", printable(path, 400))
            except BadImage:
                _log.warning("%s: changed after it was checked; DALI's pipeline was made anew", printable(path, 400))
        again = [u.request for u in self.underway]
        self.underway.clear()
        self.underway.extend(map(self._begin, again))

    def _decodes(self, path) -> bool:
        """Whether DALI decodes what it is given for this image."""
        try:
            alone = Pipeline(1, 1, "decode", self.data.decoder, self.device)
            alone.feed([self._encoded(path)], [None])
            alone.take()
        except (DecodeFailed, BadImage):
            return False
        return True


def _single_threaded(count: int) -> concurrent.futures.ThreadPoolExecutor:
    """``count`` threads whose torch operators each run on one core: the images are what is spread over the cores."""
    barrier = threading.Barrier(count + 1)
    before = torch.get_num_threads()

    def begin():
        torch.get_num_threads()  # makes torch set this thread up, which it would otherwise do later, over our number
        torch.set_num_threads(1)  # this thread's number; also that of threads to come, put back below
        barrier.wait()

    pool = concurrent.futures.ThreadPoolExecutor(count, "place", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    barrier.wait()
    torch.set_num_threads(before)
    return pool


__all__ = ["DaliSteps"]
