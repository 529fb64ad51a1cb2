"""Where the images are that a user's table names."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from unit_fast.data.errors import BadImage
from unit_fast.data.shards.index import Shards
from unit_fast.data.shards.member import Member, NoMember

ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
"""Tried in this order for a name that has none of them."""
_NUMBERED = re.compile(r"(\d+)\.(?:jpe?g|png)$", re.IGNORECASE)


class ImageFinder:
    """Names in a table -> image files.

    Args:
        folders: where they are looked for, the likeliest first.
        inside: (folder, name) -> the place of that name, ``BadImage`` where it leads out (``Dataset._inside``).
    """

    def __init__(self, folders: list[Path | Shards], inside: Callable):
        self.folders, self.inside = folders, inside
        self._numbers: dict[int, str] | None = None

    def find(self, name: str) -> Path | Member | NoMember:
        """The file ``name``, with an ending where it has none; a bare number is the image whose name ends in it.

        Where there is none, the likeliest place. ``BadImage`` where the name leads out of the folders.
        """
        first = None
        for folder in self.folders:
            for ending in ("", *(() if Path(name).suffix in ENDINGS else ENDINGS)):
                place = self.inside(folder, name + ending)
                if _is_file(place):
                    return place
                first = first or place
        if name.isdecimal() and (found := self._by_number(int(name))) is not None:
            return found
        return first

    def missing(self, name: str) -> str | None:
        """Why there is no image called ``name``; None where there is one."""
        try:
            place = self.find(name)
        except BadImage as error:
            return error.reason
        return None if _is_file(place) else "no such file"

    def _by_number(self, number: int) -> Path | None:
        folder = self.folders[0]
        if self._numbers is None:
            self._numbers = {}
            for name in sorted(os.listdir(folder)) if isinstance(folder, Path) else ():
                if found := _NUMBERED.search(name):
                    self._numbers.setdefault(int(found[1]), name)
        name = self._numbers.get(number)
        return None if name is None else self.inside(folder, name)


def _is_file(place: Path | Member | NoMember) -> bool:
    return place.is_file() if isinstance(place, Path) else place.exists()
