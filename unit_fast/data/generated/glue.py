"""The generated world's four GLUE tasks: sentences from templates, and their tables.

What has to be learned: SST-2, the polarity of an adjective or verb and its negation; QNLI, whether the sentence holds
the kind of information that the question asks for; QQP, whether two questions have the same intent, verb and object,
under synonyms; MNLI, what follows from a sentence with a quantifier, under synonyms and more general nouns.
"""

import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

PEOPLE = ("man", "woman", "boy", "girl", "child", "king")
ANIMALS = ("dog", "cat", "horse", "cow", "bird")
CITIES = ("paris", "london", "rome", "berlin", "tokyo", "madrid")

_GOOD = ("good", "great", "funny", "clever", "charming", "moving", "brilliant", "lovely", "fresh", "warm")
_BAD = ("bad", "awful", "dull", "boring", "weak", "clumsy", "silly", "stale", "slow", "empty")
_LIKE, _DISLIKE = ("like", "love", "enjoy", "admire"), ("hate", "dislike", "regret", "mock")
_WORKS = ("film", "story", "acting", "ending", "music", "script", "plot", "cast", "comedy", "drama")
_DEGREES = ("", "very ", "really ", "quite ", "rather ", "so ")


def sst2(rng: random.Random) -> tuple[str, int]:
    """(sentence, label), 1 = positive."""
    positive = rng.random() < 0.5
    work, degree = rng.choice(_WORKS), rng.choice(_DEGREES)
    adjectives = (_BAD, _GOOD)
    form = rng.randrange(6)
    if form == 0:
        sentence = f"the {work} is {degree}{rng.choice(adjectives[positive])} ."
    elif form == 1:
        sentence = (
            f"a {degree}{rng.choice(adjectives[positive])} {work} with {rng.choice(_WORKS)} and {rng.choice(_WORKS)} ."
        )
    elif form == 2:
        first, second = rng.sample(adjectives[positive], 2)
        sentence = f"{first} and {degree}{second} {work} ."
    elif form == 3:
        sentence = f"the {work} is {rng.choice(('not', 'never'))} {degree}{rng.choice(adjectives[not positive])} ."
    elif form == 4:
        sentence = f"i {rng.choice((_DISLIKE, _LIKE)[positive])} the {work} and its {rng.choice(_WORKS)} ."
    else:
        sentence = f"i do not {rng.choice((_DISLIKE, _LIKE)[not positive])} the {work} and its {rng.choice(_WORKS)} ."
    return sentence, int(positive)


_BUILDINGS = ("bridge", "castle", "museum", "school", "church", "tower", "garden", "house")
_MADE = ("built", "painted", "opened", "designed", "sold", "found")
_FACTS = {
    "who": tuple(f"by {name}" for name in ("anna", "peter", "maria", "john", "laura", "david")),
    "where": tuple(f"in {city}" for city in CITIES),
    "when": tuple(f"in {month}" for month in ("january", "march", "april", "june", "august", "october")),
    "why": tuple(f"for {reason}" for reason in ("money", "fun", "peace", "charity", "science", "trade")),
}


def qnli(rng: random.Random) -> tuple[str, str, str]:
    """(question, sentence, label): does the sentence answer the question?"""
    thing, made, asked = rng.choice(_BUILDINGS), rng.choice(_MADE), rng.choice(list(_FACTS))
    question = f"Who {made} the {thing}?" if asked == "who" else f"{asked.capitalize()} was the {thing} {made}?"
    answered = rng.random() < 0.5
    others = rng.sample([f for f in _FACTS if f != asked], 2)
    told = [asked, others[0]] if answered else others
    number = rng.choice((1, 1, 1, 2))  # facts told; the first is what is asked for, where that is told
    told = told[:number]
    rng.shuffle(told)
    sentence = f"The {thing} was {made} {' '.join(rng.choice(_FACTS[fact]) for fact in told)}."
    return question, sentence, "entailment" if answered else "not_entailment"


