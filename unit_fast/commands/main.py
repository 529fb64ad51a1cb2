"""``unit-fast``: parse, call, print.

Exit codes: 0 done, 1 ``data check`` found errors, ``data shard`` unreadable images or ``kernels`` a budget exceeded,
2 a mistake in the input, 3 training was not finite, 5 out of memory, 75 stopped and saved (``--resume auto`` goes
on), 130 stopped at once. Training tells how it ended in its exit code and ``summary.json`` even where its console has
gone; a command whose output was its whole work ends with 1 where that could not be written.
"""

import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from unit_fast.commands.command_line import parse
from unit_fast.commands.train import run_demo, run_train
from unit_fast.commands.use import run_convert, run_data_shard, run_evaluate, run_predict
from unit_fast.config import DataConfig, to_json
from unit_fast.errors import UserError, nearest
from unit_fast.run.console import Console, Nowhere, open_standard_files

# What a command needs is imported when it runs: `unit-fast --help` does not wait for PyTorch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. A user's mistake is one line on standard error (``--debug`` shows the trace)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    package = logging.getLogger("unit_fast")
    level = package.level
    open_standard_files()
    before = sys.stdout, sys.stderr
    output, errors = (Console(stream or Nowhere()) for stream in before)  # None: the process has none
    sys.stdout, sys.stderr = output, errors
    try:
        code = _dispatch(arguments)
        output.flush()
        if output.lost and not code and _only_prints(arguments):
            if output.lost != os.strerror(errno.EPIPE):  # a reader that has seen enough, e.g. head, knows
                print(f"unit-fast: the output could not be written ({output.lost})", file=sys.stderr)
            return 1
        return code
    except UserError as error:
        if debug:
            raise
        print(f"unit-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("unit-fast: stopped", file=sys.stderr)
        return 130
    finally:  # a command may have made the package quieter
        package.setLevel(level)
        output.flush()
        sys.stdout, sys.stderr = before


def _only_prints(arguments: Sequence[str]) -> bool:
    """Whether what a command prints is all that it does; else it leaves files, which have it too."""
    leaves_files = ("demo", "train", "evaluate", "convert", "data generate", "data shard")
    return "--json" in arguments or not " ".join(arguments[:2]).startswith(leaves_files)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print("usage: unit-fast COMMAND [OPTIONS]\n\ncommands:")
        for name, (_, about) in COMMANDS.items():
            print(f"  {name:<15} {about}")
        print("\n`unit-fast COMMAND --help` lists the options of a command; --debug shows the trace of an error.")
        return 0
    if arguments[0] == "--version":
        import unit_fast

        print(unit_fast.__version__)
        return 0
    name = arguments[0]
    rest = arguments[1:]
    if name == "data" and rest and not rest[0].startswith("-"):
        name, rest = f"data {rest[0]}", rest[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    return COMMANDS[name][0](rest, f"unit-fast {name}")


# ----------------------------------------------------------------------------------------------------------- data


@dataclass(kw_only=True)
class DataCheck:
    """Read a whole data root and report what is there and what is odd. Exit code 1 if training could not use it."""

    root: tyro.conf.Positional[str]
    """Data root."""
    decode: bool = False
    """Decode every image, not only its header: finds files that are cut off."""
    examples: int = 3
    """Examples shown of each kind of finding."""
    paths: dict[str, str] = field(default_factory=dict)
    """Overrides of single paths, as data.paths in training, e.g. for shards elsewhere."""
    json: bool = False
    """Print JSON."""


def _data_check(arguments: list[str], prog: str) -> int:
    command = parse(DataCheck, arguments, prog=prog)
    from unit_fast.data.check import check

    data = DataConfig(paths=command.paths)
    found = check(command.root, data, decode=command.decode, examples=command.examples)
    if command.json:
        print(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout.isatty():
        import rich

        rich.print(found)
    else:
        print(found)
    return 0 if found.ok else 1


@dataclass(kw_only=True)
class DataGenerate:
    """Write the generated world: all eight data sets in their real formats."""

    folder: tyro.conf.Positional[str]
    """Where to; a world generated earlier is replaced."""
    seed: int = 0
    """Seed; the same gives the same files."""
    scale: float = 1.0
    """Multiplies the number of samples; 1 has 4000 training scenes."""
    imdb: bool = False
    """Write VQA as MMF's imdb arrays instead of the official files."""


def _data_generate(arguments: list[str], prog: str) -> int:
    command = parse(DataGenerate, arguments, prog=prog)
    from unit_fast.data.generated.world import generate

    made = generate(command.folder, seed=command.seed, scale=command.scale, imdb=command.imdb)
    for task, splits in made["counts"].items():
        print(f"{task:<8} " + ", ".join(f"{split} {count:,}" for split, count in splits.items()))
    print(f"world: {made['folder']}")
    return 0


# -------------------------------------------------------------------------------------------------- recipes, env


@dataclass(kw_only=True)
class Recipes:
    """List the recipes, or print one as JSON (for --config-file)."""

    name: tyro.conf.Positional[str | None] = None
    """A recipe."""


def _recipes(arguments: list[str], prog: str) -> int:
    command = parse(Recipes, arguments, prog=prog)
    from unit_fast.recipes import RECIPES, description, recipe

    if command.name:
        print(to_json(recipe(command.name)), end="")
        return 0
    width = max(map(len, RECIPES))
    for name in RECIPES:
        print(f"{name:<{width}}  {description(name)}")
    return 0


@dataclass(kw_only=True)
class Env:
    """Versions, machine and commit, to paste into an issue."""


def _env(arguments: list[str], prog: str) -> int:
    parse(Env, arguments, prog=prog)
    from unit_fast.run.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0


@dataclass(kw_only=True)
class Kernels:
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


def _kernels(arguments: list[str], prog: str) -> int:
    command = parse(Kernels, arguments, prog=prog)
    from unit_fast.report.kernels import as_object, assembled_rows, show

    rows, wrong = assembled_rows(command.op, command.arch, command.dtype)
    if command.json:
        print(json.dumps([as_object(row) for row in rows], indent=1))
    else:
        show(rows, wrong)
    return 1 if wrong else 0


COMMANDS = {
    "demo": (run_demo, "generate a world, train all eight tasks on it, write a report"),
    "train": (run_train, "train a recipe"),
    "evaluate": (run_evaluate, "metrics of a trained model, and prediction files"),
    "predict": (run_predict, "what a model says about an image and/or text"),
    "data check": (_data_check, "read a whole data root and report what is odd"),
    "data generate": (_data_generate, "write the generated eight-task world"),
    "data shard": (run_data_shard, "write folders of images into WebDataset tar shards"),
    "recipes": (_recipes, "list the recipes, or print one as JSON"),
    "convert": (run_convert, "weights of MMF, DETR, torchvision and BERT to ours and back"),
    "kernels": (_kernels, "assemble the Triton kernels without a GPU: registers, spills, bounds"),
    "env": (_env, "versions and machine, to paste into an issue"),
}
