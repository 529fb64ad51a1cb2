"""``set_loss`` in plain PyTorch: the specification, and its gradient by hand as the registered backward gives it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from unit_fast_kernels.match_cost import corners, pairwise_giou

POSITIVE_SHARE, NEGATIVE_SHARE = 0.9, 0.1
"""Weights of the matched and of the other queries in the balanced class loss (SPEC 2.1, ``use_bcl``)."""


class Settings(NamedTuple):
    """What the losses depend on beside the tensors, as the registered operators take it."""

    no_object: int
    no_object_weight: float
    per_process: bool
    balanced: bool
    weight_ce: float
    weight_bbox: float
    weight_giou: float


def target_classes(query: Tensor, labels: Tensor, queries: int, no_object: int) -> Tensor:
    """[L,B,Q] class each query is to predict: that of its object, else ``no_object``."""
    layers, images, _ = query.shape
    # Objects without a query write to one column too many, which is cut off.
    target = query.new_full((layers, images, queries + 1), no_object)
    target.scatter_(2, torch.where(query >= 0, query, queries), labels.expand(layers, -1, -1))
    return target[..., :queries].contiguous()


def _weighted_mean(nll: Tensor, unmatched: Tensor, no_object_weight: float, per_process: bool) -> Tensor:
    """[L]: weighted mean of nll [L,B,Q] per process, or per image and then over images."""
    weight = torch.ones_like(nll).masked_fill(unmatched, no_object_weight)
    if per_process:
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


def _pairs(boxes: Tensor, query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """([L,B,N,4], the same): predicted and target box of each object. Padding pairs are one box against itself:
    exactly 0 in both losses, no gradient, no 0/0."""
    predicted = boxes.gather(2, query.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
    padding = (query < 0)[..., None]
    return predicted.masked_fill(padding, 1.0), target.masked_fill(padding, 1.0)


def box_losses(boxes: Tensor, query: Tensor, target_boxes: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """([L], [L]): L1 distance and 1 - GIoU of the pairs, summed and divided by the number of boxes."""
    predicted, wanted = _pairs(boxes, query, target_boxes)
    bbox = (predicted - wanted).abs().sum((1, 2, 3)) / number
    return bbox, (1 - pairwise_giou(predicted, wanted)).sum((1, 2)) / number


@torch.no_grad()
def _cardinality(logits: Tensor, counts: Tensor, no_object: int, dtype: torch.dtype) -> Tensor:
    predicted = (logits.max(-1).indices != no_object).sum(-1)
    return (predicted - counts).abs().to(dtype).mean(-1)


def set_loss_reference(
    logits, boxes, query, labels, target_boxes, counts, num_boxes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification: (ce, bbox, giou, cardinality) [L], the first three times their weights; in the dtype of
    the logits, at least float32. Without any object bbox and giou are zero, connected, with gradients of zero."""
    no_object, no_object_weight, per_process, balanced, *weights = settings
    wide = torch.promote_types(logits.dtype, torch.float32)
    number = num_boxes.to(wide)
    target = target_classes(query, labels, logits.shape[2], no_object)
    nll = F.cross_entropy(logits.flatten(0, 2).to(wide), target.flatten(), reduction="none").view_as(target)
    if balanced:
        ce = _balanced(nll, target != no_object, number)
    else:
        ce = _weighted_mean(nll, target == no_object, no_object_weight, per_process)
    bbox, giou = box_losses(boxes.to(wide), query, target_boxes.to(wide), number)
    ce, bbox, giou = (x if w == 1.0 else w * x for x, w in zip((ce, bbox, giou), weights, strict=True))
    return ce, bbox, giou, _cardinality(logits, counts, no_object, wide)


# --- Its gradient -----------------------------------------------------------------------------------------------------


def class_factors(
    positive: Tensor, number: Tensor, no_object_weight: float, per_process: bool, balanced: bool
) -> Tensor:
    """[L,B,Q]: what the cross-entropy of each query is multiplied with; ``positive`` are those with an object. In the
    dtype of ``number``."""
    _, images, queries = positive.shape
    if balanced:
        others = (images * queries - number).clamp(min=1)
        return torch.where(positive, POSITIVE_SHARE / number, NEGATIVE_SHARE / others)
    weight = torch.full(positive.shape, no_object_weight, dtype=number.dtype, device=number.device)
    weight = weight.masked_fill_(positive, 1.0)
    total = weight.sum((1, 2), keepdim=True) if per_process else images * weight.sum(2, keepdim=True)
    return weight / total


