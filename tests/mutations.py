"""Breaks every operator once in each of its parts, and shows that the operator's own tests notice.

    python -m tests.mutations [--op OP ...] [--json] [--jobs N]

A break replaces a piece of text that stands once in the operator's module or folder, in a copy of ``kernels/`` that
tests import in place of the real one. Those of Triton run under ``TRITON_INTERPRET=1``. Exits with 1 where a break goes
unnoticed or cannot be made.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
TRITON = ("kernel", "backward kernel")


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new`` in the sources of ``op``."""

    op: str
    part: str
    """reference, backward (by hand, in PyTorch or around the kernels), cpu, kernel or backward kernel"""
    old: str
    new: str
    tests: str = ""
    """The test file, where it is not that of the operator's name."""


@dataclass(frozen=True)
class Outcome:
    """What became of a break."""

    op: str
    part: str
    outcome: str
    """caught, not caught, or why it cannot be said"""
    by: str
    """The test that noticed."""


_ATTENTION = {"tests": "attention"}
MUTATIONS = [
    Mutation("dropout", "reference", "return x * keep * keep_scale(dropout_p)", "return x * keep"),
    Mutation("dropout", "cpu", "torch.mul(kept, scale, out=target[part])", "target[part] = kept"),
    Mutation("dropout", "kernel", "limit, seed_ptr), x * scale, 0.0)", "limit, seed_ptr), x, 0.0)"),
    Mutation("dropout", "kernel", "tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=element < size)",
             "tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=element < size - 1)"),
    Mutation("residual_norm", "reference", "layer_norm(x + dropout_reference(", "layer_norm(x - dropout_reference("),
    Mutation("residual_norm", "backward", "(grad - level - normalised * along)", "(grad - normalised * along)"),
    Mutation("residual_norm", "kernel", "tl.sum(centred * centred, 1) / C + eps", "tl.sum(centred * centred, 1) / C"),
    Mutation("residual_norm", "backward kernel", "grad - level[:, None] - normalised * along[:, None]",
             "grad - level[:, None]"),
    Mutation("bias_act_dropout", "reference", "return dropout_reference(ACTIVATIONS[act](x)",
             "return dropout_reference(ACTIVATIONS[act](-x)"),
    Mutation("bias_act_dropout", "cpu", "threshold_backward(grad, y, 0.0).mul_(keep_scale(ctx.dropout_p))",
             "threshold_backward(grad, y, 0.0)"),
    Mutation("bias_act_dropout", "kernel", "value = tl.where(value <= 0.0, 0.0, value)",
             "value = tl.where(value < -0.1, 0.0, value)"),
    Mutation("bias_act_dropout", "backward kernel", "grad *= distribution + saved * density", "grad *= distribution"),
    Mutation("frozen_bn_act", "reference", "y = y + residual", "y = y - residual"),
    Mutation("frozen_bn_act", "kernel", "value += vector(shift_ptr", "value -= vector(shift_ptr"),
    Mutation("frozen_bn_act", "backward kernel", "grad = tl.where(y <= 0.0, 0.0", "grad = tl.where(y < 0.0, 0.0"),
    Mutation("match_cost", "reference", "cost = -cost_class * score.gather", "cost = cost_class * score.gather"),
    Mutation("match_cost", "kernel", "tl.abs(aw - bw) + tl.abs(ah - bh)", "tl.abs(aw - bw)"),
    Mutation("match_cost", "kernel", "for start in range(count, targets, TARGETS):",
             "for start in range(count + 1, targets, TARGETS):"),
    Mutation("assignment", "reference", "query[p, columns] = rows", "query[p, columns] = rows[::-1].copy()"),
    Mutation("assignment", "kernel", "waiting & (reached < distance)", "waiting & (reached <= distance)"),
    Mutation("assignment", "kernel", "mask=(column >= count) & (column < targets))", "mask=column < targets)"),
    Mutation("set_loss", "reference", "(weight * nll).sum(2) / weight.sum(2)", "(weight * nll).mean(2)"),
    Mutation("set_loss", "backward", "p.mul_(factor).scatter_add_(-1, target[..., None], -factor)", "p.mul_(factor)"),
    Mutation("set_loss", "kernel", "giou / number * weight_giou)", "giou * weight_giou)"),
    Mutation("set_loss", "backward kernel", "dw -= by_giou * gw", "dw += by_giou * gw"),
    Mutation("attribute_loss", "reference", "counted.sum(2, keepdim=True).clamp(min=1)",
             "counted.sum(2, keepdim=True)"),
    Mutation("attribute_loss", "kernel", "total * tl.exp(top - above) + tl.sum", "total + tl.sum"),
    Mutation("attribute_loss", "backward kernel", "k[:, None] * tl.exp(x - lse[:, None]) - hits",
             "tl.exp(x - lse[:, None]) - hits"),
    Mutation("attention", "reference", "scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)",
             "scores.masked_fill(empty, 0.0).softmax(-1)"),
    Mutation("attention", "backward", "* kept - delta) / math.sqrt", "* kept) / math.sqrt"),
    Mutation("attention", "kernel", "acc = dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRET)",
             "acc = dot(p.to(v.dtype), v, acc, INTERPRET)"),
    Mutation("attention", "backward kernel", "grad_k = tl.where(real[:, None], acc_k * grad_scale, 0.0)",
             "grad_k = tl.where(real[:, None], acc_k * kept, 0.0)"),
    Mutation("cross_attention", "kernel", "part *= (share / total)[:, None]", "part *= share[:, None]", **_ATTENTION),
    Mutation("cross_attention", "backward kernel", "p = tl.exp2(s * scale - lse[:, None])", "p = tl.exp2(s * scale)",
             **_ATTENTION),
    Mutation("adamw", "reference", "(1 - beta1) * grad", "(1 - beta2) * grad"),
    Mutation("adamw", "kernel", "v = beta2 * v + rest2 * (grad * grad)", "v = beta2 * v + rest2 * grad"),
    Mutation("adamw", "kernel", "tl.where(finite, 0, 1)", "0"),
]  # fmt: skip


