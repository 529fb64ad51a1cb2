"""``unit-fast data check``."""

import json
import sys
from dataclasses import dataclass, field

import tyro

from unit_fast.config import DataConfig


@dataclass(kw_only=True)
class Options:
    """Read a whole data root and report what is there and what is odd. Exit code 1 if training could not use it."""

    root: tyro.conf.Positional[str]
    """Data root."""
    decode: bool = False
    """Decode every image, not only its header: finds files that are cut off."""
    examples: int = 3
    """Examples shown of each kind of finding."""
    paths: dict[str, str] = field(default_factory=dict)
    """Overrides of single paths, as data.paths in training, e.g. for shards elsewhere."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of your own tables that are not called by a usual name, as data.columns in training."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    from unit_fast.data.check import check

    data = DataConfig(paths=options.paths, columns=options.columns)
    found = check(options.root, data, decode=options.decode, examples=options.examples)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout.isatty():
        import rich

        rich.print(found)
    else:
        print(found)
    return 0 if found.ok else 1
