"""Word pieces made of a user's texts."""

import random
import subprocess
import sys

from unit_fast.data.text.training import SPECIAL, train_vocabulary
from unit_fast.data.text.wordpieces import WordPieces

_WORDS = ["film", "great", "tölü", "boring", "plot", "actor", "scene", "Bad", "running", "runner", "猫"]
_MAKE = "from tests.data.text.test_training import made; print('\\n'.join(made()).encode('utf-8').hex())"


def made(size: int = 8192) -> list[str]:
    draw = random.Random(0)
    return train_vocabulary([" ".join(draw.choices(_WORDS, k=8)) for _ in range(300)], size)


def test_words_of_the_texts_have_pieces_and_no_ascii_word_is_unknown(tmp_path):
    pieces = made()
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    words = WordPieces(tmp_path / "vocab.txt", len(pieces))
    called = list(words.vocabulary)
    assert called[: len(SPECIAL)] == list(SPECIAL)
    assert [called[i] for i in words.pieces("Running, boring TOLU 猫")] == ["running", ",", "boring", "tolu", "猫"]
    assert words.vocabulary["[UNK]"] not in words.pieces("xylophone! @zq~9 (~})")
    assert words.pieces("犬") == [words.vocabulary["[UNK]"]]


def test_it_has_the_size_asked_for_where_that_holds_single_characters():
    assert len(made(200)) <= 200
    assert 0 < len(made(1)) < 200
    assert set(train_vocabulary([])) < set(made(1)) | set(made())


def test_another_process_makes_the_same():
    hexed = subprocess.run([sys.executable, "-c", _MAKE], capture_output=True, text=True, check=True).stdout.strip()
    assert bytes.fromhex(hexed).decode("utf-8").split("\n") == made()
