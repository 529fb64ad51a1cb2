"""``unit-fast convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unit_fast.commands.command_line import parse


@dataclass(kw_only=True)
class Convert:
    """Weights of other projects to a checkpoint of ours, or ours to theirs. No code of the file is executed."""

    source: tyro.conf.Positional[str]
    """A weights file (.pth, .ckpt, .safetensors) or, with --to, a run or checkpoint of ours."""
    out: tyro.conf.Positional[str]
    """A checkpoint folder to write, for --init-from; with --to a .safetensors or .pth file."""
    format: Literal["mmf", "detr", "torchvision", "bert"] = "mmf"
    """What the source is; all but mmf fill a part of --recipe's model, whose rest is random."""
    to: Literal["mmf", "detr"] | None = None
    """Write ours in this format; detr takes the backbone."""
    mmf_config: str | None = None
    """JSON file with the configuration of the MMF model; default read off the tensors."""
    recipe: str = "all8_shared"
    """Model that a backbone or BERT is put into."""
    seed: int = 0
    """Seed of the random rest."""


def run(arguments: list[str], prog: str) -> int:
    command = parse(Convert, arguments, prog=prog)
    from unit_fast.recipes import recipe
    from unit_fast.weights.exchange import export_file, import_file

    if command.to:
        names = export_file(Path(command.source), Path(command.out), command.to)
        print(f"{len(names)} tensors written to {command.out}")
        return 0
    report = import_file(
        Path(command.source), Path(command.out), command.format, mmf_config=command.mmf_config,
        config=None if command.format == "mmf" else recipe(command.recipe), seed=command.seed,
    )  # fmt: skip
    print(f"{report}\nwritten: {command.out}")
    return 0
