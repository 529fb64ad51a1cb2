"""``unit-fast export``."""

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(kw_only=True)
class Options:
    """One task of a trained model as a file for other programs, checked against PyTorch before it gets its name."""

    run: tyro.conf.Positional[str]
    """Run folder (its best checkpoint, else the last), checkpoint folder or model.safetensors."""
    out: str
    """The file to write."""
    format: Literal["onnx", "torch-export"] = "onnx"
    """ONNX, or an archive for torch.export.load."""
    task: str | None = None
    """coco, vg, vqa2, snli_ve, qnli, mnli, qqp or sst2; needed where the model has several."""
    batch: int | None = None
    """Fix the number of samples a call; default any."""
    size: tuple[int, int] | None = None
    """Fix height and width of the images, pixels; default any."""
    tokens: int | None = None
    """Fix the length of the texts, word pieces; default any."""
    data_root: str | None = None
    """Where the samples of the check are; default the run's data root, and random inputs where it is not there."""
    ema: bool = False
    """Take the averaged weights."""


def run(options: Options) -> int:
    from unit_fast.export.examples import Sizes
    from unit_fast.export.write import export

    sizes = Sizes(batch=options.batch, image=options.size, tokens=options.tokens)
    said = export(
        options.run, options.out, format=options.format, task=options.task, sizes=sizes, ema=options.ema,
        data_root=options.data_root,
    )  # fmt: skip
    print(f"{said}\nwritten: {options.out}")
    return 0
