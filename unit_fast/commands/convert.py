"""``unit-fast convert``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from unit_fast.errors import UserError


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
    whole: bool = False
    """With --format detr: the file's own model, every part of it, which predicts at once; not a recipe's."""
    stride: Literal[16, 32] | None = None
    """With --whole: pixels per feature cell, 16 for a DC5 model; default read off the file's name or config.json."""
    labels: str | None = None
    """Names of the outputs: labels.json of a run, a COCO annotation file, or a config.json with id2label."""
    data_root: str | None = None
    """Data root to take names of outputs and the vocabulary from."""
    recipe: str = "all8_shared"
    """Model that a backbone or BERT is put into."""
    seed: int = 0
    """Seed of the random rest."""


def run(options: Options) -> int:
    from unit_fast.recipes import recipe
    from unit_fast.weights.exchange import export_file, import_detr, import_file

    if options.to:
        names = export_file(Path(options.source), Path(options.out), options.to)
        print(f"{len(names)} tensors written to {options.out}")
        return 0
    if options.whole and options.format != "detr":
        raise UserError(f"--whole: goes with --format detr; a model of {options.format} is filled as a recipe says")
    if options.stride and not options.whole:
        raise UserError("--stride: goes with --whole; a recipe's model has its own")
    out, beside = Path(options.out), None
    if options.whole:
        report, beside = import_detr(Path(options.source), out, stride=options.stride)
    else:
        report = import_file(
            Path(options.source), out, options.format, mmf_config=options.mmf_config,
            config=None if options.format == "mmf" else recipe(options.recipe), seed=options.seed,
        )  # fmt: skip
    print(report)
    return _name(options, out, beside)


def _name(options: Options, out: Path, beside: Path | None) -> int:
    """Put the names of the outputs beside the weights in ``out``."""
    import shutil

    from unit_fast.evaluation.known_labels import write_known_labels
    from unit_fast.weights.checkpoint import config_of

    try:
        unnamed = write_known_labels(
            out, config_of(out).model, labels=options.labels, beside=beside, root=options.data_root
        )
    except BaseException:
        shutil.rmtree(out)  # whole or not at all
        raise
    print(f"written: {options.out}")
    if unnamed:
        print(f"no names for the outputs of {', '.join(unnamed)}: --labels FILE or --data-root ROOT gives them")
    return 0
