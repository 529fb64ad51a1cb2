"""``unit-fast``: parse, call, print.

Exit codes: 0 done, 1 ``data check`` found errors, ``data shard`` or (of several images) ``predict`` unreadable images
or ``kernels`` a budget exceeded, 2 a mistake in the input, 3 training was not finite, 5 out of memory, 75 stopped and
saved (``--resume auto`` goes on), 130 stopped at once. Training tells how it ended in its exit code and
``summary.json`` even where its console has gone; a command whose output was its whole work ends with 1 where that could
not be written.
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from unit_fast import threads
from unit_fast.commands.command_line import parse
from unit_fast.commands.options import page
from unit_fast.errors import UserError, nearest
from unit_fast.run.console import Console, Nowhere, open_standard_files


class Command(NamedTuple):
    """A module with ``Options``, a dataclass, and ``run(options)``, its exit code; ``default(arguments)``, where it is
    there, gives the options before the arguments change them, and ``COMMON`` names those of the short help. It is
    imported when it runs: the list of commands does not wait."""

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
    "runs": Command("runs", "list runs: state, step, checkpoints, metrics"),
    "report": Command("report", "draw the report of a run again from its files", leaves_files=True),
    "data check": Command("data_check", "read a whole data root and report what is odd"),
    "data generate": Command("data_generate", "write the generated eight-task world", leaves_files=True),
    "data prepare": Command("data_prepare", "make a YOLO or Pascal VOC folder one in COCO's format", leaves_files=True),
    "data shard": Command("data_shard", "write folders of images into WebDataset tar shards", leaves_files=True),
    "recipes": Command("recipes", "list the recipes, or print one as JSON"),
    "convert": Command("convert", "weights of MMF, DETR, torchvision and BERT to ours and back", leaves_files=True),
    "export": Command("export", "a task of a trained model as an ONNX file or torch.export archive", leaves_files=True),
    "kernels": Command("kernels", "assemble the Triton kernels without a GPU: registers, spills, bounds"),
    "completion": Command("completion", "a script that completes commands and options in bash, zsh or fish"),
    "env": Command("env", "versions and machine, to paste into an issue"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. A user's mistake is one line on standard error (``--debug`` shows the trace)."""
    if arguments is None:  # a process of its own: its environment is ours to complete
        threads.wait_briefly()
        arguments = sys.argv[1:]
    arguments = list(arguments)
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
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if arguments[:1] == ["--version"]:
        import unit_fast

        print(unit_fast.__version__)
        return 0
    name, rest = _split(arguments)
    asked = next((a for a in ("--help-all", "--help", "-h") if a in rest), None)
    if not name or (name == "data" and (asked or not rest)):
        _list_commands(name)
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {nearest(name, ['data', *COMMANDS])}")
    module, default = load(name, rest)
    if asked:
        common = () if asked == "--help-all" else getattr(module, "COMMON", ())
        print(page(module.Options, f"unit-fast {name}", default, common), end="")
        return 0
    return module.run(parse(module.Options, rest, prog=f"unit-fast {name}", default=default))


def load(name: str, arguments: Sequence[str]) -> tuple[ModuleType, object]:
    """The module of a command, and its options before the arguments change them; None where these are the class's."""
    module = importlib.import_module(f"unit_fast.commands.{COMMANDS[name].module}")
    return module, module.default(arguments) if hasattr(module, "default") else None


def _list_commands(group: str) -> None:
    print(f"usage: unit-fast {group or 'COMMAND'} {'COMMAND ' if group else ''}[OPTIONS]\n\ncommands:")
    for name, command in COMMANDS.items():
        if name.startswith(group):
            print(f"  {name:<15} {command.about}")
    print("\n`unit-fast help COMMAND` lists the options of a command; --debug shows the trace of an error.")


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, which may have two words and is empty where there is none, and its own arguments."""
    words = 0
    while words < len(arguments[:2]) and not arguments[words].startswith("-") and (not words or arguments[0] == "data"):
        words += 1
    return " ".join(arguments[:words]), arguments[words:]


def _only_prints(arguments: list[str]) -> bool:
    """Whether what was printed is all that was done."""
    if not arguments or "--json" in arguments:
        return True
    command = COMMANDS.get(_split(arguments)[0])
    return command is None or not command.leaves_files
