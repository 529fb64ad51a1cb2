"""The four GLUE tasks (SPEC 4.1): the official tab-separated tables, or Hugging Face's parquet or arrow export."""

from pathlib import Path

import numpy as np

from unit_fast.data.readers.dataset import Dataset
from unit_fast.data.readers.sources import read_through
from unit_fast.data.store import files
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError, printable

COLUMNS = {
    "qnli": (("question", "sentence"), "label"),
    "mnli": (("sentence1", "sentence2"), "gold_label"),
    "qqp": (("question1", "question2"), "is_duplicate"),
    "sst2": (("sentence",), "label"),
}
"""Text columns and label column of the official tables, by short task name."""
EXPORT_COLUMNS = {"mnli": ("premise", "hypothesis")}
"""Text columns of the Hugging Face export where they are called otherwise; the label column is ``label``, -1 in
test."""
BAD_ROWS = 0.01
"""Largest share of rows with a wrong number of columns; the official QQP table has a few."""


class Glue(Dataset):
    """A GLUE task. Rows without a label (``-``, -1 or a broken line) are left out of train and val and counted."""

    def _read(self) -> None:
        key = f"{self.task.short}.{self.split}"
        paths = self.layout.files(key)
        if not paths:
            raise self._missing(key)
        self.facts["files"] = [str(path) for path in paths]
        self.labelled = self.split != "test"
        self.rows = read_through(self, {"files": paths}, {}, lambda: self._rows(paths))
        self.labels, self.row_numbers = self.rows.arrays["labels"], self.rows.arrays["row_numbers"]
        self.columns = tuple(self.rows.strings(f"sentence{i}") for i in range(len(COLUMNS[self.task.short][0])))

    def _rows(self, paths: list[Path]) -> Content:
        texts: list[tuple[str, ...]] = []
        rows: list[int] = []
        labels = []
        row = 0
        for path in paths:
            read = self._table if path.suffix == ".tsv" else self._export
            for where, text, label in read(path):
                row += 1
                if text is None:
                    continue
                value = self._label(label, where) if self.labelled else -1
                if value is None:
                    continue
                texts.append(text)
                rows.append(row - 1)
                labels.append(value)
        content = Content({"labels": np.array(labels, dtype=np.int8), "row_numbers": np.array(rows, dtype=np.int64)})
        for i in range(len(COLUMNS[self.task.short][0])):
            content.put_strings(f"sentence{i}", [text[i] for text in texts])
        self.facts["rows"] = len(labels)
        if self.labelled:
            self.facts.update({name: labels.count(i) for i, name in enumerate(self.task.labels)})
        return content

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> int:
        """Number of the row in its file or files, from 0."""
        return int(self.row_numbers[index])

    def _fields(self, index: int, geometry: None) -> dict:
        """``input_ids`` and so on, and ``label`` where the split has labels."""
        sample = {**self._encode(index), "sample_id": self.sample_id(index)}
        if self.labelled:
            sample["label"] = int(self.labels[index])
        return sample

    def _label(self, label, where) -> int | None:
        """Class of a label by name or number; None for a row that has none."""
        names = self.task.labels
        if label in names:
            return names.index(label)
        if label in ("-", "-1", -1, None):
            self.findings.note("row without a label", f"{where}: label is {label}")
            return None
        numbers = {i: i for i in range(len(names))} | {str(i): i for i in range(len(names))}
        if type(label) in (int, str) and label in numbers:
            return numbers[label]
        self.findings.error(
            "unknown label",
            f"{where}: label {printable(repr(label), 60)} is not one of {', '.join(names)} or 0..{len(names) - 1}",
        )
        return None

    def _table(self, path: Path):
        """(where, texts or None for a broken line, label) of each row of an official table. Quotes are plain text."""
        texts, label_name = COLUMNS[self.task.short]
        lines = files.read_lines(path)
        name = printable(path, 400)
        _, header = next(lines, (0, ""))
        header = header.split("\t")
        wanted = [*texts, *((label_name,) if self.labelled else ())]
        for column in wanted:
            if column not in header:
                raise UserError(
                    f"{name}: column {column!r} is missing; found {printable(', '.join(header))}; give GLUE's "
                    f"{self.task.title} table"
                )
        at = [header.index(column) for column in texts]
        label_at = header.index(label_name) if self.labelled else None
        total = broken = 0
        for number, line in lines:
            if not line:
                continue
            total += 1
            where = f"{name}:{number}"
            cells = line.split("\t")
            if len(cells) != len(header):
                broken += 1
                self.findings.note(
                    "row with a wrong number of columns", f"{where}: {len(cells)} columns, the header has {len(header)}"
                )
                if broken > max(10, BAD_ROWS * total) and total > 200 or (broken > 10 and broken == total):
                    raise UserError(
                        f"{where}: {len(cells)} columns, the header has {len(header)}; {broken} of {total} rows so far "
                        f"are broken: is this the right file?"
                    )
                yield where, None, None
                continue
            yield where, tuple(cells[i] for i in at), cells[label_at] if label_at is not None else None

    def _export(self, path: Path):
        """The same from a Hugging Face export."""
        texts = EXPORT_COLUMNS.get(self.task.short, COLUMNS[self.task.short][0])
        wanted = [*texts, *(("label",) if self.labelled else ())]
        name = printable(path, 400)
        row = 0
        for batch in _record_batches(path):
            missing = [column for column in wanted if column not in batch.schema.names]
            if missing:
                raise UserError(f"{name}: column {missing[0]!r} is missing; found {', '.join(batch.schema.names)}")
            try:
                columns = [batch.column(column).to_pylist() for column in wanted]
            except (ValueError, OverflowError) as error:  # texts that are not UTF-8, times beyond Python's
                raise UserError(f"{name}: a row after row {row} cannot be read ({files.describe(error)})") from None
            for values in zip(*columns):
                row += 1
                where = f"{name}: row {row}"
                text = values[: len(texts)]
                if not all(isinstance(part, str) for part in text):
                    self.findings.error("malformed row", f"{where}: {', '.join(texts)} must be text")
                    yield where, None, None
                    continue
                yield where, tuple(text), values[-1] if self.labelled else None


def _record_batches(path: Path):
    """Record batches of a parquet file or an arrow file or stream."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{printable(path, 400)}: reading parquet and arrow files needs pyarrow; pip install unit_fast[hf]"
        ) from None
    files.open_file(path, files.TABLE_LIMIT).close()  # the libraries would wait for a FIFO
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches()
            return
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
                return
            yield from reader
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # names that are not UTF-8 among them
        raise UserError(f"{printable(path, 400)}: cannot be read ({files.describe(error)})") from None
