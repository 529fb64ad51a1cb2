"""What losses need of a batch, named where it is missing."""

from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.errors import UserError


def check_targets(where: str, batch: Batch, *names: str) -> None:
    """``UserError`` beginning with ``where`` where one of the fields ``names`` of ``batch`` is no tensor."""
    for name in names:
        value = getattr(batch, name)
        if not isinstance(value, Tensor):
            found = f"has no {name}" if value is None else f"has {name} of type {type(value).__name__}"
            raise UserError(
                f"{where}: the batch of {batch.task} {found}; give every sample its targets, and make the batch with "
                "unit_fast.collate"
            )
