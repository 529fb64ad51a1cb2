"""Whether a run that goes on has the data that it was begun with.

A checkpoint holds ``Dataset.digest`` of each training set. Where the vocabulary, the answers or the categories are
others, the same numbers mean something else and going on would spoil the model: refused. Where the rows are others, the
order that the counters in the checkpoint stand for is another one: told.
"""

from unit_fast.errors import UserError
from unit_fast.tasks import get_task


def check_same_data(before: dict | None, now: dict[str, dict]) -> list[str]:
    """Compare ``Dataset.digest`` of each data set with those of a checkpoint, both by data set key.

    before: None for a checkpoint that was written without.

    Returns:
        Lines to tell.

    Raises:
        UserError: a vocabulary, answers or categories changed.
    """
    if before is None:
        return ["the checkpoint does not say what its data were: whether the annotation files changed is not known"]
    lines = []
    for name, digest in now.items():
        task, known = get_task(name).short, before.get(name)
        if known is None:
            continue
        others = [part for part, value in digest["meaning"].items() if known["meaning"].get(part, value) != value]
        if others:
            raise UserError(
                f"{task}: the {' and '.join(others)} changed since the checkpoint: its weights were trained on numbers "
                "that meant something else. Put the files back, or start a new run with --init-from"
            )
        if digest["rows"] != known["rows"]:
            count = f"{known['samples']:,} samples then, {digest['samples']:,} now"
            lines.append(
                f"{task}: the annotations changed since the checkpoint ({count}): the run does not go on as it would "
                "have, since its position counts samples in their order"
            )
    return lines
