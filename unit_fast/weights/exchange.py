"""Files of other projects' weights to checkpoints of ours and back."""

import dataclasses
from pathlib import Path

import safetensors.torch
import torch

from unit_fast.config import RunConfig
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.weights import checkpoint, convert, pretrained
from unit_fast.weights.files import load_weights, read_json

_PARTS = {
    "detr": pretrained.load_detr_backbone,
    "torchvision": pretrained.load_torchvision_backbone,
    "bert": pretrained.load_bert,
}


def import_file(
    source: Path, out: Path, kind: str, *, mmf_config: str | None = None, config: RunConfig | None = None, seed: int = 0
) -> str:
    """Write checkpoint folder ``out`` from the weights in ``source``; a line that says what was loaded.

    kind: ``mmf`` (a whole UniT, described by the JSON file ``mmf_config`` or by its tensors), or ``detr``,
    ``torchvision``, ``bert``: that part of the model of ``config``, whose rest is random from ``seed``. ``UserError``
    where the tensors do not fit.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    weights = load_weights(source)
    if kind == "mmf":
        model = convert.from_mmf(weights, None if mmf_config is None else read_json(Path(mmf_config)))
        config = RunConfig(model=model.config, started_from={"model": str(source)})
        report = f"{source}: {len(model.state_dict())} tensors loaded"
    else:
        if mmf_config is not None:
            raise UserError("--mmf-config: describes an MMF model; leave it out or give --format mmf")
        torch.manual_seed(seed)
        model = UniT(config.model)
        report = str(_PARTS[kind](model, weights, source=str(source)))
        part = "text encoder" if kind == "bert" else "backbone"
        config = dataclasses.replace(config, seed=seed, started_from={part: str(source)})
    checkpoint.save_weights(out, model, config)
    return report


def export_file(source: Path, out: Path, kind: str) -> list[str]:
    """Write our run or checkpoint ``source`` under the names of ``kind``; the names written.

    kind: ``mmf`` (everything) or ``detr`` (the backbone, as in DETR's checkpoint). ``out`` ends in ``.safetensors``, or
    in ``.pth`` for a file with ``{"model": tensors}``.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise UserError(f"{out}: give a file name that ends in .safetensors or .pth")
    if out.exists():
        raise UserError(f"{out}: is there already; give a new name")
    model, _ = checkpoint.load_model(source)
    if kind == "mmf":
        tensors = convert.to_mmf(model)
    else:
        prefix = "backbone."
        tensors = {
            f"backbone.0.body.{n.removeprefix(prefix)}": v
            for n, v in model.state_dict().items()
            if n.startswith(prefix)
        }
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    aside = out.with_name(out.name + ".tmp")
    try:
        if out.suffix == ".pth":
            torch.save({"model": tensors}, aside)
        else:
            safetensors.torch.save_file(tensors, aside)
        aside.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); give another place") from None
    return list(tensors)
