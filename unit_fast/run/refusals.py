"""Updates that were refused because they were not finite, and how many of them end a run."""

from collections import Counter

from unit_fast.errors import UserError
from unit_fast.run.folder import EXIT

STRIKES = 3
"""So many updates in a row that are not finite, of the run or of one of its tasks, end the run."""


class NonFinite(UserError):
    """Several updates in a row were not finite, or all of a task."""

    status = "nonfinite"
    exit_code = EXIT[status]


class Refusals:
    """Counts of the updates that were refused, for the run and for each of its tasks."""

    def __init__(self):
        self.in_a_row = 0
        self.of_task: Counter[str] = Counter()
        """In a row among the updates of a task."""
        self.done: Counter[str] = Counter()
        """Updates of a task that were not refused."""
        self.refused: Counter[str] = Counter()

    def add(self, task: str, refused: bool) -> str | None:
        """Count an update. What there were too many of in a row, None while there are not."""
        if not refused:
            self.in_a_row = self.of_task[task] = 0
            self.done[task] += 1
            return None
        self.in_a_row += 1
        self.of_task[task] += 1
        self.refused[task] += 1
        if self.in_a_row >= STRIKES:
            return f"{STRIKES} updates in a row"
        return f"{STRIKES} updates of {task} in a row" if self.of_task[task] >= STRIKES else None

    @property
    def total(self) -> int:
        return self.refused.total()

    def untrained(self) -> dict[str, int]:
        """Task -> its updates, for tasks that had some and all were refused."""
        return {task: count for task, count in self.refused.items() if count and not self.done[task]}

    def state(self) -> dict:
        """For a checkpoint."""
        counters = {name: dict(getattr(self, name)) for name in ("of_task", "done", "refused")}
        return {"in_a_row": self.in_a_row, **counters}

    def restore(self, saved: dict | int, tasks) -> None:
        """``saved``: what ``state`` gave, or the number in a row of the checkpoints that knew no more; then ``tasks``
        count as trained before."""
        if isinstance(saved, int):
            saved = {"in_a_row": saved, "of_task": {}, "done": dict.fromkeys(tasks, 1), "refused": {}}
        self.in_a_row = saved["in_a_row"]
        for name in ("of_task", "done", "refused"):
            getattr(self, name).update(saved[name])
