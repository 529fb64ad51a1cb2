"""DALI's part in reading images: a pipeline that decodes batches in its own threads, in our order.

Two graphs. ``decode`` gives the decoded images as they are stored; ``transforms.place`` does the rest, on the CPU or on
a GPU. ``whole`` also resizes, crops, flips, normalises and pads in DALI; on a CPU its resize takes several times as
long as torch's 8-bit one. Sizes, crops and flips come from our ``Geometry`` either way.

Every run of the pipeline is a batch fed by ``feed`` and fetched by ``take``, in turn. A pipeline that met a file that
it cannot decode is dead: ``take`` raises ``DecodeFailed`` and the owner makes another one.

The ``mixed`` decoder (part of the work on the GPU) is offered and has never run here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unit_fast.data.images.geometry import Geometry
from unit_fast.data.images.transforms import MEAN, STD
from unit_fast.data.store.files import describe
from unit_fast.errors import UserError, printable

_EMPTY = np.zeros(2, dtype=np.float32)


class DecodeFailed(Exception):
    """DALI could not decode an image of the batch; its pipeline is of no use any more."""


def check(graph: str, decoder: str, device: torch.device | None) -> None:
    """``UserError`` where DALI cannot be loaded, or this graph and decoder cannot work for a run on ``device``."""
    try:
        import nvidia.dali  # noqa: F401
    except Exception as error:  # whatever a library that does not fit the system raises
        raise UserError(
            f"DALI is installed and cannot be loaded ({describe(error)}); repair it, or take --data.engine torchvision"
        ) from None
    if decoder == "mixed" and (device is None or device.type != "cuda"):
        raise UserError("--data.decoder mixed: decodes on a GPU, but the run is on a CPU; take cpu")
    if decoder == "mixed" and graph == "whole":
        raise UserError("--data.decoder mixed: the whole graph runs on the CPU; take --data.dali-graph decode")


class Pipeline:
    """A DALI pipeline over batches of any size up to ``batch``.

    Args:
        batch: most images of a batch.
        threads: DALI's threads.
        graph: ``decode`` or ``whole``.
        decoder: ``cpu`` or ``mixed``.
        device: CUDA device of ``mixed``; not used by ``cpu``.

    Raises:
        UserError: see ``check``.
    """

    def __init__(
        self,
        batch: int,
        threads: int,
        graph: str = "decode",
        decoder: str = "cpu",
        device: torch.device | None = None,
    ):
        from nvidia.dali import pipeline_def

        check(graph, decoder, device)
        device_id = None
        if decoder == "mixed":
            device_id = device.index if device.index is not None else torch.cuda.current_device()
        self.whole = graph == "whole"
        # With this depth several runs can still be scheduled ahead, and none starts before it is asked for.
        options = {"batch_size": batch, "num_threads": threads, "device_id": device_id, "prefetch_queue_depth": 1}
        define = _whole if self.whole else _decode
        self._pipe = pipeline_def(**options, enable_conditionals=self.whole)(define)(decoder)
        self._pipe.build()

    def feed(self, encoded: Sequence[bytes | np.ndarray], geometries: Sequence[Geometry], size=None) -> None:
        """Begin with a batch. encoded: files' contents; size: (height, width) to pad to (``whole``)."""
        feed = self._pipe.feed_input
        feed("encoded", [np.frombuffer(e, dtype=np.uint8) for e in encoded])
        if self.whole:
            feed("crops", [np.array(g.crop is not None) for g in geometries])
            feed("first", [_pair(g.first) for g in geometries])
            feed("anchor", [np.array(_anchor(g), dtype=np.int32) for g in geometries])
            feed("extent", [np.array(g.crop[2:] if g.crop else (1, 1), dtype=np.int32) for g in geometries])
            feed("size", [_pair(g.size) for g in geometries])
            feed("flip", [np.array(int(g.flip), dtype=np.int32) for g in geometries])
            feed("padded", [_pair(size) for _ in geometries])
        self._pipe.schedule_run()

    def take(self) -> list[Tensor] | Tensor:
        """The oldest batch fed and not yet taken: [H,W,3] uint8 of each image, or (``whole``) [B,3,H,W] float32.

        The tensors own their memory.
        """
        try:
            (out,) = self._pipe.share_outputs()
        except RuntimeError as error:
            raise DecodeFailed(printable(str(error), 500)) from None
        try:
            if self.whole:
                return torch.from_dlpack(out.as_tensor())
            return [torch.from_dlpack(out[i]) for i in range(len(out))]
        finally:
            self._pipe.release_outputs()


def _pair(sides) -> np.ndarray:
    return _EMPTY if sides is None else np.array(sides, dtype=np.float32)


def _anchor(geometry: Geometry) -> tuple[int, int]:
    """Upper left of the crop in the image that is not yet flipped: here the flip comes last."""
    if geometry.crop is None:
        return 0, 0
    top, left, _, width = geometry.crop
    return top, geometry.first[1] - left - width if geometry.flip else left


def _decode(decoder: str):
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=False)


def _whole(decoder: str):
    from nvidia.dali import fn, types

    resize = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    image = _decode(decoder)
    crops = fn.external_source(name="crops", dtype=types.BOOL, ndim=0)
    first = fn.external_source(name="first", dtype=types.FLOAT, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    padded = fn.external_source(name="padded", dtype=types.FLOAT, ndim=1)
    if crops:  # DALI turns this into a branch an image takes or not
        image = fn.slice(fn.resize(image, size=first, **resize), anchor, extent, axes=[0, 1])
    else:
        image = fn.copy(image)
    image = fn.flip(fn.resize(image, size=size, **resize), horizontal=flip)
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in MEAN],
        std=[255 * s for s in STD],
        crop=padded,
        crop_pos_x=0.0,
        crop_pos_y=0.0,
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
