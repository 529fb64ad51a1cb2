"""The texts of a data set as word pieces: made once, kept by the cache, cut to length when asked for."""

import sys
from array import array

import numpy as np

from unit_fast.data.progress import progress_bar
from unit_fast.data.store.cache import Cache
from unit_fast.data.store.content import Content, Strings
from unit_fast.data.text.wordpieces import MAX_CHARACTERS, WordPieces
from unit_fast.errors import UserError

LONG = 50_000
"""Sentences from which on a terminal shows a progress bar; one takes about 30 us."""


class Tokens:
    """Word pieces of every sentence, neither cut nor with special pieces.

    Args:
        content: for column c of the texts ``ids<c>`` uint16 or uint32 [pieces] and ``ends<c>`` int64 [n + 1], as
            ``tokenise`` makes them.
    """

    def __init__(self, content: Content, columns: int):
        self.content = content
        self.ids = [content.arrays[f"ids{c}"] for c in range(columns)]
        self.ends = [content.arrays[f"ends{c}"] for c in range(columns)]
        self.cannot = [np.iinfo(ids.dtype).max for ids in self.ids]

    def pieces(self, index: int) -> list[list[int]] | None:
        """The ids of each sentence of row ``index``; None when one of them cannot be tokenised."""
        out = []
        for ids, ends, cannot in zip(self.ids, self.ends, self.cannot):
            sentence = ids[ends[index] : ends[index + 1]].tolist()
            if sentence == [cannot]:
                return None
            out.append(sentence)
        return out

    def counts(self) -> list[np.ndarray]:
        """Number of pieces of each sentence, int64 [n] a column; 1 for one that cannot be tokenised."""
        return [np.diff(ends) for ends in self.ends]


def lengths(counts: list[np.ndarray], text_length: int) -> np.ndarray:
    """Ids of ``WordPieces.encode``, special ones included, for so many pieces: int64 [n]."""
    first = counts[0]
    single = np.minimum(first, text_length - 2) + 2
    if len(counts) == 1:
        return single
    pair = np.minimum(first + counts[1], text_length - 3) + 3
    return np.where(counts[1] == 0, single, pair)


def tokenise(words: WordPieces, columns: tuple[Strings, ...], title: str) -> Content:
    """Word pieces of all texts, in the smallest type that holds them; the type's largest value stands for a sentence
    that cannot be tokenised."""
    content = Content()
    dtype = np.dtype(np.uint16 if len(words) <= np.iinfo(np.uint16).max else np.uint32)
    cannot = int(np.iinfo(dtype).max)
    total = sum(map(len, columns))
    shown = total >= LONG and sys.stderr.isatty()
    with progress_bar(f"word pieces of {title}", total, shown, stderr=True) as advance:
        for c, column in enumerate(columns):
            # one at a time: a batch of the library is no faster on one core, and its threads would be running when
            # loader processes are forked
            ids, ends = array({2: "H", 4: "I"}[dtype.itemsize]), np.zeros(len(column) + 1, dtype=np.int64)
            for i, text in enumerate(column, 1):
                try:
                    ids.extend(words.pieces(text))
                except UserError:
                    ids.append(cannot)
                ends[i] = len(ids)
                if i % 1000 == 0:  # drawing costs more than a sentence
                    advance(1000)
            content.arrays[f"ids{c}"] = np.frombuffer(ids, dtype=dtype) if ids else np.zeros(0, dtype=dtype)
            content.arrays[f"ends{c}"] = ends
    return content


def cached_tokens(cache: Cache, rows: Content, words: WordPieces, columns: tuple[Strings, ...], title: str) -> Tokens:
    """The tokens of ``columns``, which belong to the cache entry ``rows``, from the cache or into it."""
    import tokenizers

    # the name holds what the rows were read from, without the part that tells their versions apart
    name = f"words{rows.name.removeprefix('rows').rpartition('-')[0]}"
    key = {
        "rows": rows.name, "vocabulary": words.fingerprint, "characters": MAX_CHARACTERS, "columns": len(columns),
        "tokenizers": tokenizers.__version__,
    }  # fmt: skip
    return Tokens(cache.open(name, key, lambda: tokenise(words, columns, title), lambda: True), len(columns))
