"""Texts in flat arrays and their word pieces: as the direct path has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cached_roots import entries, small
from tests.data_roots import VOCABULARY, task_config, write
from unit_fast.data.store.content import Content
from unit_fast.data.text import tokens
from unit_fast.data.text.wordpieces import WordPieces
from unit_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("small_files_too")


# ------------------------------------------------------------------------------------------------- texts and tokens

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["", " ", "[SEP]", "a[CLS] b", "[MASK][PAD]", "[unk] [UNK]", "\ud800", "a\udfffb", "\0", "\ufeff", "\u4e2d\u6587"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=8))
def test_strings_come_back_as_they_went_in(texts):
    content = Content()
    content.put_strings("x", texts)
    strings = content.strings("x")
    assert list(strings) == texts
    assert [strings[i] for i in range(len(strings))] == texts
    for index in (-1, len(texts)):
        with pytest.raises(IndexError):
            strings[index]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return WordPieces(write(tmp_path_factory.mktemp("v") / "vocab.txt", "\n".join(VOCABULARY) + "\n"))


def _direct(words, row, length):
    try:
        return words.encode(row, length)
    except UserError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.integers(3, 20), st.booleans())
def test_word_pieces_are_those_of_the_direct_path(words, rows, length, single):
    content = Content()
    columns = []
    for c in range(1 if single else 2):
        content.put_strings(f"c{c}", [row[c] for row in rows])
        columns.append(content.strings(f"c{c}"))
    made = tokens.Tokens(tokens.tokenise(words, tuple(columns), "x"), len(columns))
    found = tokens.lengths(made.counts(), length).tolist()
    for i, row in enumerate(rows):
        direct = _direct(words, row[0] if single else row, length)
        pieces = made.pieces(i)
        if isinstance(direct, str):
            assert pieces is None
            continue
        assert words.form(pieces[0], pieces[1] if len(pieces) > 1 else [], length) == direct
        assert found[i] == len(direct[0])


def test_a_text_that_cannot_be_tokenised_is_the_same_error(world, tmp_path, monkeypatch):
    from unit_fast.data.readers.glue import Glue

    real = Glue._table

    def table(self, path):
        for where, row, label in real(self, path):
            yield where, (row[0] + "\ud800", *row[1:]), label

    monkeypatch.setattr(Glue, "_table", table)
    messages = []
    for keep in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = small(world, "qqp", keep=keep)
        with pytest.raises(UserError, match="cannot be tokenised") as info:
            dataset.get(0)
        messages.append(str(info.value))
    assert len(set(messages)) == 1
    assert dataset.text_lengths().tolist() == [1 + 5 + 3] * 2  # who? -> one piece; what? -> w ##h ##a ##t ?


def test_long_texts_are_kept_whole_and_cut_when_asked_for(world, tmp_path):
    long = "a " * 300
    write(world / "glue/SST-2/train.tsv", f"sentence\tlabel\n{long}\t1\nb c\t0\n")
    lengths = {}
    for limit in (8, 128, 20):
        config = task_config("sst2", text_length=limit)
        dataset = small(world, "sst2", config=config, keep=tmp_path / "cache")
        assert dataset.get(0)["input_ids"].tolist() == small(world, "sst2", config=config).get(0)["input_ids"].tolist()
        lengths[limit] = dataset.text_lengths().tolist()
        assert dataset.text_lengths().dtype == np.int64
        assert [dataset.text_tokens(i) for i in range(2)] == lengths[limit]
    assert lengths == {8: [8, 4], 128: [128, 4], 20: [20, 4]}
    assert len(entries(tmp_path / "cache")) == 2  # the limit is not in the key


def test_a_large_vocabulary_takes_wider_ids(tmp_path):
    vocabulary = [*VOCABULARY, *(f"word{i}" for i in range(70_000))]
    words = WordPieces(write(tmp_path / "vocab.txt", "\n".join(vocabulary) + "\n"))
    content = Content()
    content.put_strings("c", ["word69999 a", ""])
    made = tokens.tokenise(words, (content.strings("c"),), "x")
    assert made.arrays["ids0"].dtype == np.uint32
    assert tokens.Tokens(made, 1).pieces(0) == [words.pieces("word69999 a")]
    assert tokens.Tokens(made, 1).pieces(1) == [[]]


def test_lengths_without_a_cache_are_made_once(world, monkeypatch):
    dataset = small(world, "qqp")
    expected = [len(dataset.get(i)["input_ids"]) for i in range(len(dataset))]
    assert dataset.text_lengths().tolist() == expected
    monkeypatch.setattr(WordPieces, "pieces", lambda *_: pytest.fail("tokenised again"))
    assert dataset.text_lengths().tolist() == expected
    assert len(dataset.get(0)["input_ids"]) == expected[0]


def test_a_bar_counts_every_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "LONG", 10)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    content = Content()
    content.put_strings("c", ["a b"] * 2500)
    made = tokens.tokenise(words, (content.strings("c"),), "qqp train")
    assert made.arrays["ends0"][-1] == 5000
    assert "word pieces of qqp train" in capsys.readouterr().err
