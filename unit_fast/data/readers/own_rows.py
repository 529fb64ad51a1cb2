"""The rows of one's own data set: which files, which part of them, and what stands in each row."""

import ast
import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unit_fast.config import DataConfig
from unit_fast.data.errors import Findings, MissingSplit
from unit_fast.data.layout import OWN_SPLITS, Layout
from unit_fast.data.readers.by_hash import held_out
from unit_fast.data.readers.own_columns import LABELS, ROLES, check_columns, find_columns, kind_of, missing
from unit_fast.data.readers.tables import SUFFIXES, Table, open_table
from unit_fast.errors import UserError, nearest, printable
from unit_fast.tasks import Task

_LONG_CELL = 10_000
"""Characters of the longest cell that is looked at as a list of answers."""


@dataclass(frozen=True)
class Row:
    """What a row says."""

    where: str
    """File and line, for messages."""
    texts: tuple[str, ...]
    """The question or sentence; two of a pair."""
    said: tuple[str, ...]
    """The label, or the answers; none in a test table without them."""
    image: str = ""
    """Name of the image file, or its number."""
    id: str = ""
    """What the table calls the row, else its number in the table, from 0."""


@dataclass
class Tables:
    """The files of one's own data set."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    """Split -> its tables."""
    one_for_all: bool = False
    """There is no validation table: a tenth of the training table is held out for it."""

    def of(self, split: str) -> list[Path]:
        return self.files.get("train" if self.one_for_all and split == "val" else split, [])


def find_tables(layout: Layout, task: Task) -> Tables:
    """The tables of ``task``. ``MissingSplit`` where there are none, ``UserError`` where it is not clear which."""
    found = {split: layout.files(f"{task.short}.{split}") for split in OWN_SPLITS}
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        names = _any_tables(layout, task)
        if len(names) > 1:
            raise UserError(
                f"{task.short}: which of {', '.join(printable(path.name, 60) for path in names[:6])} is the training "
                f"table? Call it train{names[0].suffix} (and val{names[0].suffix}), or give "
                f"--data.paths {task.short}.train={printable(names[0].name, 60)}"
            )
        if not names:
            raise MissingSplit(
                f"{task.short}: no table in {printable(layout.root, 400)}; give train.csv and val.csv there (or .tsv, "
                f".jsonl, .json), or --data.paths {task.short}.train=FILE"
            )
        found = {"train": names}
    return Tables(found, one_for_all="val" not in found and "train" in found)


def _any_tables(layout: Layout, task: Task) -> list[Path]:
    for folder in (layout.root / task.short, layout.root):
        names = sorted(path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}") if path.is_file())
        names = [path for path in names if "annotations" not in path.name]
        if names:
            return names
    return []


def has_tables(layout: Layout, task: Task) -> bool:
    """Whether a data root has tables for ``task``: given, in a folder of its name, or in the root with its columns."""
    try:
        tables = find_tables(layout, task)
        paths = list(itertools.chain(*tables.files.values()))
        given = any(key.startswith(f"{task.short}.") for key in (*layout.overrides, *layout.columns))
        if given or any(path.parent == layout.root / task.short for path in paths):
            return True
        return kind_of(open_table(paths[0]).columns, layout.columns) == task.short
    except UserError:
        return False


def unclear_tables(layout: Layout) -> list[str]:
    """A line for each table in the data root whose columns are those of no task."""
    lines = []
    for path in sorted(path for suffix in SUFFIXES[:-1] for path in layout.root.glob(f"*{suffix}")):
        try:
            columns = open_table(path).columns
        except UserError as error:
            lines.append(str(error))
            continue
        if kind_of(columns, layout.columns) is None:
            lines.append(
                f"{printable(path, 400)}: its columns {printable(', '.join(columns))} are not called as those of a "
                f"task (answer: image, question, answer; entail: image, text, label; classify: text, label); name them "
                f"with --columns, e.g. classify.text={printable(columns[0], 40)} "
                f"classify.label={printable(columns[-1], 40)}"
            )
    return lines


def columns_of(table: Table, task: Task, data: DataConfig, labelled: bool) -> dict[str, str | None]:
    """Role -> column. ``UserError`` naming the file where one is missing.

    labelled: answers or labels must be there.
    """
    check_columns(data.columns)
    name = printable(table.path, 400)
    try:
        found = find_columns(task.short, table.columns, data.columns)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if lacking := missing(task.short, found, labelled):
        role = lacking[0]
        near = nearest(role, [column for column in table.columns if column not in found.values()] or table.columns)
        wanted = ", ".join(ROLES[task.short][role].names[:4])
        raise UserError(
            f"{name}: no column for the {role} (one called {wanted}, ...), found "
            f"{printable(', '.join(table.columns))}; {near}; rename it, or give --data.columns {role}=COLUMN"
        )
    return found


def said_columns(layout: Layout, task: Task, data: DataConfig) -> str:
    """In words, which column of the training table is taken for what."""
    (path, *_) = find_tables(layout, task).of("train")
    columns = columns_of(open_table(path), task, data, labelled=True)
    return ", ".join(f"{role} is {printable(column, 60)}" for role, column in columns.items() if column is not None)


def read_rows(layout: Layout, task: Task, split: str, data: DataConfig, findings: Findings) -> list[Row]:
    """The rows of a split. What is wrong with one is an error in ``findings`` that names its line.

    Raises:
        MissingSplit: there is no table for it.
        UserError: a table cannot be read, or lacks a column.
    """
    tables = find_tables(layout, task)
    paths = tables.of(split)
    if not paths:
        raise MissingSplit(
            f"{task.short}: no table for split {split}; looked for {layout.where(f'{task.short}.{split}')}"
        )
    rows = [row for path in paths for row in _table_rows(path, task, split, data, findings)]
    if tables.one_for_all and split != "test":
        held = held_out([row.image or "\n".join(row.texts) for row in rows])
        rows = [row for row, out in zip(rows, held) if out == (split == "val")]
    return rows


def _table_rows(path: Path, task: Task, split: str, data: DataConfig, findings: Findings) -> Iterator[Row]:
    table = open_table(path)
    columns = columns_of(table, task, data, labelled=split != "test")
    numbered = ((where, (number, cells)) for number, (where, cells) in enumerate(table.rows()))
    parsed = findings.parsed("malformed row", numbered, lambda row, where: _row(*row, where, columns, split))
    return (row for _, row in parsed)


def _row(number: int, cells: dict, where: str, columns: dict[str, str | None], split: str) -> Row:
    if None in cells:
        raise UserError(f"{where}: {cells[None]}")
    value = {role: cells.get(column) for role, column in columns.items() if column is not None}
    texts = [role for role in ("question", "text", "text_b") if role in value]
    said: list[str] = []
    label_role = next((role for role in LABELS if role in value), None)
    if label_role == "answer":
        said = _answers(value["answer"], where)
    elif label_role == "label":
        said = [text] if (text := _text(value["label"], "label", where)) else []
    if not said and split != "test":
        raise UserError(f"{where}: the {label_role} ({columns[label_role]}) is empty; give one, or remove the row")
    image = _text(value["image"], "image", where) if "image" in value else ""
    if "image" in value and not image:
        raise UserError(f"{where}: the image ({columns['image']}) is empty; give a file name, or remove the row")
    found = tuple(_text(value[role], role, where) for role in texts)
    if not found[0]:
        raise UserError(f"{where}: the {texts[0]} ({columns[texts[0]]}) is empty; give one, or remove the row")
    return Row(where, found, tuple(said), image, _text(value.get("id"), "id", where) or str(number))


def _text(value, role: str, where: str) -> str:
    """A cell as text: numbers as they are written, whole ones without a point."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: the {role} must be a text or a number, found {type(value).__name__}")
    return str(value).strip()


def _answers(value, where: str) -> list[str]:
    """The answers of a cell: one text, or a list of texts or of objects with ``answer`` as in VQA v2."""
    if isinstance(value, str) and value.strip().startswith("[") and len(value) <= _LONG_CELL:
        value = _listed(value)
    if not isinstance(value, list):
        value = [value]
    said = [_text(one.get("answer") if isinstance(one, dict) else one, "answer", where) for one in value]
    return [text for text in said if text]


def _listed(text: str):
    """A list written in a cell, as JSON or as Python has it; the text itself where it is none."""
    for read in (json.loads, ast.literal_eval):  # the latter takes literals alone
        try:
            with warnings.catch_warnings(action="ignore"):  # of backslashes in a text that is no list
                found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return text
