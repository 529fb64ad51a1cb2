"""The losses of a step as one forward pass, for wrappers that follow a module's forward: DistributedDataParallel."""

import torch
from torch import Tensor, nn

from unit_fast.batch import Batch
from unit_fast.model.unit import UniT


class _Attach(torch.autograd.Function):
    """The loss itself, with a gradient of exactly zero for ``parameters``."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        ctx.save_for_backward(*parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(parameter.new_zeros(()).expand_as(parameter) for parameter in ctx.saved_tensors)


class StepLosses(nn.Module):
    """``StepLosses(model)(batch)`` is the dict of weighted losses of ``model`` on a batch of one task.

    A step uses some of the parameters only; here the others have a gradient of exactly zero, so that
    ``DistributedDataParallel(StepLosses(model))`` needs no ``find_unused_parameters``. ``MaskedAdamW`` with its default
    ``unused="skip"`` leaves a parameter whose gradient is zero as it is, bit for bit. Every process must take the same
    task in a step.
    """

    def __init__(self, model: UniT):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.model.losses(self.model(batch), batch)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        first = next(iter(losses))
        return {**losses, first: _Attach.apply(losses[first], *trained)}