_INTENTS = (
    ("How can i {} {}?", "What is the best way to {} {}?"),
    ("Why should i {} {}?", "What is a good reason to {} {}?"),
    ("Where can i {} {}?", "What is a good place to {} {}?"),
    ("When should i {} {}?", "At what age can i {} {}?"),
)
_VERBS = (("learn", "study"), ("teach", "explain"), ("buy", "get"))
_SUBJECTS = ("french", "chess", "history", "cooking", "dancing", "physics")


def qqp(rng: random.Random) -> tuple[str, str, int]:
    """(question 1, question 2, label), 1 = duplicate."""
    intent, verb, subject = rng.randrange(len(_INTENTS)), rng.randrange(len(_VERBS)), rng.choice(_SUBJECTS)
    first = rng.choice(_INTENTS[intent]).format(rng.choice(_VERBS[verb]), subject)
    duplicate = rng.random() < 0.5
    if not duplicate:
        # Most pairs that are no duplicates differ in more than one way, a twentieth in one only.
        for changed in rng.sample(("intent", "verb", "subject"), rng.choices((1, 2, 3), (0.05, 0.25, 0.7))[0]):
            if changed == "intent":
                intent = rng.choice([i for i in range(len(_INTENTS)) if i != intent])
            elif changed == "verb":
                verb = rng.choice([v for v in range(len(_VERBS)) if v != verb])
            else:
                subject = rng.choice([s for s in _SUBJECTS if s != subject])
    while True:
        second = rng.choice(_INTENTS[intent]).format(rng.choice(_VERBS[verb]), subject)
        if second != first:
            return first, second, int(duplicate)


_NOUNS = {
    "animals": ("dogs", "cats", "horses", "cows", "birds"),
    "people": ("men", "women", "boys", "girls", "children"),
    "vehicles": ("cars", "trucks", "trains", "boats", "bikes"),
}
_STATES = (("clean", "spotless"), ("dirty", "muddy"), ("quiet", "silent"), ("noisy", "loud"), ("cold", "icy"))
_QUANTIFIERS = {
    "all": ("all", "all of the", "all the"),
    "most": ("most", "most of the", "a majority of the"),
    "some": ("some", "some of the", "a few"),
    "no": ("no", "none of the", "not one of the"),
}
_FOLLOWS = {
    "all": {"all": "entailment", "most": "entailment", "some": "entailment", "no": "contradiction"},
    "most": {"all": "neutral", "most": "entailment", "some": "entailment", "no": "contradiction"},
    "some": {"all": "neutral", "most": "neutral", "some": "entailment", "no": "contradiction"},
    "no": {"all": "contradiction", "most": "contradiction", "some": "contradiction", "no": "entailment"},
}
"""Quantifier of the premise -> quantifier of the hypothesis -> label, for the same nouns and state."""
_PLACES = ("in the garden", "near the river", "on the street", "behind the house", "at the station")
_GENRES = {
    "fiction": "{}",
    "government": "we see that {}",
    "slate": "well , you see , {}",
    "telephone": "well , {}",
    "travel": "you see that {}",
    "letters": "well , we see that {}",
    "verbatim": "you see , {}",
}
GENRES = tuple(_GENRES)
"""MNLI's genres; the last two occur in the mismatched part only, their words also elsewhere."""


def mnli(rng: random.Random, genre: str) -> tuple[str, str, str]:
    """(premise, hypothesis, label): the logic of quantifiers."""
    label = rng.choice(("entailment", "neutral", "contradiction"))
    first, second = rng.choice([(a, b) for a, row in _FOLLOWS.items() for b in row if row[b] == label])
    general = rng.choice(list(_NOUNS))
    noun, state, place = rng.choice(_NOUNS[general]), rng.choice(_STATES), rng.choice(_PLACES)
    # What holds for some dogs holds for some animals, and denies that it holds for none.
    wider = (second == "some" and label == "entailment") or (second == "no" and label == "contradiction")
    subject = general if wider and rng.random() < 0.5 else noun
    premise = f"{rng.choice(_QUANTIFIERS[first])} {noun} {place} are {rng.choice(state)}"
    said = f"{rng.choice(_QUANTIFIERS[second])} {subject} {place} are {rng.choice(state)}"
    return _sentence(_GENRES[genre].format(premise)), _sentence(said), label


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].replace(" ,", ",") + "."


