"""``unit-fast report``."""

from dataclasses import dataclass

import tyro

from unit_fast.errors import UserError


@dataclass(kw_only=True)
class Options:
    """Draw the report of a run again from its files: report.html and curves.svg. The run may still be going on."""

    run: tyro.conf.Positional[str]
    """Run folder."""


def run(options: Options) -> int:
    from unit_fast.report import write_report

    try:
        print(f"report: {write_report(options.run)}")
    except OSError as error:
        path = error.filename or options.run
        raise UserError(f"{path}: the report cannot be written ({error.strerror or error})") from None
    return 0
