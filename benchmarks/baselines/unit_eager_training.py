"""Criterion and optimiser of the eager baseline, as the authors and their field write them.

One criterion call a decoder layer, one ``cdist`` cost over all image pairs and one SciPy call an image in it; AdamW as
a loop over tensors that reads the device once a tensor. Formulas: SPEC 2 and 3.

Shapes: B batch, L decoder layers, Q queries, D decoder width, K classes, n objects of an image.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


class AttributeHead(nn.Module):
    """Attribute logits of queries whose class is given."""

    def __init__(self, width: int, classes: int, attributes: int):
        super().__init__()
        self.cls_embed = nn.Embedding(classes, 256)
        self.attr_linear1, self.attr_linear2 = nn.Linear(width + 256, 512), nn.Linear(512, attributes)

    def forward(self, hidden: Tensor, classes: Tensor) -> Tensor:
        joined = torch.cat([hidden, self.cls_embed(classes)], dim=-1)
        return F.relu(self.attr_linear2(self.attr_linear1(joined)))


def corners(boxes: Tensor) -> Tensor:
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every corner box of ``a`` with every one of ``b``; asserts ordered corners, a host read."""
    assert (a[:, 2:] >= a[:, :2]).all()
    assert (b[:, 2:] >= b[:, :2]).all()
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    low, high = torch.max(a[:, None, :2], b[:, :2]), torch.min(a[:, None, 2:], b[:, 2:])
    overlap = (high - low).clamp(min=0).prod(2)
    union = area_a[:, None] + area_b - overlap
    low, high = torch.min(a[:, None, :2], b[:, :2]), torch.max(a[:, None, 2:], b[:, 2:])
    hull = (high - low).clamp(min=0).prod(2)
    return overlap / union - (hull - union) / hull


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
    """(query, object) indices per image of one decoder layer. logits [B,Q,K], boxes [B,Q,4]."""
    batch, queries = logits.shape[:2]
    probability, predicted = logits.flatten(0, 1).softmax(-1), boxes.flatten(0, 1)
    labels = torch.cat([t["labels"] for t in targets])
    wanted = torch.cat([t["boxes"] for t in targets])
    cost = 5 * torch.cdist(predicted, wanted, p=1) - probability[:, labels]
    cost = cost - 2 * pairwise_giou(corners(predicted), corners(wanted))
    cost = cost.view(batch, queries, -1).cpu()
    sizes = [len(t["labels"]) for t in targets]
    pairs = [linear_sum_assignment(block[i]) for i, block in enumerate(cost.split(sizes, -1))]
    return [(torch.as_tensor(q, dtype=torch.int64), torch.as_tensor(o, dtype=torch.int64)) for q, o in pairs]


class DetectionLoss(nn.Module):
    """DETR's set criterion, one call a decoder layer, plus the attribute loss of Visual Genome."""

    def __init__(self, outputs: int, no_object_weight: float, width: int = 0, attributes: int = 0):
        super().__init__()
        self.no_object = outputs - 1
        weight = torch.ones(outputs)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight)
        if attributes:
            self.attribute_head = AttributeHead(width, outputs, attributes)

    def layer(self, logits: Tensor, boxes: Tensor, hidden: Tensor, targets: list[dict], num_boxes: float, pairs=None):
        """Weighted terms of one decoder layer, and its matching (done here unless given)."""
        pairs = match(logits, boxes, targets) if pairs is None else pairs
        image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
        query = torch.cat([q for q, _ in pairs])
        classes = torch.full(logits.shape[:2], self.no_object, dtype=torch.int64, device=logits.device)
        classes[image, query] = torch.cat([t["labels"][o] for t, (_, o) in zip(targets, pairs, strict=True)])
        predicted = boxes[image, query]
        wanted = torch.cat([t["boxes"][o] for t, (_, o) in zip(targets, pairs, strict=True)])
        terms = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)}
        terms["loss_bbox"] = 5 * F.l1_loss(predicted, wanted, reduction="none").sum() / num_boxes
        giou = torch.diag(pairwise_giou(corners(predicted), corners(wanted)))
        terms["loss_giou"] = 2 * (1 - giou).sum() / num_boxes
        with torch.no_grad():  # logged by the authors, no part of the loss
            counts = torch.as_tensor([len(t["labels"]) for t in targets], device=logits.device)
            found = (logits.argmax(-1) != self.no_object).sum(1)
            self.cardinality_error = F.l1_loss(found.float(), counts.float())
        if hasattr(self, "attribute_head"):
            terms["loss_attr"] = self.attribute_loss(hidden, classes, image, query, targets, pairs)
        return terms, pairs

    def attribute_loss(self, hidden, classes, image, query, targets, pairs) -> Tensor:
        logits = self.attribute_head(hidden, classes)
        slots = targets[0]["attributes"].shape[-1]
        wanted = torch.full((*classes.shape, slots), -1, dtype=torch.int64, device=hidden.device)
        wanted[image, query] = torch.cat([t["attributes"][o] for t, (_, o) in zip(targets, pairs, strict=True)])
        count = (wanted >= 0).sum(-1).flatten()
        repeated = logits.flatten(0, 1)[:, None].expand(-1, slots, -1).reshape(-1, logits.shape[-1])
        each = F.cross_entropy(repeated, wanted.flatten(), ignore_index=-1, reduction="none").view(-1, slots)
        per_query = 0.5 * each.sum(1) / count.clamp(min=1).to(each.dtype)
        valid = (per_query != 0).sum()
        return per_query.sum() / valid if valid.item() > 0 else per_query.sum() * 0.0

    def forward(self, logits: Tensor, boxes: Tensor, hidden: Tensor, targets: list[dict], matched=None):
        """logits [L,B,Q,K], boxes [L,B,Q,4], hidden [L,B,Q,D] -> terms by name, matching per layer (or ``matched``)."""
        total = torch.as_tensor([sum(len(t["labels"]) for t in targets)], dtype=torch.float, device=logits.device)
        num_boxes = total.clamp(min=1).item()
        terms, matching, last = {}, [], len(logits) - 1
        for i in range(len(logits)):
            given = None if matched is None else matched[i]
            layer, pairs = self.layer(logits[i], boxes[i], hidden[i], targets, num_boxes, given)
            matching.append(pairs)
            terms.update({name if i == last else f"{name}_{i}": value for name, value in layer.items()})
        return terms, matching


class HFAdamW(torch.optim.Optimizer):
    """Hugging Face's AdamW (eps beside the plain root, decay after the step) as a loop over tensors.

    ``skip_zero`` is the authors' variant: a tensor whose gradient sums to exactly zero is left alone, found out by one
    host read a tensor.
    """

    def __init__(self, params, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, skip_zero=True):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.skip_zero = skip_zero

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or (self.skip_zero and gradient.abs().sum().item() == 0.0):
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                first, second, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                first.mul_(beta1).add_(gradient, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = second.sqrt().add_(group["eps"])
                size = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                parameter.addcdiv_(first, denominator, value=-size)
                if group["weight_decay"] > 0:
                    parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
