"""``set_loss`` on a CPU: the losses and gradients of the reference, with fewer passes over the logits.

The forward keeps the log-probabilities; the backward turns them into the gradient in place, where autograd writes a
tensor of zeros, a one-hot product and a softmax's gradient after another. Whether a query predicts an object is decided
by largest values, which take a quarter of the time of their indices.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.set_loss.reference import (
    Settings,
    box_gradient,
    box_losses,
    class_factors,
    class_gradient,
    target_classes,
)


def _cardinality(logits: Tensor, counts: Tensor, no_object: int) -> Tensor:
    """[L]; the first of the largest is the prediction."""
    of_none = logits[..., no_object]
    predicted = torch.zeros(of_none.shape, dtype=torch.bool)
    if no_object > 0:
        predicted |= logits[..., :no_object].amax(-1) >= of_none
    if no_object + 1 < logits.shape[-1]:
        predicted |= logits[..., no_object + 1 :].amax(-1) > of_none
    return (predicted.sum(-1) - counts).abs().to(logits.dtype).mean(-1)


class _SetLossCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, boxes, query, labels, target_boxes, counts, num_boxes, settings):
        no_object, *class_settings = settings[:4]
        wide = torch.promote_types(logits.dtype, torch.float32)
        ctx.dtypes, ctx.weights = (logits.dtype, boxes.dtype), settings[4:]
        logits, boxes, target_boxes, number = (x.to(wide) for x in (logits, boxes, target_boxes, num_boxes))
        target = target_classes(query, labels, logits.shape[2], no_object)
        factor = class_factors(target != no_object, number, *class_settings)
        log_p = logits.log_softmax(-1)
        ce = -(factor * log_p.gather(-1, target[..., None]).squeeze(-1)).sum((1, 2))
        bbox, giou = box_losses(boxes, query, target_boxes, number)
        cardinality = _cardinality(logits, counts, no_object)
        ctx.save_for_backward(log_p, boxes, query, target, target_boxes, number, factor)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(cardinality)
        return *(w * x for w, x in zip(ctx.weights, (ce, bbox, giou))), cardinality

    @staticmethod
    @once_differentiable
    def backward(ctx, by_ce, by_bbox, by_giou, _):
        log_p, boxes, query, target, target_boxes, number, factor = ctx.saved_tensors
        by_ce, by_bbox, by_giou = (None if g is None else g * w for g, w in zip((by_ce, by_bbox, by_giou), ctx.weights))
        dlogits = dboxes = None
        if ctx.needs_input_grad[0] and by_ce is not None:
            dlogits = class_gradient(log_p.exp(), target, factor * by_ce[:, None, None]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1] and not by_bbox is by_giou is None:
            dboxes = box_gradient(by_bbox, by_giou, boxes, query, target_boxes, number).to(ctx.dtypes[1])
        return dlogits, dboxes, *(None,) * 6


def set_loss_cpu(
    logits, boxes, query, labels, target_boxes, counts, num_boxes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same result as ``set_loss_reference``, up to the order of sums."""
    return _SetLossCpu.apply(logits, boxes, query, labels, target_boxes, counts, num_boxes, settings)
