"""Word pieces, truncation and the vocabulary's checks."""

import csv
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_roots import REAL, VOCABULARY, needs_real, write
from unit_fast.data.text.wordpieces import MAX_CHARACTERS, WordPieces, load_vocabulary, truncate
from unit_fast.errors import UserError


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return WordPieces(write(tmp_path_factory.mktemp("v") / "vocab.txt", "\n".join(VOCABULARY) + "\n"))


def by_one(a, b, room):
    """SPEC 4.4, word for word."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        if len(a) > len(b):
            a.pop()
        else:
            b.pop()
    return a, b


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_truncation_takes_from_the_longer_and_ties_from_b(a, b, room):
    first, second = list(range(a)), list(range(100, 100 + b))
    assert truncate(first, second, room) == by_one(first, second, room)


def test_single_and_pair_forms(words):
    cls, sep, a, b = (words.vocabulary[p] for p in ("[CLS]", "[SEP]", "a", "b"))
    assert words.encode("a b", 128) == ([cls, a, b, sep], [0] * 4)
    assert words.encode(("a", "b"), 128) == ([cls, a, sep, b, sep], [0, 0, 0, 1, 1])
    assert words.encode(("a", ""), 128) == ([cls, a, sep], [0] * 3)
    assert words.encode(("a", "  "), 128) == ([cls, a, sep], [0] * 3)
    assert words.encode(("", "b"), 128) == ([cls, sep, b, sep], [0, 0, 1, 1])
    assert words.encode("", 128) == ([cls, sep], [0, 0])


def test_lengths_are_kept(words):
    ids, segments = words.encode("a " * 50, 25)
    assert len(ids) == len(segments) == 25
    assert ids[-1] == words.sep
    ids, segments = words.encode(("a " * 50, "b " * 3), 25)
    assert len(ids) == 25
    assert segments == [0] * 21 + [1] * 4
    ids, segments = words.encode(("a " * 50, "b " * 50), 128)
    assert (len(ids), sum(segments)) == (103, 51)
    ids, segments = words.encode(("a " * 90, "b " * 90), 128)
    assert (len(ids), sum(segments)) == (128, 63)  # 125 pieces: 63 of a, 62 of b and its [SEP]


def test_lower_case_accents_and_unknown(words):
    assert words.pieces("ABC") == words.pieces("abc") == [words.vocabulary[p] for p in ("a", "##b", "##c")]
    assert words.pieces("é") == [words.vocabulary["e"]]
    assert words.pieces("\u4e2d") == [words.vocabulary["[UNK]"]]
    assert words.pieces("a" * 101) == [words.vocabulary["[UNK]"]]


def test_long_text_is_cut_and_bad_unicode_refused(words):
    assert len(words.pieces("a " * 1_000_000)) == MAX_CHARACTERS // 2
    with pytest.raises(UserError, match="cannot be tokenised"):
        words.pieces("a\ud800b")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "a"], "'a' stands already on line 5"),
        (["[PAD]", "[UNK]", "[CLS]", "a"], r"\[SEP\] is missing"),
        (["[PAD]", "[CLS]", "[SEP]", "a"], r"\[UNK\] is missing"),
        (["[UNK]", "[PAD]", "[CLS]", "[SEP]"], r"\[PAD\] is on line 2"),
        (["[PAD]", "[UNK]", "", "[CLS]", "[SEP]"], "3: empty line"),
        ([], r"\[PAD\] is missing"),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as info:
        load_vocabulary(write(tmp_path / "vocab.txt", "\n".join(lines)))
    assert "vocab.txt" in str(info.value)


def test_the_size_is_compared(tmp_path):
    path = write(tmp_path / "vocab.txt", "\n".join(VOCABULARY))
    assert len(load_vocabulary(path, len(VOCABULARY))) == len(VOCABULARY)
    with pytest.raises(UserError, match=rf"{len(VOCABULARY)} word pieces, but the model's word table has 30522 rows"):
        load_vocabulary(path, 30522)
    with pytest.raises(UserError, match="not UTF-8"):
        load_vocabulary(write(tmp_path / "bad.txt", b"[PAD]\n\xff\n"))


@pytest.fixture(scope="module")
def pair():
    """Our tokeniser and Hugging Face's, with the published vocabulary."""
    from transformers import BertTokenizer

    path = REAL / "bert" / "vocab.txt"
    vocabulary = load_vocabulary(path, 30522)
    try:
        theirs = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    except TypeError:  # transformers before 5 takes the file
        theirs = BertTokenizer(str(path), do_lower_case=True)
    assert len(theirs) == 30522
    return WordPieces(path, 30522), theirs


def real_texts():
    texts = []
    for path in sorted(REAL.glob("vqa2/*questions.json")):
        texts += [(q["question"],) for q in json.loads(path.read_text(encoding="utf-8"))["questions"]]
    for path in sorted(REAL.glob("snli_ve/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts += [(row["sentence1"], row["sentence2"]) for row in rows]
    for path in sorted(REAL.glob("glue/*/*.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            texts += [tuple(row[-3:-1]) for row in rows]
    return texts


@needs_real
def test_equal_to_transformers_on_the_real_texts(pair):
    ours, theirs = pair
    texts = real_texts()
    assert len(texts) > 3000
    for text in texts:
        for sentence in text:
            assert ours.pieces(sentence) == theirs.encode(sentence, add_special_tokens=False), sentence
    for text in texts[::7]:
        if len(text) == 2 and ours.pieces(text[1]):
            # their own truncation cuts ties otherwise, so the whole is compared here and truncation above
            theirs_pair = theirs(*text)
            assert ours.encode(text, 10_000) == (theirs_pair["input_ids"], theirs_pair["token_type_ids"])


@needs_real
def test_equal_to_transformers_on_strange_strings(pair):
    ours, theirs = pair
    rng = random.Random(0)
    pool = "aZé ß\t\n\u00a0\u200b\u0301\u4e2d\U0001f600[]SEPCLSMASK##.,'\"\x00\x07\ufffd\u202e\u0130ıfi-_/\\0129"
    words = ["[SEP]", "[CLS]", "[MASK]", "[UNK]", "[PAD]", "[sep]", "ab##c", "unaffable", "  "]
    for _ in range(2000):
        text = "".join(
            rng.choice(words) if rng.random() < 0.15 else rng.choice(pool) for _ in range(rng.randint(0, 30))
        )
        assert ours.pieces(text) == theirs.encode(text, add_special_tokens=False), ascii(text)
