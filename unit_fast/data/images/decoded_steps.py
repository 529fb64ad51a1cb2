"""Steps whose images are decoded in threads: described, decoded and placed some steps ahead, in the requests' order.

A step is first described (which images, what happens to them, all else of the batch), then its images are fed to the
decoder, DALI's or torchvision's, and when their turn comes they are placed into the batch. An image that the decoder
cannot decode although Pillow could, or that has changed since it was checked, costs DALI its pipeline: a new one is
made, the steps that were under way are described again, and Pillow decodes the offender from then on.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unit_fast.config import DataConfig
from unit_fast.data.background import OneCore
from unit_fast.data.errors import BadImage
from unit_fast.data.images.checked import CheckedImages
from unit_fast.data.images.dali import DecodeFailed, Pipeline, check
from unit_fast.data.images.decode import load_image, read_bytes
from unit_fast.data.images.engine import decoding_threads
from unit_fast.data.images.geometry import Picture
from unit_fast.data.images.memory import Buffers, KeptImages
from unit_fast.data.images.transforms import place
from unit_fast.data.store.cache import open_cache
from unit_fast.errors import printable

AHEAD = 2
"""Steps described and being decoded while the one before is placed."""
MOST_REPAIRS = 10
"""Decoders lost in a row, without a step in between, before reading is given up."""

_UNCOMPRESSED = b"P6\n"
"""How an image begins that Pillow has decoded: the simplest format that DALI reads."""

_log = logging.getLogger("unit_fast.data")


@dataclass
class _Underway:
    """A step whose images are with the decoder."""

    request: object
    step: object
    pictures: list[list[Picture]]
    """One list a forward pass; empty for tasks without images."""
    kept: list[list[Tensor | None]] = field(default_factory=list)
    """The pixels of each picture that are in memory already, which the decoder is spared."""
    placing: list[concurrent.futures.Future] = field(default_factory=list)
    """What is left to do once the images are decoded."""

    def placed(self):
        """The step, when its pixels are in place."""
        for image in self.placing:
            image.result()
        return self.step


class TorchvisionDecoder:
    """What ``dali.Pipeline`` does with the graph ``decode``, by torchvision in the threads of ``pool``."""

    def __init__(self, pool: concurrent.futures.Executor):
        self.pool, self._fed = pool, collections.deque()

    def feed(self, encoded, geometries, size=None) -> None:
        """Begin with a batch of files' contents."""
        self._fed.append([self.pool.submit(self._decoded, content) for content in encoded])

    def take(self) -> list[Tensor]:
        """[H,W,3] uint8 of each image of the oldest batch; ``DecodeFailed``."""
        return [image.result() for image in self._fed.popleft()]

    @staticmethod
    def _decoded(content: bytes) -> Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg

        if content.startswith(_UNCOMPRESSED):
            _, size, _, pixels = content.split(b"\n", 3)
            width, height = map(int, size.split())
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, 3)
        try:
            image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (RuntimeError, ValueError) as error:
            raise DecodeFailed(printable(str(error), 500)) from None
        return image.permute(1, 2, 0).contiguous()


