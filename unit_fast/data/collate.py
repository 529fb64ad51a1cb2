"""Samples of one task to a padded batch (SPEC 1.2)."""

import torch
from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.config import ModelConfig
from unit_fast.errors import UserError, printable
from unit_fast.tasks import check_indices, get_task, index_limits

ATTRIBUTES = 16
"""Attribute slots of an object."""

_IMAGE = ("image", "picture")
_TEXT = ("input_ids", "attention_mask", "token_type_ids")


def collate(task: str, samples: list[dict], pad_text_to: int = 0, *, model: ModelConfig | None = None) -> Batch:
    """A batch of samples of one task.

    Images are padded with zeros at the bottom and right, texts with id 0, targets with label -1.

    Args:
        task: data set key or short name.
        samples: dicts with, as far as the task has them, ``image`` [3,H,W] float (or ``picture``, an
            ``geometry.Picture``, in all of them: the batch has no ``image`` yet); ``input_ids`` [T],
            ``attention_mask`` [T] (missing: all ones), ``token_type_ids`` [T] (missing: zeros); the targets of
            detection ``labels`` [n], ``boxes`` [n,4] cx cy w h relative to the image, ``attributes`` [n,k], k <= 16,
            -1 = empty (Visual Genome; missing: none), or ``answer_scores`` [A] or ``label``; ``orig_size``
            (height, width) of the stored image (missing: that of ``image``); ``sample_id`` or ``image_id``.
            Tensors, arrays or lists. Targets may be missing, in all samples at once. Other keys are ignored.
        pad_text_to: pad texts to this length instead of to the longest of the batch.
        model: what the batch is for: a class (that of no-object included), attribute, word piece or number of answers
            that it has no place for is refused here, with the sample. Without it the model refuses, whatever device
            the batch is on by then, from ``Batch.largest``.

    Returns:
        ``Batch`` with float tensors in the samples' dtype, int64 ids and labels.

    Raises:
        UserError: naming the sample's index and the field: missing, wrong shape or type, contradicting another one,
            a negative label, one beyond the model's, a box that is not relative.
    """
    found = get_task(task)
    if not samples:
        raise UserError(f"collate({found.short}): no samples")
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise UserError(f"sample {i}: expected a dict of fields, found {type(sample).__name__}")
        unfit = [f for f, fits in _fields_of(found).items() if not fits and sample.get(f) is not None]
        if unfit:
            raise UserError(f"sample {i}: field {unfit[0]!r} is no field of task {found.short}; remove it")
    limits = {}
    if model is not None:
        if found.name not in model.tasks:
            raise UserError(f"collate({found.short}): the model has no such task; it has {', '.join(model.tasks)}")
        limits = index_limits(found, model)
    batch = Batch(task=found.name, largest={})
    if found.has_image:
        _images(batch, samples)
    if found.has_text:
        _texts(batch, samples, pad_text_to, limits)
    if found.is_detection:
        _targets(batch, samples, found.attributes, limits)
    elif found.loss == "bce":
        if _all_or_none(samples, "answer_scores"):
            scores = [_tensor(s, i, "answer_scores", 1, float) for i, s in enumerate(samples)]
            _same(scores, "answer_scores", lambda t: len(t), "entries")
            for i, score in enumerate(scores):
                if not (torch.isfinite(score) & (score >= 0) & (score <= 1)).all():
                    raise UserError(f"sample {i}: answer_scores must be numbers from 0 to 1")
            if model is not None and len(scores[0]) != model.tasks[found.name].outputs:
                raise UserError(
                    f"sample 0: answer_scores has {len(scores[0])} entries, the model has "
                    f"{model.tasks[found.name].outputs} (model.tasks.{found.name}.outputs)"
                )
            batch.answer_scores = torch.stack(scores)
    elif _all_or_none(samples, "label"):
        labels = [_tensor(s, i, "label", 0, int) for i, s in enumerate(samples)]
        for i, label in enumerate(labels):
            if label < 0:
                raise UserError(f"sample {i}: label is {int(label)}; classes are numbered from 0")
        _point(batch, "label", labels, limits)
        batch.label = torch.stack(labels)
    batch.sample_ids = [s.get("sample_id", s.get("image_id", i)) for i, s in enumerate(samples)]
    return batch


