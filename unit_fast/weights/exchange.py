"""Files of other projects' weights to checkpoints of ours and back."""

import dataclasses
from pathlib import Path

import safetensors.torch
import torch

from unit_fast.config import RunConfig
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.weights import checkpoint, convert, pretrained
from unit_fast.weights.detr import detr_config
from unit_fast.weights.files import load_weights, read_json
from unit_fast.weights.foreign import recognise
from unit_fast.weights.loading import load_foreign

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


def import_detr(source: Path, out: Path, *, stride: int | None = None) -> tuple[str, Path | None]:
    """Write checkpoint folder ``out`` with the whole DETR in ``source``, facebookresearch's or Hugging Face's, a file
    or the folder it is in. Returns what was loaded, and the config.json beside it if there is one.

    stride: see ``detr.detr_config``. ``UserError`` where the file is no whole DETR.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    if source.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        source = next((source / name for name in names if (source / name).is_file()), source / names[0])
    foreign = recognise(load_weights(source))
    if foreign is None:
        raise UserError(f"{source}: no DETR; give facebookresearch/detr's .pth or Hugging Face's model.safetensors")
    beside = source.parent / "config.json"
    settings = read_json(beside) if beside.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    model = UniT(detr_config(foreign, settings, source, stride))
    report = load_foreign(model, foreign, source=str(source))
    if report.left:
        raise UserError(f"{source}: {'; '.join(report.left)}")
    checkpoint.save_weights(out, model, RunConfig(model=model.config, started_from={"model": str(source)}))
    cells = model.config.backbone.stride
    return f"{report.counts()}\na feature cell has {cells} pixels", beside if beside.is_file() else None


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
