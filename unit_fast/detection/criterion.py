"""The losses of SPEC 2: the set loss of detection for all decoder layers at once, VQA's and the classifiers'.

Shapes: L decoder layers, B images, Q queries, N padded objects of an image, K classes, A attributes, M attribute slots.
Nothing here reads the device, so the whole step can be captured; everything is computed in the dtype of the logits, at
least float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.config import LossConfig

POSITIVE_SHARE, NEGATIVE_SHARE = 0.9, 0.1
"""Weights of the matched and of the other queries in the balanced class loss (SPEC 2.1, ``use_bcl``)."""
ATTRIBUTE_SCALE = 0.5
"""Constant factor of the authors' attribute loss (SPEC quirk 7)."""


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
) -> dict[str, Tensor]:
    """Weighted terms whose sum is the step loss (SPEC 2.1): scalars in the dtype of the logits, at least float32.

    logits [L,B,Q,K], boxes [L,B,Q,4] cxcywh, hidden [L,B,Q,D] (only attributes need it), query int64 [L,B,N] from
    ``match``, batch with labels [B,N], boxes [B,N,4], counts [B] and, with an attribute head, attributes [B,N,M].
    ``attribute_head(hidden [...,D], classes [...]) -> logits [...,A]``; ``no_object`` is the index of that class.

    Keys: ``loss_ce``, ``loss_bbox``, ``loss_giou`` and, with an attribute head, ``loss_attr`` of the last layer; with
    ``loss.auxiliary`` the same with suffix ``_0``, ``_1``, ... of the layers before it. Without any object, or without
    any attribute, a term is exactly zero and still connected to the graph, with gradients that are exactly zero.
    ``ValueError``: balanced class loss together with attributes (not defined), attributes missing in the batch.
    """
    if attribute_head is not None and loss.balanced_class_loss:
        raise ValueError("balanced_class_loss is not defined together with attributes; switch one of them off")
    if attribute_head is not None and batch.attributes is None:
        raise ValueError(f"batch of {batch.task!r} has no attributes, but the model has an attribute head for it")
    if not loss.auxiliary:
        logits, boxes, hidden, query = logits[-1:], boxes[-1:], hidden[-1:], query[-1:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    matched = query >= 0
    number = num_boxes(batch.counts, wide)

    target = _target_classes(query, batch.labels, logits.shape[2], no_object)
    nll = F.cross_entropy(logits.flatten(0, 2).to(wide), target.flatten(), reduction="none").view_as(target)
    if loss.balanced_class_loss:
        loss_ce = _balanced(nll, target != no_object, number)
    else:
        loss_ce = _weighted_mean(nll, target == no_object, loss)
    loss_bbox, loss_giou = _box_losses(boxes.to(wide), query, matched, batch.boxes.to(wide), number)
    terms = {
        "loss_ce": loss_ce,
        "loss_bbox": loss.weight_bbox * loss_bbox,
        "loss_giou": loss.weight_giou * loss_giou,
    }
    if attribute_head is not None:
        attributes = batch.attributes[..., : loss.max_attributes]
        terms["loss_attr"] = loss.weight_attr * _attribute_loss(
            hidden, query, matched, batch.labels, attributes, attribute_head, loss.ce_normalisation, wide
        )
    out = {}
    for name, of_layer in terms.items():
        *auxiliary, last = (loss.detection_loss_weight * of_layer).unbind(0)
        out[name] = last
        out |= {f"{name}_{i}": value for i, value in enumerate(auxiliary)}
    return out


def num_boxes(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """max(1, mean over the processes of the number of objects), a scalar that stays on the device.

    Objects that find no query (more objects than queries) count as well (SPEC quirk 29).
    """
    number = counts.sum().to(dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number = number / torch.distributed.get_world_size()
    return number.clamp(min=1)


def _target_classes(query: Tensor, labels: Tensor, queries: int, no_object: int) -> Tensor:
    """[L,B,Q] class each query is to predict: that of its object, else ``no_object``."""
    layers, images, _ = query.shape
    # Objects without a query write to one column too many, which is cut off.
    target = query.new_full((layers, images, queries + 1), no_object)
    target.scatter_(2, torch.where(query >= 0, query, queries), labels.expand(layers, -1, -1))
    return target[..., :queries].contiguous()


def _weighted_mean(nll: Tensor, unmatched: Tensor, loss: LossConfig) -> Tensor:
    """[L]: weighted mean of nll [L,B,Q] per process, or per image and then over images."""
    weight = torch.ones_like(nll).masked_fill(unmatched, loss.no_object_weight)
    if loss.ce_normalisation == "per_process":
        return (weight * nll).sum((1, 2)) / weight.sum((1, 2))
    return ((weight * nll).sum(2) / weight.sum(2)).mean(1)


def _balanced(nll: Tensor, positive: Tensor, number: Tensor) -> Tensor:
    """[L]: the balanced class loss of nll [L,B,Q].

    The number of negatives is B Q minus the number of boxes; where images hold more objects than queries that may
    reach zero or less, which the authors' formula does not define: it is at least 1 here.
    """
    negatives = (nll.shape[1] * nll.shape[2] - number).clamp(min=1)
    of_positives = nll.masked_fill(~positive, 0).sum((1, 2)) / number
    of_negatives = nll.masked_fill(positive, 0).sum((1, 2)) / negatives
    return POSITIVE_SHARE * of_positives + NEGATIVE_SHARE * of_negatives


def _box_losses(boxes: Tensor, query: Tensor, matched: Tensor, target: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """([L], [L]): L1 distance and 1 - GIoU of the pairs, summed and divided by the number of boxes."""
    predicted = boxes.gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
    # Padding pairs are one box against itself: exactly 0 in both losses, no gradient, no 0/0.
    padding = ~matched[..., None]
    predicted, target = predicted.masked_fill(padding, 1.0), target.masked_fill(padding, 1.0)
    loss_bbox = (predicted - target).abs().sum((1, 2, 3)) / number
    loss_giou = (1 - ops.giou(predicted, target)).sum((1, 2)) / number
    return loss_bbox, loss_giou


def _attribute_loss(
    hidden: Tensor,
    query: Tensor,
    matched: Tensor,
    labels: Tensor,
    attributes: Tensor,
    attribute_head: Callable[[Tensor, Tensor], Tensor],
    normalisation: str,
    dtype: torch.dtype,
) -> Tensor:
    """[L]: mean over the objects that have attributes of 0.5 times their mean cross-entropy.

    The authors run the head on every query, conditioned on its target class; a query without an object adds exactly
    nothing to the loss or to any gradient, so it runs on the queries of the objects [L,B,N] alone.
    """
    of_object = hidden.gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    classes = labels.clamp(min=0).expand(query.shape)
    log_p = attribute_head(of_object, classes).to(dtype).log_softmax(-1)
    valid = (attributes >= 0) & matched[..., None]
    slots = attributes.clamp(min=0).expand(*query.shape, -1)
    k = valid.sum(-1)
    ce = -log_p.gather(-1, slots).masked_fill(~valid, 0).sum(-1)
    of_object = ATTRIBUTE_SCALE * ce / k.clamp(min=1)
    counted = (k > 0).to(dtype)
    if normalisation == "per_process":
        return of_object.sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
    return (of_object.sum(2) / counted.sum(2).clamp(min=1)).mean(1)


@torch.no_grad()
def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """[L] float32, for logs only: | queries that predict an object - objects |, averaged over images.

    logits [L,B,Q,K] with no-object last, counts [B].
    """
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (predicted - counts).abs().float().mean(-1)


def vqa_loss(scores: Tensor, answer_scores: Tensor) -> Tensor:
    """A times the mean binary cross-entropy of the logits scores [B,A] and soft targets [B,A] (SPEC 2.2); a scalar."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return F.binary_cross_entropy_with_logits(scores.to(wide), answer_scores.to(wide)) * scores.shape[-1]


def class_loss(scores: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy of the logits scores [B,K] and classes label [B] (SPEC 2.3); a scalar."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), label)
