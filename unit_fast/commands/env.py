"""``unit-fast env``."""

import json
from dataclasses import dataclass

from unit_fast.commands.command_line import parse


@dataclass(kw_only=True)
class Env:
    """Versions, machine and commit, to paste into an issue."""


def run(arguments: list[str], prog: str) -> int:
    parse(Env, arguments, prog=prog)
    from unit_fast.run.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0
