"""Sentences to word pieces (SPEC 1.6 and 4.4): BERT's lower-casing WordPiece with a vocabulary from a file."""

import hashlib
from pathlib import Path

from unit_fast.data.store.files import open_file
from unit_fast.errors import UserError, printable

MAX_CHARACTERS = 20_000
"""Characters of a sentence that are looked at. Far more than any word-piece limit keeps; a megabyte of text would
otherwise be tokenised to keep 128 pieces."""
VOCABULARY_LIMIT = 64 * 2**20
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def load_vocabulary(path: str | Path, vocab_size: int | None = None) -> dict[str, int]:
    """Word piece -> id from a text file with one piece a line.

    Args:
        vocab_size: rows of the model's word table; None does not compare.

    Raises:
        UserError: naming the file: a piece twice, an empty line, a special piece missing, ``[PAD]`` not first (padding
            has id 0), or a size other than ``vocab_size``.
    """
    where = printable(path, 400)
    with open_file(path, VOCABULARY_LIMIT) as file:
        data = file.read()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); give a BERT vocab.txt") from None
    if lines and not lines[-1]:
        lines.pop()
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        piece = line.removesuffix("\r")
        if not piece:
            raise UserError(f"{where}:{number + 1}: empty line; a vocabulary has one word piece a line")
        if piece in vocabulary:
            raise UserError(
                f"{where}:{number + 1}: {printable(piece)!r} stands already on line {vocabulary[piece] + 1}; remove one"
            )
        vocabulary[piece] = number
    for piece in SPECIAL:
        if piece not in vocabulary:
            raise UserError(f"{where}: {piece} is missing; give a BERT vocab.txt with {', '.join(SPECIAL)}")
    if vocabulary["[PAD]"] != 0:
        raise UserError(f"{where}: [PAD] is on line {vocabulary['[PAD]'] + 1}; it must be the first (padding is id 0)")
    if vocab_size is not None and len(vocabulary) != vocab_size:
        raise UserError(
            f"{where}: {len(vocabulary)} word pieces, but the model's word table has {vocab_size} rows; give the "
            f"vocabulary the model was trained with, or set model.text.vocab_size to {len(vocabulary)}"
        )
    return vocabulary


class WordPieces:
    """The tokeniser: lower-cases, strips accents, splits at punctuation and Chinese characters, then word pieces.

    Equal to Hugging Face's ``BertTokenizer`` with ``do_lower_case``, special pieces written in the text included.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None):
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        self.vocabulary = load_vocabulary(path, vocab_size)
        self.cls = self.vocabulary["[CLS]"]
        self.sep = self.vocabulary["[SEP]"]
        self._tokenizer = Tokenizer(WordPiece(self.vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        known = [piece for piece in (*SPECIAL, "[MASK]") if piece in self.vocabulary]
        self._tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in known])

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the word pieces in their order."""
        return hashlib.sha256("\n".join(self.vocabulary).encode("utf-8", "surrogatepass")).hexdigest()

    def pieces(self, text: str) -> list[int]:
        """Ids of the word pieces of ``text``, no special ones added."""
        text = text[:MAX_CHARACTERS]
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise UserError(f"text {ascii(text[:60])} cannot be tokenised ({error}); give valid Unicode") from None

    def unknown(self, text: str) -> list[str]:
        """The words of ``text`` that the vocabulary has no pieces for, each once: a model sees ``[UNK]`` in their
        place."""
        found = self._tokenizer.encode(text[:MAX_CHARACTERS], add_special_tokens=False)
        unknown = self.vocabulary["[UNK]"]
        words = (text[start:end] for i, (start, end) in zip(found.ids, found.offsets) if i == unknown)
        return list(dict.fromkeys(word for word in words if word != "[UNK]"))

    def encode(self, text: str | tuple[str, str], length: int) -> tuple[list[int], list[int]]:
        """(input ids, segments) of ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]``, cut to ``length``, not padded.

        Args:
            text: one sentence, or two; an empty second one gives the single form.
            length: largest number of ids, special ones included.
        """
        first, second = (text, "") if isinstance(text, str) else text
        return self.form(self.pieces(first), self.pieces(second), length)

    def form(self, a: list[int], b: list[int], length: int) -> tuple[list[int], list[int]]:
        """``encode`` for the word pieces of one sentence (``b`` empty) or of two."""
        if not b:
            ids = [self.cls, *a[: max(length - 2, 0)], self.sep]
            return ids, [0] * len(ids)
        a, b = truncate(a, b, length - 3)
        return [self.cls, *a, self.sep, *b, self.sep], [0] * (len(a) + 2) + [1] * (len(b) + 1)


def truncate(a: list, b: list, room: int) -> tuple[list, list]:
    """Cut two sequences to ``room`` items together (SPEC 4.4): one from the end of the longer at a time, of ``b`` when
    they are equal."""
    keep_a, keep_b = len(a), len(b)
    excess = keep_a + keep_b - room
    if excess > 0:
        # first the longer alone, down to the shorter; then turn by turn, b first
        alone = min(excess, abs(keep_a - keep_b))
        if keep_a > keep_b:
            keep_a -= alone
        else:
            keep_b -= alone
        rest = excess - alone
        keep_b -= (rest + 1) // 2
        keep_a -= rest // 2
    return a[: max(keep_a, 0)], b[: max(keep_b, 0)]
