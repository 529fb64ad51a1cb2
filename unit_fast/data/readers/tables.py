"""Tables that users write: CSV, TSV, JSON lines, a JSON list, and VQA v2's pair of questions and annotations."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unit_fast.data.store import files
from unit_fast.errors import UserError, printable

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
DELIMITERS = ",;\t|"
"""Of a ``.csv`` file; the one that divides the header into most columns."""


@dataclass(frozen=True)
class Table:
    """A table as it is read, row by row."""

    path: Path
    columns: list[str]
    """Names of the columns in their order; of JSON lines the keys of the first object."""
    rows: Callable[[], Iterator[tuple[str, dict]]]
    """(where it stands, value by column) of each row, from the start. A row that is broken raises no error: it is
    ``{}`` with the reason under the key ``None``."""


def open_table(path: Path) -> Table:
    """The table in ``path``, by the ending of its name; VQA v2's questions with the annotations beside them.

    ``UserError`` on another kind of file, or one without a header or row.
    """
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _delimited(path, "\t" if kind == ".tsv" else None)
    if kind == ".jsonl":
        return _objects(path, lambda: _json_lines(path))
    if kind == ".json":
        return _json(path)
    raise UserError(f"{printable(path, 400)}: not a table; give a file in {', '.join(SUFFIXES)}")


def _delimited(path: Path, delimiter: str | None) -> Table:
    name = printable(path, 400)
    first = next((line for _, line in files.read_lines(path) if line.strip()), None)
    if first is None:
        raise UserError(f"{name}: is empty; its first line must name the columns")
    if delimiter is None:
        delimiter = max(DELIMITERS, key=lambda d: len(next(csv.reader([first], delimiter=d))))
    # in tab-separated tables quotes are plain text, as in those of GLUE
    quoting = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {"strict": True}

    def cells() -> Iterator[tuple[str, list[str]]]:
        reader = csv.reader((f"{line}\n" for _, line in files.read_lines(path)), delimiter=delimiter, **quoting)
        number = 1
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield f"{name}:{number}", row
                number = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{name}:{number}: not a row of a table ({printable(error)}); is a quotation mark not closed? Write a "
                'cell with commas, quotes or line breaks as "...", and a quotation mark in it twice'
            ) from None

    header = [cell.strip() for cell in next(cells())[1]]
    if len(set(header)) != len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise UserError(f"{name}: column {printable(twice)!r} stands twice in the first line; rename one")

    def rows() -> Iterator[tuple[str, dict]]:
        found = cells()
        next(found)
        for where, row in found:
            if len(row) != len(header):
                yield where, {None: f"{len(row)} cells, the first line names {len(header)} columns"}
            else:
                yield where, dict(zip(header, row))

    return Table(path, header, rows)


def _objects(path: Path, rows: Callable[[], Iterator[tuple[str, dict]]]) -> Table:
    _, first = next(rows(), ("", {}))
    if None in first or not first:
        raise UserError(f"{printable(path, 400)}: {first.get(None, 'is empty')}; give an object with keys for each row")
    return Table(path, list(first), rows)


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in files.read_lines(path):
        if line.strip():
            where = f"{printable(path, 400)}:{number}"
            yield where, _object(files.parse_json(line.encode(), where))


def _json(path: Path) -> Table:
    content, name = files.read_json(path), printable(path, 400)
    if isinstance(content, dict) and "questions" in content:
        content = _questions(content, name, annotations_of(path))
    if not isinstance(content, list):
        raise UserError(f"{name}: must be a list of objects, or VQA v2's questions, found {type(content).__name__}")
    return _objects(path, lambda: ((f"{name}: row {n}", _object(entry)) for n, entry in enumerate(content)))


def _object(entry) -> dict:
    return entry if isinstance(entry, dict) else {None: f"must be an object with keys, found {type(entry).__name__}"}


def annotations_of(questions: Path) -> Path | None:
    """The annotations that belong to VQA v2's ``questions``, by their name; None where there are none."""
    name = questions.name.replace("questions", "annotations")
    for candidate in (name, name.replace("OpenEnded_", "")):
        if candidate != questions.name and (questions.parent / candidate).is_file():
            return questions.parent / candidate
    return None


def _questions(content: dict, name: str, annotations: Path | None) -> list[dict]:
    """VQA v2's questions as rows: ``question_id``, ``image_id``, ``question``, and ``answers`` where there are any."""
    said: dict[int, list[str]] = {}
    if annotations is not None:
        drop = ("question_type", "answer_type", "answer_confidence", "answer_id")
        answers = files.read_json(annotations, drop=drop)
        for where, record in files.records(answers, "annotations", printable(annotations, 400)):
            given = files.sequence(record, "answers", where)
            said[files.integer(record, "question_id", where)] = [
                files.string(answer, "answer", f"{where}.answers[{n}]") for n, answer in enumerate(given)
            ]
    rows = []
    for where, record in files.records(content, "questions", name):
        number = files.integer(record, "question_id", where)
        row = {
            "question_id": number,
            "image_id": files.integer(record, "image_id", where),
            "question": files.string(record, "question", where),
        }
        rows.append(row if annotations is None else row | {"answers": said.get(number)})
    return rows
