"""``unit-fast``: parse, call, print.

Exit codes: 0 done, 1 ``data check`` found errors, ``data shard`` unreadable images or ``kernels`` a budget exceeded,
2 a mistake in the input, 3 training was not finite, 5 out of memory, 75 stopped and saved (``--resume auto`` goes
on), 130 stopped at once. Training tells how it ended in its exit code and ``summary.json`` even where its console has
gone; a command whose output was its whole work ends with 1 where that could not be written.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from unit_fast.commands.command_line import parse
from unit_fast.errors import UserError, nearest
from unit_fast.run.console import Console, Nowhere, open_standard_files


class Command(NamedTuple):
    """A module with ``Options``, a dataclass, and ``run(options)``, its exit code; ``default(arguments)``, where it is
    there, gives the options before the arguments change them. It is imported when it runs: the help does not wait."""

    module: str
    """Its name within ``unit_fast.commands``."""
    about: str
    """One line of help."""
    leaves_files: bool = False
    """What it prints is not all that it does: files have it too."""


COMMANDS = {
    "demo": Command("demo", "generate a world, train all eight tasks on it, write a report", leaves_files=True),
    "train": Command("train", "train a recipe", leaves_files=True),
    "evaluate": Command("evaluate", "metrics of a trained model, and prediction files", leaves_files=True),
    "predict": Command("predict", "what a model says about an image and/or text"),
    "data check": Command("data_check", "read a whole data root and report what is odd"),
    "data generate": Command("data_generate", "write the generated eight-task world", leaves_files=True),
    "data shard": Command("data_shard", "write folders of images into WebDataset tar shards", leaves_files=True),
    "recipes": Command("recipes", "list the recipes, or print one as JSON"),
    "convert": Command("convert", "weights of MMF, DETR, torchvision and BERT to ours and back", leaves_files=True),
    "export": Command("export", "a task of a trained model as an ONNX file or torch.export archive", leaves_files=True),
    "kernels": Command("kernels", "assemble the Triton kernels without a GPU: registers, spills, bounds"),
    "env": Command("env", "versions and machine, to paste into an issue"),
}


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


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print("usage: unit-fast COMMAND [OPTIONS]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<15} {command.about}")
        print("\n`unit-fast COMMAND --help` lists the options of a command; --debug shows the trace of an error.")
        return 0
    if arguments[0] == "--version":
        import unit_fast

        print(unit_fast.__version__)
        return 0
    name, rest = _split(arguments)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    module = importlib.import_module(f"unit_fast.commands.{COMMANDS[name].module}")
    default = module.default(rest) if hasattr(module, "default") else None
    return module.run(parse(module.Options, rest, prog=f"unit-fast {name}", default=default))


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, which may have two words, and its own arguments."""
    words = 2 if arguments[0] == "data" and arguments[1:] and not arguments[1].startswith("-") else 1
    return " ".join(arguments[:words]), arguments[words:]


def _only_prints(arguments: list[str]) -> bool:
    """Whether what was printed is all that was done."""
    if not arguments or "--json" in arguments:
        return True
    command = COMMANDS.get(_split(arguments)[0])
    return command is None or not command.leaves_files
