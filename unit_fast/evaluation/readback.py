"""Values of several batches from the device to the host in one copy."""

import torch
from torch import Tensor


class Readback:
    """Values of several batches on their way from the device to the host, in one copy that waits for nothing.

    values: of each batch tensors by name, of any shape and type that double precision holds exactly.
    """

    def __init__(self, values: list[dict[str, Tensor]]):
        self.forms = [{name: (x.shape, x.dtype) for name, x in batch.items()} for batch in values]
        packed = torch.cat([x.detach().reshape(-1).double() for batch in values for x in batch.values()])
        self.event = None
        if packed.is_cuda:
            self.host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.host.copy_(packed, non_blocking=True)
            self.event = torch.cuda.current_stream(packed.device).record_event()
        else:
            self.host = packed

    def take(self) -> list[dict[str, Tensor]]:
        """The values, floating ones in double precision; waits for the copy."""
        if self.event is not None:
            self.event.synchronize()
        found, at = [], 0
        for forms in self.forms:
            batch = {}
            for name, (shape, dtype) in forms.items():
                flat = self.host[at : at + shape.numel()]
                batch[name] = (flat if dtype.is_floating_point else flat.to(dtype)).reshape(shape)
                at += shape.numel()
            found.append(batch)
        return found
