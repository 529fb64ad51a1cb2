"""``unit-fast convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(kw_only=True)
class Options:
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


def run(options: Options) -> int:
    from unit_fast.recipes import recipe
    from unit_fast.weights.exchange import export_file, import_file

    if options.to:
        names = export_file(Path(options.source), Path(options.out), options.to)
        print(f"{len(names)} tensors written to {options.out}")
        return 0
    report = import_file(
        Path(options.source), Path(options.out), options.format, mmf_config=options.mmf_config,
        config=None if options.format == "mmf" else recipe(options.recipe), seed=options.seed,
    )  # fmt: skip
    print(f"{report}\nwritten: {options.out}")
    return 0
