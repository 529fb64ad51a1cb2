"""``unit-fast env``."""

import json
from dataclasses import dataclass


@dataclass(kw_only=True)
class Options:
    """Versions, machine and commit, to paste into an issue."""


def run(options: Options) -> int:
    from unit_fast.run.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0
