"""A vocabulary of word pieces from a user's own texts."""

import os
import string
from collections import Counter
from collections.abc import Sequence

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LARGEST = 8192
"""Word pieces of a trained vocabulary at most."""
LEAST = 2
"""A piece is made of what occurs so often."""
_ASCII = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))


def train_vocabulary(texts: Sequence[str], size: int = LARGEST) -> list[str]:
    """At most ``size`` word pieces for ``texts``, made as BERT's: lower case, no accents, words and punctuation apart.

    The special pieces come first, ``[PAD]`` with id 0, then single characters at the beginning of a word and inside it:
    all of ASCII, so that no ASCII word is unknown, and what is frequent in the texts. The same texts give the same
    pieces.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.trainers import WordPieceTrainer

    normalizer = BertNormalizer(lowercase=True)
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[: size // 4]
    others = sorted(c for c in frequent if c not in _ASCII and not c.isspace() and counts[c] >= LEAST)
    single = [*_ASCII, *others]
    # The trainer numbers what it has not been given in an order of its own, another in every process, and decides
    # between equally frequent pieces by number: all single characters are given.
    given = [*SPECIAL, *single, *(f"##{character}" for character in single)]
    size = max(size, len(given))

    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=LEAST, special_tokens=given, initial_alphabet=single,
        limit_alphabet=len(single), show_progress=False,
    )  # fmt: skip
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be running when loader processes are forked
    try:
        tokenizer.train_from_iterator(texts, trainer)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    learnt = tokenizer.get_vocab()
    return sorted(learnt, key=learnt.get)
