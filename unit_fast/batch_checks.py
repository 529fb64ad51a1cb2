"""What a model and its losses need of a batch; errors name the field."""

from collections.abc import Mapping

from torch import Tensor

from unit_fast.batch import Batch
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import Task


def checked_task(batch: Batch, tasks: Mapping[str, Task]) -> Task:
    """The task of ``batch``, one of ``tasks``; ``UserError`` where the batch has not what the task's model takes."""
    if not isinstance(batch, Batch):
        raise UserError(f"UniT: expected a unit_fast.Batch, found {type(batch).__name__}; make it with collate")
    task = tasks.get(batch.task)
    if task is None:
        raise UserError(f"the model has no task {batch.task!r}; {nearest(batch.task, tasks)}")
    if task.has_image and batch.image is None:
        raise UserError(f"{batch.task}: the batch has no image; give every sample an `image` [3,H,W]")
    if task.has_text and batch.input_ids is None:
        raise UserError(f"{batch.task}: the batch has no text; give every sample `input_ids` [T]")
    return task


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
