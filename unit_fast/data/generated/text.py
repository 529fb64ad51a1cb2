"""Sentences of the generated world about its scenes, VQA's questions and SNLI-VE's hypotheses, and the vocabulary.

None of the questions can be answered from its text: what is asked for is drawn from the scene, and yes and no, true and
false are equally frequent for every text, up to chance. A neutral hypothesis speaks of what no picture shows.
"""

import random
import string

from unit_fast.data.generated.glue import ANIMALS, CITIES, PEOPLE, WORDS, words_of
from unit_fast.data.generated.scene import COLORS, GROUNDS, KINDS, MOST, Scene

NUMBERS = ("zero", "one", "two", "three")

# ------------------------------------------------------------------------------------------- questions about scenes

ANSWERS = ("<unk>", "yes", "no", *map(str, range(MOST + 1)), *COLORS, *KINDS, *GROUNDS)
"""The VQA answer list; index 0 is the unknown answer."""

QUESTION_KINDS = {
    "color of kind": 0.28,
    "kind of color": 0.18,
    "pair": 0.04,
    "kind": 0.06,
    "color": 0.06,
    "count kind": 0.03,
    "count": 0.13,
    "beside": 0.02,
    "ground": 0.20,
}
"""Kind of question -> how often it is asked, where the scene allows it."""

_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def ask(rng: random.Random, scene: Scene, asked: str) -> tuple[str, str, str, str] | None:
    """A question of kind ``asked`` about ``scene``: (question, answer, question type, answer type as in VQA v2).

    None when the scene does not allow one with a unique answer. Yes/no questions are answered yes half of the time,
    and the absent combinations take shape and colour from the scene as often as not.
    """
    things = scene.things
    kinds, colors = [t.kind for t in things], [t.color for t in things]
    if asked == "color of kind":
        single = [t for t in things if kinds.count(t.kind) == 1]
        if single:
            thing = rng.choice(single)
            text = rng.choice(("What color is the {}?", "What is the color of the {}?")).format(thing.kind)
            return text, thing.color, "what color is the", "other"
    elif asked == "kind of color":
        single = [t for t in things if colors.count(t.color) == 1]
        if single:
            thing = rng.choice(single)
            text = rng.choice(("What shape is {}?", "What is {} here?")).format(thing.color)
            return text, thing.kind, "what", "other"
    elif asked == "pair":
        pair = present_pair(rng, scene) if rng.random() < 0.5 else absent_pair(rng, scene)
        if pair:
            answer = "yes" if pair in zip(colors, kinds) else "no"
            return f"Is there a {pair[0]} {pair[1]}?", answer, "is there a", "yes/no"
    elif asked == "kind":
        absent = [k for k in KINDS if k not in kinds]
        kind = rng.choice(kinds if not absent or rng.random() < 0.5 else absent)
        text = rng.choice(("Is there a {}?", "Do you see a {}?")).format(kind)
        return text, "yes" if kind in kinds else "no", "is there a", "yes/no"
    elif asked == "color":
        color = rng.choice(colors if rng.random() < 0.5 else [c for c in COLORS if c not in colors])
        text = rng.choice(("Is there something {}?", "Do you see something {}?")).format(color)
        return text, "yes" if color in colors else "no", "is there", "yes/no"
    elif asked == "count kind":
        number = rng.choice(sorted({kinds.count(k) for k in KINDS}))
        kind = rng.choice([k for k in KINDS if kinds.count(k) == number])
        return f"How many {plural(kind)} are there?", str(number), "how many", "number"
    elif asked == "count":
        text = rng.choice(("How many shapes are there?", "How many things do you see?"))
        return text, str(len(things)), "how many", "number"
    elif asked == "beside":
        choices = [
            (thing, relation, [t for t in things if is_beside(t, relation, thing)])
            for thing in things
            if kinds.count(thing.kind) == 1
            for relation in _BESIDE
        ]
        choices = [(thing, relation, found[0]) for thing, relation, found in choices if len(found) == 1]
        if choices:
            thing, relation, found = rng.choice(choices)
            return f"What is {relation} the {thing.kind}?", found.kind, "what is", "other"
    elif asked == "ground":
        text = rng.choice(("What color is the background?", "What is the color of the ground?"))
        return text, scene.ground, "what color is the", "other"
    else:
        raise ValueError(f"no such kind of question: {asked!r}; known: {', '.join(QUESTION_KINDS)}")
    return None


