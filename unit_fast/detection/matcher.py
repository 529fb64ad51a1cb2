"""Which query stands for which object: exact minimum-cost pairing, per image and decoder layer (SPEC 2.1)."""

from torch import Tensor

from unit_fast import ops
from unit_fast.batch import Batch
from unit_fast.config import LossConfig
from unit_fast.detection.targets import check_targets


def match(logits: Tensor, boxes: Tensor, batch: Batch, loss: LossConfig) -> Tensor:
    """The query of every object in every decoder layer: int64 [L,B,N], -1 = none. No gradient.

    logits [L,B,Q,K], boxes [L,B,Q,4] cxcywh, batch with labels [B,N], boxes [B,N,4] and counts [B]. An object has no
    query when it is padding (at and beyond counts) or was left over because its image has more than Q objects. The cost
    is that of ``ops.match_cost`` with the weights of ``loss``; with ``balanced_class_loss`` its class part is the
    log-probability. All layers and images are one batched problem. ``UserError`` where the batch has no targets.
    """
    check_targets("match", batch, "labels", "boxes", "counts")
    cost = ops.match_cost(
        logits,
        boxes,
        batch.labels,
        batch.boxes,
        batch.counts,
        cost_class=loss.cost_class,
        cost_bbox=loss.cost_bbox,
        cost_giou=loss.cost_giou,
        log_softmax=loss.balanced_class_loss,
    )
    query, _ = ops.assignment(cost, batch.counts)
    return query
