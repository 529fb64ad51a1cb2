"""What a model needs of a batch; errors name the field."""

from collections.abc import Mapping

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