class DecodedSteps:
    """Iterates over the ``Step`` of each request.

    Args:
        fetcher: describes a request (``fetch.Fetcher``).
        requested: the requests, in order; taken a few steps ahead.
        data: engine settings; ``workers`` are DALI's threads, and as many that place pixels or decode with torchvision.
        most: largest batch.
        device: where the pixels are wanted. On a CUDA device the images are copied there as decoded, and placed there.
        engine: ``dali`` or ``torchvision``.
    """

    def __init__(
        self,
        fetcher,
        requested: Iterable,
        data: DataConfig,
        most: int,
        device: torch.device,
        engine: str = "dali",
    ):
        if engine == "dali":
            check(data.dali_graph, data.decoder, device)
        self.fetcher, self.requested, self.data = fetcher, requested, data
        self.most, self.device, self.engine = most, device, engine
        self.threads = decoding_threads(data)
        self.checked = CheckedImages(open_cache(data).folder, data.max_pixels)
        self.buffers, self.decoder, self.repairs = Buffers(), None, 0
        self.kept = KeptImages(data.cache_mib * 2**20)
        self.pool = one_core_threads(self.threads, "place")
        self.underway: collections.deque[_Underway] = collections.deque()

    def __iter__(self) -> Iterator:
        placing: collections.deque[_Underway] = collections.deque()
        begun = time.monotonic()
        try:
            for request in itertools.chain(self.requested, itertools.repeat(None, AHEAD + 1)):
                # The step before is being placed while this one is described: neither waits for the other.
                if request is not None:
                    self.underway.append(self._begin(request))
                if self.underway and (request is None or len(self.underway) > AHEAD):
                    placing.append(self._decoded())
                if placing and (request is None or len(placing) > 1):
                    step = placing.popleft().placed()
                    step.read_s = time.monotonic() - begun
                    yield step
                    begun = time.monotonic()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.checked.close()

    def _begin(self, request) -> _Underway:
        """Describe a step and feed its images to the decoder."""
        dataset, indices = self.fetcher.visited(request)
        # those not yet checked, by all threads at once
        list(self.pool.map(lambda index: self._check(dataset, index), indices))
        for _ in range(MOST_REPAIRS):
            step, pictures = self.fetcher.describe(request, self.checked)
            kept = [[self.kept.get(p.path, p.stamp) for p in group] for group in pictures]
            try:
                encoded = [
                    [self._encoded(p.path) for p, pixels in zip(group, known) if pixels is None]
                    for group, known in zip(pictures, kept)
                ]
            except BadImage as error:  # gone or changed since a moment ago: the description will find that out
                changing = error
                self.checked.forget(error.path)
                continue
            for group, known, contents, batch in zip(pictures, kept, encoded, step.batches):
                if contents:
                    self.decoder = self.decoder or self._new_decoder(self.most, self.threads, self.data.dali_graph)
                    geometries = [p.geometry for p, pixels in zip(group, known) if pixels is None]
                    self.decoder.feed(contents, geometries, batch.pixel_mask.shape[1:])
            return _Underway(request, step, pictures, kept)
        raise BadImage(changing.path, f"changes while it is read ({changing.reason})")

    def _check(self, dataset, index: int) -> None:
        with contextlib.suppress(BadImage):  # the description meets it again, and replaces it
            self.checked.facts(dataset.image_path(index))

    def _encoded(self, path) -> bytes:
        """What the decoder is given: the file, or what Pillow made of it, uncompressed."""
        if self.checked.facts(path).plain:
            return read_bytes(path)
        image = load_image(path, self.checked.max_pixels)
        return _UNCOMPRESSED + b"%d %d\n255\n" % image.size + image.tobytes()

    def _new_decoder(self, most: int, threads: int, graph: str):
        if self.engine == "torchvision":
            return TorchvisionDecoder(self.pool)
        return Pipeline(most, threads, graph, self.data.decoder, self.device)

    def _decoded(self) -> _Underway:
        """The oldest step under way, decoded and being placed."""
        while True:
            head = self.underway[0]
            try:
                for group, known, batch in zip(head.pictures, head.kept, head.step.batches):
                    if group:
                        decoded = self._completed(group, known)
                        batch.image = self._place(decoded, group, batch.pixel_mask.shape, head.placing)
            except DecodeFailed as error:
                self._repair(error)
                continue
            self.repairs = 0
            return self.underway.popleft()

    def _completed(self, group: list[Picture], known: list[Tensor | None]) -> list[Tensor] | Tensor:
        """What the decoder made of a batch, the images that were in memory in their places; new ones are kept."""
        if all(pixels is not None for pixels in known):
            return known
        taken = self.decoder.take()
        if isinstance(taken, Tensor):
            return taken
        taken = iter(taken)
        decoded = [next(taken) if pixels is None else pixels for pixels in known]
        if self.data.cache_mib:
            for picture, pixels, before in zip(group, decoded, known):
                if before is None and tuple(pixels.shape[:2]) == picture.geometry.stored:
                    self.kept.put(picture.path, pixels, pixels.numel(), picture.stamp)
        return decoded

    def _place(self, decoded: list[Tensor] | Tensor, group: list[Picture], shape, placing: list) -> Tensor:
        """[B,3,H,W] of a batch whose images are decoded, complete when ``placing`` is done."""
        if isinstance(decoded, Tensor):
            return decoded
        for pixels, picture in zip(decoded, group):
            if tuple(pixels.shape[:2]) != picture.geometry.stored:
                raise DecodeFailed(f"{picture.path} has another size than when it was checked")
        images, height, width = shape
        if self.device.type == "cuda":
            out = torch.empty(images, 3, height, width, device=self.device)
            for pixels, picture, there in zip(decoded, group, out):
                if not pixels.is_cuda:
                    pixels = pixels.pin_memory().to(self.device, non_blocking=True)
                place(pixels, picture.geometry, there)
            return out
        out = self.buffers.empty(images, 3, height, width)
        for pixels, picture, there in zip(decoded, group, out):
            placing.append(self.pool.submit(place, pixels, picture.geometry, there))
        return out

    def _repair(self, error: DecodeFailed) -> None:
        """Find the images that cannot be decoded, leave them to Pillow, and begin all steps under way again."""
        self.repairs += 1
        self.decoder = None
        if self.repairs > MOST_REPAIRS:
            raise RuntimeError(f"{self.engine} failed {MOST_REPAIRS} times in a row, the last: {error}")
        paths = {str(p.path): p.path for u in self.underway for group in u.pictures for p in group}
        offenders = [path for path in paths.values() if not self._decodes(path)]
        if not offenders:
            raise RuntimeError(f"{self.engine} failed, but decodes each image of the batches alone: {error}")
        for path in offenders:
            self.checked.forget(path)
            if self._decodes(path):  # as it is now
                _log.warning("%s: changed after it was checked; decoding began anew", printable(path, 400))
                continue
            try:
                self.checked.refuse(path)
                _log.warning("%s: %s cannot decode it, Pillow can and does", printable(path, 400), self.engine)
            except BadImage:
                _log.warning("%s: changed after it was checked; decoding began anew", printable(path, 400))
        again = [u.request for u in self.underway]
        self.underway.clear()
        self.underway.extend(map(self._begin, again))

    def _decodes(self, path) -> bool:
        """Whether the decoder decodes what it is given for this image."""
        try:
            alone = self._new_decoder(1, 1, "decode")
            alone.feed([self._encoded(path)], [None])
            (pixels,) = alone.take()
            facts = self.checked.facts(path)
        except (DecodeFailed, BadImage):
            return False
        return tuple(pixels.shape[:2]) == (facts.height, facts.width)


def one_core_threads(count: int, name: str) -> concurrent.futures.ThreadPoolExecutor:
    """``count`` threads, all begun; the images are what is spread over the cores."""
    cores = OneCore(count)
    pool = concurrent.futures.ThreadPoolExecutor(count, name, initializer=cores.begin)
    for _ in range(count):
        pool.submit(int)
    cores.end()
    return pool
