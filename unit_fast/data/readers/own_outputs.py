"""What follows from one's own tables in a model: the classes or the answers, in a fixed order."""

from collections import Counter

from unit_fast.config import DataConfig
from unit_fast.data.errors import Findings, MissingSplit
from unit_fast.data.layout import Layout
from unit_fast.data.readers.own_rows import Row, find_tables, read_rows, said_columns
from unit_fast.data.readers.vqa2 import normalise_answer
from unit_fast.errors import UserError, nearest, printable
from unit_fast.tasks import Task

UNKNOWN = "<unk>"
"""Answer 0, which stands for all that are not in the list and is never given."""
_FEW = 50
"""As many classes need no second look; more of them than half the rows are no classes."""


def find_outputs(task: Task, data: DataConfig) -> tuple[tuple[str, ...], list[str]]:
    """The names of the outputs from the training and validation tables, and lines that tell what was found.

    Classes are sorted, as numbers where all are numbers. Answers are sorted too, behind ``<unk>``; of answers with one
    normal form (``vqa2.normalise_answer``) the most frequent spelling stands for all. ``UserError`` on tables that
    cannot be used.
    """
    layout, rows, findings = Layout(data), {}, Findings(strict=False)
    for split in ("train", "val"):
        try:
            rows[split] = read_rows(layout, task, split, data, findings)
        except MissingSplit:
            if split == "train":
                raise
    lines = [f"columns: {said_columns(layout, task, data)}"]
    if find_tables(layout, task).one_for_all:
        kept, held = len(rows["train"]), len(rows["val"])
        key = "image" if task.has_image else "text"
        lines.append(
            f"no validation table: {held:,} of {kept + held:,} rows, always the same by a hash of the {key}, are held "
            "out of training"
        )
    try:
        found, told = _answers(rows["train"], data) if task.loss == "bce" else _classes(rows)
    except UserError as error:  # rows that could not be read are the likelier reason
        raise next((UserError(f.examples[0]) for f in findings.found.values()), error) from None
    return found, lines + told


def _classes(rows: dict[str, list[Row]]) -> tuple[tuple[str, ...], list[str]]:
    counts = Counter(row.said[0] for row in rows["train"])
    others = Counter(row.said[0] for row in rows.get("val", ()))
    names = sorted({*counts, *others}, key=_order({*counts, *others}))
    where = rows["train"][0].where.rpartition(":")[0] if rows["train"] else "the training table"
    if len(names) < 2:
        only = f"only the label {printable(names[0], 60)!r}" if names else "no row"
        raise UserError(f"{where}: {only}; there must be two classes to tell apart")
    total = counts.total()
    if len(names) > max(_FEW, total // 2):
        raise UserError(
            f"{where}: {len(names):,} different labels in {total:,} rows (such as {printable(names[0], 60)!r}): is "
            "this the column of the label? Give --data.columns label=COLUMN"
        )
    most, least = counts.most_common(1)[0], min(counts.items(), key=lambda item: (item[1], item[0]))
    lines = [
        f"{len(names)} classes: {_some(names)}; {total:,} training rows, from {least[1]:,} of "
        f"{printable(least[0], 40)} to {most[1]:,} of {printable(most[0], 40)}"
    ]
    if unseen := [name for name in names if name not in counts]:
        share = sum(others[name] for name in unseen)
        lines.append(
            f"{len(unseen)} of the classes are in no training row ({_some(unseen)}; {share} validation rows): they "
            f"cannot be learnt; {nearest(unseen[0], [name for name in names if name in counts])}"
        )
    return tuple(names), lines


def _answers(rows: list[Row], data: DataConfig) -> tuple[tuple[str, ...], list[str]]:
    questions, spellings = Counter(), {}
    for row in rows:
        forms = {}
        for answer in row.said:
            form = normalise_answer(answer) or answer
            forms[form] = answer
            spellings.setdefault(form, Counter())[answer] += 1
        questions.update(forms.keys() - {UNKNOWN})
    ranked = sorted(questions, key=lambda form: (-questions[form], form))
    kept = [form for form in ranked if questions[form] >= data.answer_min_count][: data.answers_kept]
    names = [min(spellings[form].items(), key=lambda item: (-item[1], item[0]))[0] for form in kept]
    where = rows[0].where.rpartition(":")[0] if rows else "the training table"
    if len(names) < 2:
        raise UserError(
            f"{where}: {len(names)} answers are given to at least {data.answer_min_count} questions; there must be two "
            "to choose from; lower --data.answer-min-count, or give more questions"
        )
    names.sort(key=_order(set(names)))
    lines = [f"{len(names):,} answers: {_some(names)}; {len(rows):,} training questions"]
    if left := len(ranked) - len(kept):
        chosen = set(kept)
        none = sum(not any((normalise_answer(a) or a) in chosen for a in row.said) for row in rows)
        lines.append(
            f"{left:,} rarer answers are left out (data.answer_min_count {data.answer_min_count}, data.answers_kept "
            f"{data.answers_kept:,}); {none:,} training questions have no other"
        )
    return (UNKNOWN, *names), lines


def _order(names: set[str]):
    """Numbers by value where all are numbers, else by their characters."""
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return lambda name: (0.0, name)
    if any(value != value for value in values.values()):  # nan is no number to sort by
        return lambda name: (0.0, name)
    return lambda name: (values[name], name)


def _some(names: list[str]) -> str:
    return ", ".join(printable(name, 40) for name in names[:6]) + (", ..." if len(names) > 6 else "")
