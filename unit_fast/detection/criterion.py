"""The losses of SPEC 2: the set loss of detection for all decoder layers at once, VQA's and the classifiers'.

Shapes: L decoder layers, B images, Q queries, N padded objects of an image, K classes, A attributes, M attribute slots.
Nothing here reads the device, so the whole step can be captured; everything is computed in the dtype of the logits, at
least float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.config import LossConfig
from unit_fast.detection.targets import check_targets


@dataclass(frozen=True)
class Share:
    """What the losses of one of several accumulated batches are divided by, so that their means weighted by ``part``
    add up to the losses of all the samples in one batch. Scalars on the device."""

    part: float
    """Samples of the batch by samples of the update."""
    num_boxes: Tensor
    """``part`` times the number of boxes of the whole update: takes the place of the batch's own."""
    ce: Tensor | None = None
    """Factor on the class loss where its mean is over the process, None where it is over images."""
    attr: Tensor | None = None
    """The same of the attribute loss."""


def shares(batches: Sequence[Batch], queries: int, loss: LossConfig) -> list[Share]:
    """The share of each of ``batches``, detection batches of one update with counts [B] and, if their model has an
    attribute head, attributes [B,N,M].

    Known before the first forward pass, because a matching gives an image's objects as many of its ``queries`` as
    there are. Only which objects stay without a query where an image has more of them is not: of such an image the
    attributed objects count by the share that finds a query.
    """
    wide = torch.promote_types(batches[0].boxes.dtype, torch.float32)
    number = num_boxes(torch.cat([batch.counts for batch in batches]), wide)
    parts = [len(batch.counts) / sum(len(b.counts) for b in batches) for batch in batches]
    ce = attr = [None] * len(batches)
    if loss.ce_normalisation == "per_process":
        if not loss.balanced_class_loss:
            ce = _factors([_class_weight(batch, queries, loss, wide) for batch in batches], parts)
        if all(batch.attributes is not None for batch in batches):
            attr = _factors([_attributed(batch, queries, loss, wide) for batch in batches], parts)
    return [Share(part, number * part, *factors) for part, *factors in zip(parts, ce, attr, strict=True)]


def _factors(weights: list[Tensor], parts: list[float]) -> list[Tensor]:
    """From the weights that the batches' means divide by: what makes the means, weighted by ``parts``, that of all."""
    total = torch.stack(weights).sum().clamp(min=torch.finfo(weights[0].dtype).tiny)
    return [weight / total / part for weight, part in zip(weights, parts, strict=True)]


def _class_weight(batch: Batch, queries: int, loss: LossConfig, dtype: torch.dtype) -> Tensor:
    """Sum of the weights of a batch's queries in a weighted mean of their class losses."""
    matched = batch.counts.clamp(max=queries).sum(dtype=dtype)
    return matched + loss.no_object_weight * (len(batch.counts) * queries - matched)


def _attributed(batch: Batch, queries: int, loss: LossConfig, dtype: torch.dtype) -> Tensor:
    """Number of a batch's objects that have an attribute and a query."""
    real = torch.arange(batch.attributes.shape[1], device=batch.counts.device) < batch.counts[:, None]
    attributed = (batch.attributes[..., : loss.max_attributes] >= 0).any(-1) & real
    return (attributed.sum(1, dtype=dtype) * queries / batch.counts.clamp(min=queries)).sum()


