"""What the columns of a user's table are: by their usual names, or as ``data.columns`` says."""

import re
from dataclasses import dataclass

from unit_fast.errors import UserError, nearest, printable

_IMAGE = (
    "image", "image_path", "image_file", "image_name", "img", "img_path", "picture", "photo", "file_name", "filename",
    "file", "path", "flickr30k_id", "flikr30kid", "flickr30kid", "image_id",
)  # fmt: skip
_LABEL = (
    "label", "labels", "class", "category", "target", "gold_label", "sentiment", "intent", "relation", "is_duplicate",
    "y",
)  # fmt: skip
_ID = ("id", "question_id", "pair_id", "pairid", "uid", "idx", "index")


@dataclass(frozen=True)
class Role:
    """What a task wants to know of a row."""

    names: tuple[str, ...]
    """Columns that are taken for it, in small letters with ``_`` for other characters; the first that is there."""
    optional: bool = False


ROLES: dict[str, dict[str, Role]] = {
    "answer": {
        "image": Role(_IMAGE),
        "question": Role(("question", "question_str", "query", "text", "prompt")),
        "answer": Role(("answers", "answer", "multiple_choice_answer", "label")),
        "id": Role(_ID, optional=True),
    },
    "entail": {
        "image": Role(_IMAGE),
        "text": Role(("text", "sentence", "hypothesis", "statement", "caption", "claim", "sentence2", "question")),
        "label": Role(_LABEL),
        "id": Role(_ID, optional=True),
    },
    "classify": {
        "text": Role((
            "text", "text_a", "text1", "sentence", "sentence1", "sentence_a", "premise", "question", "question1",
            "review", "content", "message", "comment", "document", "title",
        )),
        "text_b": Role(
            ("text_b", "text2", "sentence2", "sentence_b", "hypothesis", "question2"), optional=True
        ),
        "label": Role(_LABEL),
        "id": Role(_ID, optional=True),
    },
}  # fmt: skip
"""Task -> what its rows hold: what ``data.columns`` names as ``ROLE`` or ``TASK.ROLE``."""
LABELS = ("answer", "label")
"""Roles that a test table may lack."""


def check_columns(columns: dict[str, str]) -> None:
    """``UserError`` on a key of ``data.columns`` that is no role of any task."""
    known = {role for roles in ROLES.values() for role in roles}
    known |= {f"{task}.{role}" for task, roles in ROLES.items() for role in roles}
    for key in columns:
        if key not in known:
            raise UserError(f"data.columns: unknown key {printable(key)!r}; {nearest(key, sorted(known))}")


def find_columns(task: str, columns: list[str], given: dict[str, str]) -> dict[str, str | None]:
    """Role -> the column that is taken for it, None without one.

    Args:
        columns: of the table.
        given: ``data.columns``: role, or ``task.role``, -> column.

    Raises:
        UserError: ``given`` names a column that the table has not.
    """
    normal: dict[str, str] = {}
    for column in columns:
        normal.setdefault(_normal(column), column)
    found = {}
    for role, wanted in ROLES[task].items():
        said = given.get(f"{task}.{role}", given.get(role))
        if said is not None and said not in columns:
            raise UserError(f"data.columns: {role} is {printable(said)!r}, no column; {nearest(said, columns)}")
        found[role] = said or next((normal[name] for name in wanted.names if name in normal), None)
    return found


def missing(task: str, found: dict[str, str | None], labelled: bool = True) -> list[str]:
    """The roles that must have a column and have none. ``labelled``: answers or labels are among them."""
    return [
        role
        for role, wanted in ROLES[task].items()
        if found[role] is None and not wanted.optional and (labelled or role not in LABELS)
    ]


def kind_of(columns: list[str], given: dict[str, str]) -> str | None:
    """The task that a table with these columns is for; None when it is for none. ``given``: ``data.columns``."""
    roles = {
        "answer": {"image", "question", "answer"}, "entail": {"image", "text", "label"}, "classify": {"text", "label"},
    }  # fmt: skip
    names = {_normal(column) for column in columns}
    has = {
        "image": bool(names & set(_IMAGE)), "label": bool(names & set(_LABEL)),
        "question": bool(names & {"question", "question_str", "query"}), "answer": bool(names & {"answer", "answers"}),
        "text": bool(names & {*ROLES["entail"]["text"].names, *ROLES["classify"]["text"].names}),
    }  # fmt: skip
    has |= {role: True for role, column in given.items() if column in columns}
    return next((task for task, wanted in roles.items() if all(has.get(role) for role in wanted)), None)


def _normal(column: str) -> str:
    return re.sub(r"\W+", "_", column.strip().lower())