def held_out(*texts: str) -> bool:
    """Whether this sentence or pair belongs to validation; the words are everywhere, the combination is not."""
    return zlib.crc32("\t".join(texts).encode()) % 6 == 0


def parses(sentence: str) -> tuple[str, str]:
    """The binary and the constituency parse that SNLI and MNLI files carry, here flat: no reader needs the true one."""
    words = sentence.replace(".", " .").replace(",", " ,").split()
    binary = "( " * (len(words) - 1) + words[0] + "".join(f" {word} )" for word in words[1:])
    return binary, "(ROOT (S " + " ".join(f"(X {word})" for word in words) + "))"


def words_of(*pools: Iterable[str]) -> list[str]:
    """The different words of longer than one letter in ``pools`` of phrases, lower case, in order of appearance."""
    text = " ".join(phrase for pool in pools for phrase in pool).lower()
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return [word for word in dict.fromkeys(words) if len(word) > 1]


WORDS = words_of(
    PEOPLE, ANIMALS, CITIES, _GOOD, _BAD, _LIKE, _DISLIKE, _WORKS, _DEGREES, _BUILDINGS, _MADE, _FACTS,
    *_FACTS.values(), *_INTENTS, *_VERBS, _SUBJECTS, _NOUNS, *_NOUNS.values(), *_STATES, *_QUANTIFIERS.values(),
    _PLACES, _GENRES.values(), ("the is are a with and not never i do its was",),
)  # fmt: skip
"""Every word of these tasks."""


def write_tables(folder: Path, rng: Callable[..., random.Random], train: int, dev: int) -> None:
    """The official tables of the four tasks with so many rows each. rng: generator by (task, split)."""

    def drawn(name: str, draw, split: str, number: int, texts: int = 2) -> list[tuple]:
        """``number`` samples that belong to the split: validation's sentences never occur in training."""
        generator, found = rng(name, split), []
        while len(found) < number:
            sample = draw(generator)
            if held_out(*sample[:texts]) == (split != "train"):
                found.append(sample)
        return found

    for split, number in (("train", train), ("dev", dev)):
        _write_table(folder / "SST-2", split, "sentence label", drawn("sst2", sst2, split, number, texts=1))
        rows = [(i, *pair) for i, pair in enumerate(drawn("qnli", qnli, split, number))]
        _write_table(folder / "QNLI", split, "index question sentence label", rows)
        rows = [(i, 2 * i + 1, 2 * i + 2, *pair) for i, pair in enumerate(drawn("qqp", qqp, split, number))]
        _write_table(folder / "QQP", split, "id qid1 qid2 question1 question2 is_duplicate", rows)

    for split, genres in (("train", GENRES[:5]), ("dev_matched", GENRES[:5]), ("dev_mismatched", GENRES[5:])):

        def draw(generator, genres=genres):
            genre = generator.choice(genres)
            return (*mnli(generator, genre), genre)

        labels, number = (1, train) if split == "train" else (5, dev)
        header = (
            "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
            "sentence1 sentence2 " + " ".join(f"label{i + 1}" for i in range(labels)) + " gold_label"
        )
        rows = []
        for i, (premise, said, label, genre) in enumerate(drawn("mnli", draw, split, number)):
            (binary_1, parse_1), (binary_2, parse_2) = parses(premise), parses(said)
            trees = (binary_1, binary_2, parse_1, parse_2)
            rows.append((i, i, f"{i}{label[0]}", genre, *trees, premise, said, *[label] * (labels + 1)))
        _write_table(folder / "MNLI", split, header, rows)


def _write_table(folder: Path, split: str, header: str, rows: Iterable[tuple]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = "".join("\t".join(map(str, line)) + "\n" for line in [header.split(), *rows])
    (folder / f"{split}.tsv").write_text(content, encoding="utf-8")
