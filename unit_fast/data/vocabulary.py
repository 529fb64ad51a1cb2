"""The vocabulary that a run's texts are read with: a file, or made of the user's own texts."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from unit_fast.config import RunConfig
from unit_fast.data.errors import Findings
from unit_fast.data.layout import Layout
from unit_fast.data.readers.own_rows import read_rows
from unit_fast.data.text.training import SPECIAL, train_vocabulary
from unit_fast.data.text.wordpieces import load_vocabulary
from unit_fast.errors import printable
from unit_fast.files import replace
from unit_fast.tasks import OWN, get_task

VOCABULARY = "vocab.txt"
"""Name of the file in a run folder."""


def with_kept_vocabulary(config: RunConfig, kept: Path | None) -> RunConfig:
    """``config`` reading the ``kept`` vocabulary of its run where its own file is not there: the run was moved, or its
    data root has none."""
    if kept is None or not kept.is_file() or (config.data.vocab and Path(config.data.vocab).expanduser().is_file()):
        return config
    if Layout(dataclasses.replace(config.data, vocab=None)).find("bert.vocab") and not config.data.vocab:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, vocab=str(kept)))


def with_vocabulary(
    config: RunConfig, others: Iterable[Path] = (), folder: Path | None = None
) -> tuple[RunConfig, list[str]]:
    """``config`` with ``model.text.vocab_size`` filled in where it is 0, and lines that tell what was taken.

    In this order: ``data.vocab``; the first of ``others`` that exists; the data root's file; word pieces made of the
    training texts of the user's own data sets.

    Args:
        others: vocabularies of what the run goes on from or starts from.
        folder: run folder, where a vocabulary that is not the data root's is kept for prediction; None keeps nothing
            (``data.vocab`` then stays as it is).
    """
    if config.model.text.vocab_size:
        return config, []
    with_text = [get_task(name) for name in config.model.tasks if get_task(name).has_text]
    if not with_text:
        return _sized(config, len(SPECIAL)), []  # a table that nobody reads
    other = None if config.data.vocab else next((path for path in others if path.is_file()), None)
    layout = Layout(config.data)
    path = other or layout.find("bert.vocab")
    if path is not None:
        pieces = list(load_vocabulary(path))
        told = f"vocabulary: {len(pieces):,} word pieces of {printable(path, 200)}"
    else:
        own = [task for task in with_text if task.name in OWN]
        if not own:
            return config, []  # the reader of the texts says where it looked
        rows = (row for task in own for row in read_rows(layout, task, "train", config.data, Findings(strict=False)))
        texts = [text for row in rows for text in row.texts]
        pieces = train_vocabulary(texts)
        told = (
            f"vocabulary: there is no bert/vocab.txt in {printable(layout.root, 200)} and no --vocab: {len(pieces):,} "
            f"word pieces made of {len(texts):,} training texts"
        )
        if config.init_from:
            told += "; where the weights of --init-from have read texts, give their vocabulary with --vocab"
    if folder is not None and (other is not None or path is None):
        replace(folder / VOCABULARY, "\n".join(pieces) + "\n")
        data = dataclasses.replace(config.data, vocab=str((folder / VOCABULARY).resolve()))
        config = dataclasses.replace(config, data=data)
    return _sized(config, len(pieces)), [told]


def _sized(config: RunConfig, size: int) -> RunConfig:
    text = dataclasses.replace(config.model.text, vocab_size=size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