def _fields_of(task) -> dict[str, bool]:
    """Every field with a fixed meaning -> whether ``task`` has it."""
    return {
        **dict.fromkeys(_IMAGE, task.has_image),
        **dict.fromkeys(_TEXT, task.has_text),
        "labels": task.is_detection,
        "boxes": task.is_detection,
        "attributes": task.attributes,
        "answer_scores": task.loss == "bce",
        "label": task.loss == "ce",
    }


def _images(batch, samples):
    if _all_or_none(samples, "picture"):  # pixels come later
        batch.sizes = [tuple(sample["picture"].geometry.size) for sample in samples]
    else:
        _pixels(batch, samples)
    height, width = (max(side) for side in zip(*batch.sizes))
    # Most is no padding: memory that comes zeroed is not touched for it, which a step of 8 large images notices.
    batch.pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.bool)
    for row, (h, w) in zip(batch.pixel_mask, batch.sizes):
        row[h:] = True
        row[:h, w:] = True
    sizes = []
    for i, sample in enumerate(samples):
        if sample.get("orig_size") is None:
            sizes.append(torch.tensor(batch.sizes[i], dtype=torch.int64))
            continue
        size = _tensor(sample, i, "orig_size", 1, int)
        if len(size) != 2 or (size < 1).any():
            raise UserError(f"sample {i}: orig_size is {size.tolist()}, expected (height, width) in pixels")
        sizes.append(size)
    batch.orig_size = torch.stack(sizes)


def _pixels(batch, samples):
    images = [_tensor(s, i, "image", 3, float) for i, s in enumerate(samples)]
    for i, image in enumerate(images):
        if image.shape[0] != 3 or 0 in image.shape:
            raise UserError(f"sample {i}: image has shape {tuple(image.shape)}, expected [3, H, W]")
    _same(images, "image", lambda t: t.dtype, "dtype")
    batch.sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (max(side) for side in zip(*batch.sizes))
    batch.image = images[0].new_zeros(len(images), 3, height, width)
    for row, image, (h, w) in zip(batch.image, images, batch.sizes):
        row[:, :h, :w] = image


def _texts(batch, samples, pad_text_to, limits):
    ids = [_tensor(s, i, "input_ids", 1, int) for i, s in enumerate(samples)]
    for i, sample in enumerate(ids):
        if len(sample) == 0:
            raise UserError(f"sample {i}: input_ids is empty; even an empty text has [CLS] and [SEP]")
        if (sample < 0).any():
            raise UserError(f"sample {i}: input_ids has {int(sample.min())}; word pieces are numbered from 0")
        if pad_text_to and len(sample) > pad_text_to:
            raise UserError(f"sample {i}: input_ids has {len(sample)} entries, more than pad_text_to {pad_text_to}")
    _point(batch, "input_ids", ids, limits)
    length = max(pad_text_to, *map(len, ids))
    for name, missing in (("input_ids", 0), ("attention_mask", 1), ("token_type_ids", 0)):
        out = torch.zeros(len(ids), length, dtype=torch.int64)
        for i, sample in enumerate(samples):
            if name != "input_ids" and sample.get(name) is None:
                out[i, : len(ids[i])] = missing
                continue
            value = _tensor(sample, i, name, 1, int)
            if len(value) != len(ids[i]):
                raise UserError(f"sample {i}: {name} has {len(value)} entries, input_ids has {len(ids[i])}")
            if name != "input_ids" and ((value < 0) | (value > 1)).any():
                raise UserError(f"sample {i}: {name} must be 0 or 1, found {value.unique().tolist()}")
            out[i, : len(value)] = value
        setattr(batch, name, out)
    if batch.sizes is None:
        batch.sizes = [(len(sample),) for sample in ids]