def annotators(rng: random.Random, answer: str, answer_type: str) -> list[dict]:
    """Ten answers, at least seven of them right; the others plausible or outside the answer list."""
    numbers = [a for a in ANSWERS if a.isdigit()]
    others = {"yes/no": ["yes", "no"], "number": numbers}.get(answer_type, ["not sure", *COLORS, *KINDS])
    given = [answer] * rng.choice((7, 8, 9, 10, 10))
    given += [rng.choice(others) for _ in range(10 - len(given))]
    rng.shuffle(given)
    return [
        {"answer": a, "answer_confidence": "yes" if a == answer else "maybe", "answer_id": i + 1}
        for i, a in enumerate(given)
    ]


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def is_beside(thing, relation: str, other) -> bool:
    """Whether ``thing`` is clearly left of, right of, above or below ``other``: by more than a third of their sizes."""
    axis, sign = _BESIDE[relation]
    clear = (thing.box[2 + axis] + other.box[2 + axis]) / 3
    return sign * (thing.center[axis] - other.center[axis]) > clear


def present_pair(rng, scene: Scene) -> tuple[str, str]:
    """(colour, kind) of one of the scene's shapes."""
    thing = rng.choice(scene.things)
    return thing.color, thing.kind


def absent_pair(rng, scene: Scene) -> tuple[str, str]:
    """A (colour, kind) that the scene does not have; its parts are in the scene as often as not."""
    there = {(t.color, t.kind) for t in scene.things}
    while True:
        color = rng.choice([t.color for t in scene.things] if rng.random() < 0.5 else list(COLORS))
        kind = rng.choice([t.kind for t in scene.things] if rng.random() < 0.5 else KINDS)
        if (color, kind) not in there:
            return color, kind


def caption(scene: Scene) -> str:
    """One sentence that names every shape."""
    parts = [f"a {t.size} {t.color} {t.kind}" for t in scene.things]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"There is {listed} on a {scene.ground} background."


def hypothesis(rng: random.Random, scene: Scene, label: str) -> str:
    """A sentence that ``scene`` entails, contradicts or says nothing about (``label`` as in SNLI)."""
    things = scene.things
    kinds, colors = {t.kind for t in things}, {t.color for t in things}
    true = label == "entailment"
    if label == "neutral":
        noun = rng.choice([*sorted(kinds), "picture", "shape"])
        return rng.choice(
            (
                f"A {rng.choice(PEOPLE)} painted the {noun}.",
                f"The {noun} is for a {rng.choice(PEOPLE)}.",
                f"There is a {rng.choice(ANIMALS)} behind the {noun}.",
                f"The {noun} was made in {rng.choice(CITIES)}.",
            )
        )
    form = rng.choices(("pair", "kind", "color", "number", "ground"), (0.05, 0.05, 0.25, 0.05, 0.6))[0]
    if form == "pair":
        color, kind = present_pair(rng, scene) if true else absent_pair(rng, scene)
        return rng.choice((f"There is a {color} {kind}.", f"A {color} {kind} is in the picture."))
    absent = [k for k in KINDS if k not in kinds]
    if form == "kind" and (true or absent):
        kind = rng.choice(sorted(kinds) if true else absent)
        return rng.choice((f"There is a {kind}.", f"A {kind} is in the picture."))
    if form == "color":
        color = rng.choice(sorted(colors) if true else [c for c in COLORS if c not in colors])
        return rng.choice((f"Something is {color}.", f"There is a {color} shape."))
    if form == "number":
        number = len(things) if true else rng.choice([n for n in range(1, MOST + 1) if n != len(things)])
        return "There is one shape." if number == 1 else f"There are {NUMBERS[number]} shapes."
    ground = scene.ground if true else rng.choice([g for g in GROUNDS if g != scene.ground])
    return f"The background is {ground}."


_WORDS = words_of(
    KINDS, [plural(k) for k in KINDS], COLORS, GROUNDS, NUMBERS, ANSWERS[1:], PEOPLE, ANIMALS, CITIES,
    ("what color is the of shape here there do you see how many are shapes things left right above below background",),
    ("ground picture something and on painted for behind was made in small large one",),
)  # fmt: skip

VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    *string.punctuation, *string.digits, *string.ascii_lowercase,
    *dict.fromkeys((*_WORDS, *WORDS)),
    *(f"##{c}" for c in string.ascii_lowercase + string.digits),
)  # fmt: skip
"""The WordPiece vocabulary: what the templates use, and single characters so that any other ASCII word has pieces."""
