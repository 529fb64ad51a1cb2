"""``unit-fast kernels``."""

import json
from dataclasses import dataclass


@dataclass(kw_only=True)
class Options:
    """Assemble every Triton kernel for A100 and H100/H200 and print what it takes and what it could reach.

    Needs no GPU. Exit code 1 if a kernel takes more than its budget.
    """

    op: str | None = None
    """Only these operators, e.g. attention,residual_norm; default all."""
    arch: str | None = None
    """sm_80 (A100), sm_90 (H100, H200) or both, the default."""
    dtype: str | None = None
    """bfloat16, float16, float32; default all."""
    json: bool = False
    """Print a list of JSON objects."""


def run(options: Options) -> int:
    from unit_fast.report.kernels import as_object, assembled_rows, show

    rows, wrong = assembled_rows(options.op, options.arch, options.dtype)
    if options.json:
        print(json.dumps([as_object(row) for row in rows], indent=1))
    else:
        show(rows, wrong)
    return 1 if wrong else 0
