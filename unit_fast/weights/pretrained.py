"""Published weights for a part of the model: the backbones of DETR and torchvision, Hugging Face's BERT (SPEC 7.4).

A loader takes the tensors that a file holds and returns a ``LoadReport``; ``UserError`` where some are missing.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.weights.files import load_weights
from unit_fast.weights.loading import LoadReport, copy_tensors
from unit_fast.weights.names import bert_name, is_derived

_log = logging.getLogger(__name__)


def _part(model: UniT, prefix: str) -> list[str]:
    return [name for name in model.state_dict() if name.startswith(prefix)]


def load_detr_backbone(model: UniT, state: Mapping[str, Tensor], source: str = "DETR") -> LoadReport:
    """The 265 ``backbone.0.body.*`` tensors of a DETR checkpoint (SPEC 7.4, rule 4); the rest is left."""
    state = state.get("model", state) if isinstance(state.get("model"), Mapping) else state
    state = {n: v for n, v in state.items() if n.startswith("backbone.0.body.") and not is_derived(n)}
    names = {n: f"backbone.0.body.{n.removeprefix('backbone.')}" for n in _part(model, "backbone.")}
    return _require(copy_tensors(model, state, names, source=source))


def load_torchvision_backbone(model: UniT, state: Mapping[str, Tensor], source: str = "torchvision") -> LoadReport:
    """torchvision's ResNet weights; ``fc.*`` and batch counts are dropped."""
    state = {n: v for n, v in state.items() if not n.startswith("fc.") and not is_derived(n)}
    names = {n: n.removeprefix("backbone.") for n in _part(model, "backbone.")}
    return _require(copy_tensors(model, state, names, source=source))


def load_bert(model: UniT, state: Mapping[str, Tensor], source: str = "BERT") -> LoadReport:
    """Hugging Face BERT weights, with or without ``bert.`` prefix, old ``gamma``/``beta`` names, pooler optional."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith("cls.") and not is_derived(name):
            renamed[name] = value
    ours = [n for n in _part(model, "text_encoder.") if not n.startswith("text_encoder.task_embedding.")]
    names = {n: bert_name(n.removeprefix("text_encoder.")) for n in ours}
    report = copy_tensors(model, renamed, names, source=source)
    report.missing = [n for n in report.missing if not n.startswith("text_encoder.pooler.")]
    return _require(report)


def _require(report: LoadReport) -> LoadReport:
    if not report.complete:
        raise UserError(f"the file lacks tensors of the model: {report}")
    return report


_PRETRAINED = (
    ("backbone", "detr-r50-dc5-f0fb7ef5.pth", "DETR's R50-DC5 checkpoint", load_detr_backbone),
    ("backbone", "resnet50*.pth", "torchvision's ResNet-50 ImageNet weights", load_torchvision_backbone),
    ("text encoder", "bert-base-uncased/model.safetensors", "Hugging Face's bert-base-uncased", load_bert),
)


def load_pretrained(
    model: UniT, folder: str | Path, *, require: bool = False, parts: Iterable[str] = ("backbone", "text encoder")
) -> dict[str, str]:
    """Load the backbone (DETR's, else torchvision's) and BERT, or those of them in ``parts``, from ``folder``.

    Returns part -> what it starts from, for the run's config. A missing file leaves the part at its random initial
    values with one warning that names file and source; ``require`` makes it a ``UserError``.
    """
    folder, found, parts = Path(folder), {}, set(parts)
    for part, pattern, _, load in _PRETRAINED:
        if part not in parts:
            continue
        paths = sorted(folder.glob(pattern)) if part not in found else []
        if paths:
            report = load(model, load_weights(paths[0]), source=str(paths[0]))
            _log.info("%s: %s", part, report)
            found[part] = str(paths[0])
    for part in dict.fromkeys(p for p, *_ in _PRETRAINED):
        if part in found or part not in parts:
            continue
        wanted = " or ".join(f"{folder / pattern} ({source})" for p, pattern, source, _ in _PRETRAINED if p == part)
        if require:
            raise UserError(f"{part}: no pretrained weights; put {wanted} there, or drop --require-weights")
        _log.warning("%s starts from random weights: there is no %s", part, wanted)
        found[part] = "random"
    return found
