"""What follows from the data in a model: the classes of the tasks that do not have published ones."""

import dataclasses

from unit_fast.config import DataConfig, RunConfig, TaskConfig
from unit_fast.data import reader_of
from unit_fast.data.errors import MissingSplit
from unit_fast.errors import UserError
from unit_fast.tasks import get_task


def resolved(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with every task's ``outputs`` and ``classes`` filled in, and lines that tell what was found.

    A task that has its classes already, as in the configuration that a run wrote, is left as it is. One whose classes
    would come from the data, and that no sample is drawn of (``ratios``), is left out. ``UserError`` where the files
    cannot be used.
    """
    tasks, told = {}, []
    for name, task in config.model.tasks.items():
        if task.outputs == 0 and config.ratios and not config.ratios.get(name):
            told.append(f"{get_task(name).short}: has no share in ratios and is left out")
            continue
        try:
            tasks[name], lines = resolved_task(name, config.data, task)
        except MissingSplit as error:
            if len(config.model.tasks) == 1:
                raise
            raise MissingSplit(f"{error}; or leave the task out, with a share of 0: --ratios.{name} 0") from None
        told += lines
    if tasks == config.model.tasks:
        return config, told
    return dataclasses.replace(config, model=dataclasses.replace(config.model, tasks=tasks)), told


def resolved_task(name: str, data: DataConfig, config: TaskConfig) -> tuple[TaskConfig, list[str]]:
    """As ``resolved``, of the one task ``name``."""
    if config.outputs and config.classes:
        return config, []
    task = get_task(name)
    found = reader_of(task).outputs_of(task, data, config)
    if found is None:
        if config.outputs == 0:
            raise UserError(
                f"model.tasks.{name}.outputs: is 0, but {task.short} has its published classes; give their number, "
                f"{task.outputs}"
            )
        return config, []
    count = len(found.classes) + task.is_detection  # the last one is no-object
    config = dataclasses.replace(
        config, outputs=config.outputs or count, classes=found.classes, class_ids=found.class_ids
    )
    return config, [f"{task.short}: {line}" for line in found.lines]