def detection_losses(
    logits: Tensor,
    boxes: Tensor,
    hidden: Tensor,
    query: Tensor,
    batch: Batch,
    loss: LossConfig,
    attribute_head: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    no_object: int,
    share: Share | None = None,
) -> dict[str, Tensor]:
    """Weighted terms whose sum is the step loss (SPEC 2.1): scalars in the dtype of the logits, at least float32.

    logits [L,B,Q,K], boxes [L,B,Q,4] cxcywh, hidden [L,B,Q,D] (only attributes need it), query int64 [L,B,N] from
    ``match``, batch with labels [B,N], boxes [B,N,4], counts [B] and, with an attribute head, attributes [B,N,M].
    ``attribute_head(hidden [...,D], classes [...]) -> logits [...,A]``; ``no_object`` is the index of that class.
    ``share``: the batch is one of several of an update, see ``shares``; None: it is the whole update.

    Keys: ``loss_ce``, ``loss_bbox``, ``loss_giou`` and, with an attribute head, ``loss_attr`` of the last layer; with
    ``loss.auxiliary`` the same with suffix ``_0``, ``_1``, ... of the layers before it. Without any object, or without
    any attribute, a term is exactly zero and still connected to the graph, with gradients that are exactly zero.
    ``ValueError``: balanced class loss together with attributes (not defined), attributes missing in the batch.
    """
    check_targets("losses", batch, "labels", "boxes", "counts")
    if attribute_head is not None and loss.balanced_class_loss:
        raise ValueError("balanced_class_loss is not defined together with attributes; switch one of them off")
    if attribute_head is not None and batch.attributes is None:
        raise ValueError(f"batch of {batch.task!r} has no attributes, but the model has an attribute head for it")
    if not loss.auxiliary:
        logits, boxes, hidden, query = logits[-1:], boxes[-1:], hidden[-1:], query[-1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    factor = loss.detection_loss_weight
    loss_ce, loss_bbox, loss_giou = ops.set_loss(
        logits,
        boxes,
        query,
        batch.labels,
        batch.boxes,
        num_boxes(batch.counts, wide) if share is None else share.num_boxes.to(wide),
        no_object=no_object,
        no_object_weight=loss.no_object_weight,
        normalisation=loss.ce_normalisation,
        balanced=loss.balanced_class_loss,
        weights=(factor, factor * loss.weight_bbox, factor * loss.weight_giou),
    )
    terms = {"loss_ce": loss_ce, "loss_bbox": loss_bbox, "loss_giou": loss_giou}
    if attribute_head is not None:
        attributes = batch.attributes[..., : loss.max_attributes]
        terms["loss_attr"] = ops.attribute_loss(
            _attribute_logits(hidden, query, batch.labels, attribute_head),
            query,
            attributes,
            normalisation=loss.ce_normalisation,
            weight=factor * loss.weight_attr,
        )
    if share is not None and share.ce is not None:
        terms["loss_ce"] = loss_ce * share.ce
    if share is not None and share.attr is not None and attribute_head is not None:
        terms["loss_attr"] = terms["loss_attr"] * share.attr
    out = {}
    for name, of_layer in terms.items():
        *auxiliary, last = of_layer.unbind(0)
        out[name] = last
        out |= {f"{name}_{i}": value for i, value in enumerate(auxiliary)}
    return out


def num_boxes(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """max(1, mean over the processes of the number of objects), a scalar that stays on the device: counts [B] are those
    of all images of this process's update.

    Objects that find no query (more objects than queries) count as well (SPEC quirk 29).
    """
    number = counts.sum(dtype=dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number = number / torch.distributed.get_world_size()
    return number.clamp(min=1)


def _attribute_logits(
    hidden: Tensor, query: Tensor, labels: Tensor, attribute_head: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[L,B,N,A]: the head's logits for the query of each object, whatever for objects without one.

    The authors run the head on every query, conditioned on its target class; a query without an object adds exactly
    nothing to the loss or to any gradient, so it runs on the queries of the objects alone.
    """
    of_object = hidden.gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    return attribute_head(of_object, labels.clamp(min=0).expand(query.shape))


def vqa_loss(scores: Tensor, answer_scores: Tensor) -> Tensor:
    """A times the mean binary cross-entropy of the logits scores [B,A] and soft targets [B,A] (SPEC 2.2); a scalar."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(scores.to(wide), answer_scores.to(wide)) * scores.shape[-1]


def class_loss(scores: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy of the logits scores [B,K] and classes label [B] (SPEC 2.3); a scalar."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), label)
