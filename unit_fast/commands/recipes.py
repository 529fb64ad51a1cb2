"""``unit-fast recipes``."""

from dataclasses import dataclass

import tyro

from unit_fast.config import to_json
from unit_fast.recipes import RECIPES, recipe


@dataclass(kw_only=True)
class Options:
    """List the recipes, or print one as JSON (for --config-file)."""

    name: tyro.conf.Positional[str | None] = None
    """A recipe."""


def run(options: Options) -> int:
    if options.name:
        print(to_json(recipe(options.name)), end="")
        return 0
    width = max(map(len, RECIPES))
    for name, (about, _) in RECIPES.items():
        print(f"{name:<{width}}  {about}")
    return 0
