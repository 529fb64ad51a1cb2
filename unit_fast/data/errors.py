"""Errors of the data sets, and the book of what a reader found odd."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from unit_fast.errors import UserError, printable


class MissingSplit(UserError):
    """The files of a split are not there. Callers may go on without it (a task without validation data)."""


class EmptySplit(MissingSplit):
    """The files of a split are there, but hold no sample of it. ``by_ids``: they are files of all splits, and the ids
    in them decide, so that an empty split need not be a mistake."""

    def __init__(self, message: str, by_ids: bool = False):
        super().__init__(message)
        self.by_ids = by_ids


class BadImage(UserError):
    """An image that cannot be used. ``path`` names the file, ``reason`` says why."""

    def __init__(self, path, reason: str):
        super().__init__(f"{printable(path, 400)}: {printable(reason)}; replace the file or remove its rows")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self):  # the default would pass the message as ``path`` when a loader process hands the error over
        return BadImage, (self.path, self.reason)


@dataclass
class Finding:
    """One kind of oddity: how often, and the first examples in full."""

    kind: str
    severity: str
    """``error``: training would refuse it; ``note``: dropped or tolerated by rule, and counted."""
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """What a reader found. Strict (training): the first error is raised. Otherwise (``data check``): all are kept.

    A reader calls ``error`` or ``note`` where it meets something and then leaves the record out, so that one reading
    function serves both.
    """

    def __init__(self, *, strict: bool = True, examples: int = 3):
        self.strict = strict
        self.limit = examples
        self.found: dict[str, Finding] = {}

    def error(self, kind: str, message: str) -> None:
        """Something training cannot accept. ``message`` names file, key, value and remedy."""
        if self.strict:
            raise UserError(message)
        self._add(kind, "error", message)

    def note(self, kind: str, message: str) -> None:
        """Something that is left out or tolerated by rule."""
        self._add(kind, "note", message)

    def parsed(self, kind: str, records: Iterable[tuple[str, object]], parse: Callable) -> Iterator[tuple[str, object]]:
        """(where, ``parse(record, where)``) of each (where, record); one that raises ``UserError`` is an error of
        ``kind`` and left out."""
        for where, record in records:
            try:
                found = parse(record, where)
            except UserError as problem:
                self.error(kind, str(problem))
                continue
            yield where, found

    def _add(self, kind, severity, message):
        finding = self.found.setdefault(kind, Finding(kind, severity))
        finding.count += 1
        if len(finding.examples) < self.limit:
            finding.examples.append(message)

    def count(self, kind: str) -> int:
        """How often ``kind`` was found."""
        return self.found[kind].count if kind in self.found else 0