def sources(op: str, kernels: Path) -> list[Path]:
    """The module of an operator, or the modules of its folder."""
    folder = kernels / ("attention" if op == "cross_attention" else op)
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def place_of(mutation: Mutation, kernels: Path) -> Path:
    """The one file that holds what is to be replaced, once. ``LookupError`` if there is not just one such place."""
    found = {path: path.read_text(encoding="utf-8").count(mutation.old) for path in sources(mutation.op, kernels)}
    if sum(found.values()) != 1:
        raise LookupError(f"{mutation.old!r} stands {sum(found.values())} times in {mutation.op}: it must be once")
    return next(path for path, number in found.items() if number)


def run(mutation: Mutation) -> Outcome:
    """Break, and run the operator's tests until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "unit_fast_kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            path = place_of(mutation, kernels)
        except LookupError as error:
            return Outcome(mutation.op, mutation.part, str(error), "")
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        own, suite = f"test_{mutation.tests or mutation.op}.py", "test_operators.py"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        environment.pop("TRITON_INTERPRET", None)
        files = [own, suite]
        if mutation.part in TRITON:
            environment["TRITON_INTERPRET"] = "1"
            files = [suite, own]
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                *(f"tests/kernels/{name}" for name in files), "-k", f"{own} or [{mutation.op}-",
            ],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    failed = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    said = {0: "not caught", 1: "caught"}.get(done.returncode, f"pytest ended with {done.returncode}")
    return Outcome(mutation.op, mutation.part, said, failed[0].split("::")[-1].split(" - ")[0] if failed else "")


def run_and_say(mutation: Mutation) -> Outcome:
    outcome = run(mutation)
    print(f"{outcome.op}, {outcome.part}: {outcome.outcome}", file=sys.stderr, flush=True)
    return outcome


def main(arguments: list[str] | None = None) -> int:
    ops = list(dict.fromkeys(mutation.op for mutation in MUTATIONS))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many breaks are tried at a time")
    options = parser.parse_args(arguments)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(run_and_say, (mutation for mutation in MUTATIONS if mutation.op in options.op)))
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        table = Table("operator", "broken", "outcome", "by")
        for outcome in outcomes:
            table.add_row(outcome.op, outcome.part, outcome.outcome, outcome.by)
        Console().print(table)
    return int(any(outcome.outcome != "caught" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