def _targets(batch, samples, with_attributes, limits):
    if not _all_or_none(samples, "labels"):
        for name in ("boxes", "attributes"):
            i = next((i for i, s in enumerate(samples) if s.get(name) is not None), None)
            if i is not None:
                raise UserError(f"sample {i}: has {name} but no labels")
        return
    labels = [_tensor(s, i, "labels", 1, int) for i, s in enumerate(samples)]
    boxes = [_tensor(s, i, "boxes", 2, float) for i, s in enumerate(samples)]
    for i, (label, box) in enumerate(zip(labels, boxes)):
        if box.shape != (len(label), 4):
            raise UserError(f"sample {i}: boxes has shape {tuple(box.shape)}, expected [{len(label)}, 4] as labels has")
        if (label < 0).any():
            raise UserError(f"sample {i}: labels has {int(label.min())}; classes are numbered from 0")
        if not torch.isfinite(box).all():
            raise UserError(f"sample {i}: boxes holds a value that is not finite")
        if (box[:, 2:] < 0).any():
            raise UserError(f"sample {i}: boxes has a negative width or height; boxes are cx, cy, w, h")
        if (box.abs() > 2).any():
            raise UserError(
                f"sample {i}: boxes has {float(box.abs().max()):g}; cx, cy, w, h are relative to the image (0 to 1), "
                f"not pixels"
            )
    _point(batch, "labels", labels, limits)
    _same(boxes, "boxes", lambda t: t.dtype, "dtype")
    count = max(map(len, labels))
    batch.labels = torch.full((len(labels), count), -1, dtype=torch.int64)
    batch.boxes = boxes[0].new_zeros(len(labels), count, 4)
    batch.counts = torch.tensor([len(label) for label in labels], dtype=torch.int32)
    for i, (label, box) in enumerate(zip(labels, boxes)):
        batch.labels[i, : len(label)] = label
        batch.boxes[i, : len(label)] = box
    if with_attributes:
        batch.attributes = torch.full((len(labels), count, ATTRIBUTES), -1, dtype=torch.int64)
        for i, sample in enumerate(samples):
            if sample.get("attributes") is None:
                continue
            value = _tensor(sample, i, "attributes", 2, int)
            if len(value) != len(labels[i]) or value.shape[1] > ATTRIBUTES:
                raise UserError(
                    f"sample {i}: attributes has shape {tuple(value.shape)}, expected [{len(labels[i])}, {ATTRIBUTES}]"
                )
            if (value < -1).any():
                raise UserError(f"sample {i}: attributes has {int(value.min())}; -1 is an empty slot")
            batch.attributes[i, : len(value), : value.shape[1]] = value
        _point(batch, "attributes", batch.attributes, limits)


def _tensor(sample, index, name, dimensions, kind) -> Tensor:
    """``sample[name]`` as a tensor with so many dimensions: floating, or int64 from any integer type."""
    value = sample.get(name)
    if value is None:
        raise UserError(f"sample {index}: field {name!r} is missing; it has {printable(', '.join(sample)) or 'none'}")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"sample {index}: {name} cannot become a tensor ({printable(str(error))})") from None
    if tensor.numel() == 0 and dimensions == 2 and tensor.dim() == 1:
        tensor = tensor.reshape(0, 4 if name == "boxes" else ATTRIBUTES)  # an empty list says nothing of its columns
    if tensor.dim() != dimensions:
        raise UserError(f"sample {index}: {name} has shape {tuple(tensor.shape)}, expected {dimensions} dimensions")
    if kind is float:
        if not tensor.is_floating_point():
            remedy = (
                "normalise it (unit_fast.data.images.transforms.to_tensor)"
                if name == "image"
                else "convert it to float"
            )
            if tensor.numel():
                raise UserError(f"sample {index}: {name} is {tensor.dtype}, expected a floating type; {remedy}")
            tensor = tensor.float()
        return tensor
    fits = tensor.dtype == torch.bool if name == "attention_mask" else False
    fits |= tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if tensor.numel() and not fits:
        raise UserError(f"sample {index}: {name} is {tensor.dtype}, expected integers")
    return tensor.to(torch.int64)


def _point(batch, name, values, limits) -> None:
    """Note the largest number in the samples' ``values`` of a field that points into a table of the model."""
    largest = [int(value.max()) if value.numel() else -1 for value in values]
    for i, number in enumerate(largest):
        check_indices(f"sample {i}", {name: number}, {k: v for k, v in limits.items() if k == name})
    batch.largest[name] = max(largest)


def _all_or_none(samples, name) -> bool:
    """Whether the samples have the field; ``UserError`` when some have and some have not."""
    present = [sample.get(name) is not None for sample in samples]
    if any(present) and not all(present):
        raise UserError(
            f"sample {present.index(False)}: field {name!r} is missing, but sample {present.index(True)} has it; give "
            f"targets for all samples or for none"
        )
    return all(present)


def _same(tensors, name, what, word):
    for i, tensor in enumerate(tensors):
        if what(tensor) != what(tensors[0]):
            raise UserError(
                f"sample {i}: {name} has {word} {what(tensor)}, sample 0 has {what(tensors[0])}; they must be equal"
            )