def class_gradient(p: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """factor (p - one-hot of target), written over the probabilities p [L,B,Q,K]; target, factor [L,B,Q]."""
    factor = factor[..., None]
    return p.mul_(factor).scatter_add_(-1, target[..., None], -factor)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """The share of a in the gradient of max(a, b)."""
    return (a > b).to(a.dtype) + 0.5 * (a == b)


def _giou_gradient(a: Tensor, b: Tensor) -> Tensor:
    """Gradient of ``pairwise_giou(a, b)`` by a, both [...,4]."""
    low, high = (torch.stack(c, -1) for c in (corners(a)[:2], corners(a)[2:]))
    other_low, other_high = (torch.stack(c, -1) for c in (corners(b)[:2], corners(b)[2:]))
    inner_raw = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    hull_raw = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    inner, hull, side = inner_raw.clamp(min=0), hull_raw.clamp(min=0), high - low
    areas = [x.prod(-1, keepdim=True) for x in (inner, hull)]
    union = side.prod(-1, keepdim=True) + (other_high - other_low).prod(-1, keepdim=True) - areas[0]
    by_area = 1 / areas[1] - areas[0] / union.square()
    # Along one axis a length counts as often as the other axis is long.
    by_inner = (1 / union - by_area) * inner.flip(-1) * (inner_raw >= 0)
    by_hull = -union / areas[1].square() * hull.flip(-1) * (hull_raw >= 0)
    by_side = by_area * side.flip(-1)
    by_high = by_inner * _share(other_high, high) + by_hull * _share(high, other_high) + by_side
    by_low = -by_inner * _share(low, other_low) - by_hull * _share(other_low, low) - by_side
    return torch.cat((by_low + by_high, 0.5 * (by_high - by_low)), -1)


def box_gradient(
    by_bbox: Tensor | None, by_giou: Tensor | None, boxes: Tensor, query: Tensor, target_boxes: Tensor, number: Tensor
) -> Tensor:
    """[L,B,Q,4] for the gradients [L] of the two weighted losses, in the dtype of boxes (float32 or float64)."""
    predicted, wanted = _pairs(boxes, query, target_boxes)
    of_object = torch.zeros_like(predicted)
    if by_bbox is not None:
        of_object += (by_bbox / number)[:, None, None, None] * (predicted - wanted).sign()
    if by_giou is not None:
        of_object -= (by_giou / number)[:, None, None, None] * _giou_gradient(predicted, wanted)
    of_object = of_object.masked_fill((query < 0)[..., None], 0.0)
    index = query.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
    return torch.zeros_like(boxes).scatter_add_(2, index, of_object)


def set_loss_bwd_reference(
    by_ce, by_bbox, by_giou, logits, boxes, query, labels, target_boxes, num_boxes, lse, *settings
) -> tuple[Tensor, Tensor]:
    """(dlogits, dboxes) for the gradients by_ce, by_bbox, by_giou [L] of the three losses, any of them None; lse
    [L,B,Q] is the log-sum-exp of the logits. Computed in float32, in the dtypes of logits and boxes."""
    no_object, no_object_weight, per_process, balanced, weight_ce, weight_bbox, weight_giou = settings
    dlogits, dboxes = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (logits, boxes))
    number = num_boxes.float()
    if by_ce is None:
        dlogits.zero_()
    else:
        target = target_classes(query, labels, logits.shape[2], no_object)
        factor = class_factors(target != no_object, number, no_object_weight, per_process, balanced)
        factor = factor * (by_ce * weight_ce)[:, None, None]
        dlogits.copy_(class_gradient((logits.float() - lse[..., None]).exp(), target, factor))
    by_bbox = None if by_bbox is None else by_bbox * weight_bbox
    by_giou = None if by_giou is None else by_giou * weight_giou
    grad = box_gradient(by_bbox, by_giou, boxes.float(), query, target_boxes.float(), number)
    return dlogits, dboxes.copy_(grad)
