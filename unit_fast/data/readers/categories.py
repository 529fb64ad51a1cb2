"""Classes of files in COCO's format: numbered by the order of ``categories``, whatever ids the file gives them.

Exporters number from 0 or 1, leave gaps, or write a super-category without boxes as a category of its own (Roboflow).
A model's outputs have none of these. The ids stay: results are written with those of the file that was read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from unit_fast.config import DataConfig, TaskConfig
from unit_fast.data.readers.sources import cached
from unit_fast.data.store import files
from unit_fast.data.store.cache import open_cache
from unit_fast.data.store.content import Content
from unit_fast.errors import UserError, nearest, printable


@dataclass(frozen=True)
class Outputs:
    """What the data say of a task's outputs."""

    classes: tuple[str, ...]
    """Names in order."""
    class_ids: tuple[int, ...] = ()
    """Detection: the category id of each."""
    lines: list[str] = field(default_factory=list)
    """What to tell about it."""


class Category(NamedTuple):
    """An entry of ``categories``, or an id that boxes have in a file without any."""

    id: int
    name: str
    parent: str | None
    """Its ``supercategory``."""
    used: bool
    """Whether a box has it."""


def read_categories(path: Path, data: DataConfig) -> list[Category]:
    """The categories of a file in COCO's format, through the cache, in their order. Records that are malformed are left
    to the reader of the boxes. ``UserError`` on a file of another kind."""

    def build() -> Content:
        content = files.read_json(path, drop=("segmentation", "bbox"))
        name = printable(path, 400)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise UserError(f"{name}: not a COCO file (expected an object with images, annotations and categories)")
        rows, listed = (
            [r for r in content.get(key) or () if isinstance(r, dict)] if isinstance(content.get(key), list) else []
            for key in ("annotations", "categories")
        )
        used = {i for r in rows if type(i := whole(r.get("category_id"))) is int}
        found = [(whole(r.get("id")), r.get("name"), r.get("supercategory")) for r in listed]
        found = [entry for entry in found if type(entry[0]) is int and type(entry[1]) is str]
        if not listed:
            found = [(i, str(i), None) for i in sorted(used)]
        return Content(values={"categories": [[i, n, p if type(p) is str else None, i in used] for i, n, p in found]})

    read = cached(open_cache(data), "categories", {"file": [path]}, {}, build).values["categories"]
    return [Category(*entry) for entry in read]


def classes_of(paths: Iterable[Path], data: DataConfig, config: TaskConfig) -> Outputs:
    """The classes of the files together, in the order of the first file; what only later ones have comes last.

    A category without boxes that others name as their super-category is left out. Classes that ``config`` names are
    taken as they stand there.

    Raises:
        UserError: one id with two names in a file, no class at all, or no category for a class of ``config``.
    """
    read = {path: _once(path, read_categories(path, data)) for path in paths}
    parents = {c.parent for found in read.values() for c in found if c.parent != c.name}  # COCO's person is its own
    used = {c.name for found in read.values() for c in found if c.used}
    left = {c.name for found in read.values() for c in found if c.name in parents and c.name not in used}
    known: list[tuple[int, str]] = []
    for number, found in enumerate(read.values()):
        new = [(c.id, c.name) for c in found if c.name not in left]
        known += new if not number else [entry for entry in new if entry[1] not in {name for _, name in known}]
    where = printable(", ".join(map(str, read)), 400)
    if config.classes:
        ids = {name: i for i, name in reversed(known)}
        for name in config.classes:
            if name not in ids:
                raise UserError(f"{where}: has no category {printable(name, 60)!r} (classes); {nearest(name, ids)}")
        known = [(ids[name], name) for name in config.classes]
    if not known:
        raise UserError(f"{where}: has no category and no box: there is no class to train")
    how = "as given" if config.classes else f"by their order in {printable(next(iter(read)), 400)}"
    lines = [f"{len(known)} classes {how}: {_shown(known)}"]
    if left:
        names = printable(", ".join(sorted(left)), 200)
        lines.append(f"no class: {names} (no box has it, and it is the super-category of others)")
    return Outputs(tuple(name for _, name in known), tuple(i for i, _ in known), lines)


def numbering(
    categories: list[tuple[int, str]], classes: tuple[str, ...], class_ids: tuple[int, ...]
) -> dict[int, int]:
    """Category id in a file -> class, of the (id, name) ``categories`` that are one of ``classes``.

    An entry with the same id and name is that class, else the one of its name: another export of the same classes may
    number them otherwise.
    """
    exact = {pair: number for number, pair in enumerate(zip(class_ids, classes))}
    found = {i: exact[i, name] for i, name in categories if (i, name) in exact}
    named = {name: number for number, name in reversed(list(enumerate(classes)))}
    for i, name in categories:
        if i not in found and name in named and named[name] not in found.values():
            found[i] = named[name]
    return found


def whole(value):
    """A float without a fraction as the integer that it stands for; others as they are."""
    return int(value) if type(value) is float and value.is_integer() else value


def _once(path: Path, found: list[Category]) -> list[Category]:
    """Each category once; ``UserError`` where one id has two names."""
    names: dict[int, Category] = {}
    for category in found:
        other = names.setdefault(category.id, category)
        if other.name != category.name:
            raise UserError(
                f"{printable(path, 400)}: category id {category.id} is {printable(other.name, 60)!r} and "
                f"{printable(category.name, 60)!r}; give each category an id of its own"
            )
    return list(names.values())


def _shown(known: list[tuple[int, str]]) -> str:
    first = ", ".join(f"{name} (id {i})" for i, name in known[:8])
    return printable(first + (f" and {len(known) - 8} more" if len(known) > 8 else ""), 400)
