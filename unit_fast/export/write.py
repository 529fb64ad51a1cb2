"""A run's task to a file that other programs run, compared with PyTorch before it gets its name."""

import contextlib
import dataclasses
import json
import logging
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from unit_fast.config import RunConfig
from unit_fast.data.images.transforms import MEAN, STD
from unit_fast.errors import UserError, nearest
from unit_fast.evaluation.labels import LABELS, VOCABULARY, find_labels
from unit_fast.export.examples import Sizes, batches_of, samples_of
from unit_fast.export.head import TaskHead
from unit_fast.tasks import Task, get_task
from unit_fast.weights import checkpoint
from unit_fast.weights.files import read_json

FORMATS = ("onnx", "torch-export")
METADATA = "unit_fast.json"
"""Name of the entry with preprocessing and labels: a property of an ONNX model, an extra file of an archive."""
TOLERANCE = 1e-3
"""Largest difference from PyTorch, by the largest number of an output (at least 1), that a file may have."""

_log = logging.getLogger("unit_fast.export")
Run = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def export(
    run: str | Path, out: str | Path, *, format: str = "onnx", task: str | None = None, sizes: Sizes | None = None,
    ema: bool = False, data_root: str | None = None,
) -> str:  # fmt: skip
    """Write the model of ``run`` for one ``task`` to the file ``out``; a line that says how it was checked.

    run: run folder, checkpoint or weights file. task: data set key or short name; None where the model has one only.
    sizes: what is fixed; the rest may be any size at every call. data_root: where to look for samples, default the
    run's. The file is written under another name and checked against PyTorch on the samples in several sizes; it gets
    its name only where it agrees. ``UserError`` where it does not, or ``out`` is there already.
    """
    out, sizes = Path(out), sizes or Sizes()
    if format not in FORMATS:
        raise UserError(f"format: {format!r} is not known; {nearest(format, FORMATS)}")
    if out.exists():
        raise UserError(f"{out}: is there already; give a new name")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")
    model, config = checkpoint.load_model(run, ema=ema)
    chosen = _task(config, task)
    _check_sizes(chosen, config, sizes)
    if data_root is not None:
        config = _with_root(config, data_root)
    head = TaskHead(model.float(), chosen.name)
    samples, source = samples_of(config, chosen.name, 4)
    batches = batches_of(chosen.name, samples, head.inputs, sizes)
    metadata = json.dumps(describe(head, chosen, config, sizes, find_labels(run)), ensure_ascii=False)
    program = _program(head, batches[0], chosen, config, sizes)
    aside = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        try:
            runner = (_write_onnx if format == "onnx" else _write_archive)(program, head, batches[0], aside, metadata)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror or error}); give another place") from None
        worst = max(_difference(head, runner, batch, out) for batch in batches)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return f"{chosen.short}: differs from PyTorch by {worst:.1e} at most, on {source} in {len(batches)} batches"


def _with_root(config: RunConfig, root: str) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))


def _task(config: RunConfig, name: str | None) -> Task:
    known = {get_task(n).short: get_task(n) for n in config.model.tasks}
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    found = next((task for task in known.values() if name in (task.short, task.name)), None)
    if found is None:
        raise UserError(f"--task {name or 'NAME'}: the file has one task; {nearest(name or '', known)}")
    return found


def _check_sizes(task: Task, config: RunConfig, sizes: Sizes) -> None:
    if sizes.batch is not None and sizes.batch < 1:
        raise UserError(f"--batch {sizes.batch}: give at least 1")
    if sizes.image is not None:
        if not task.has_image:
            raise UserError(f"--size: {task.short} has no image; leave it out")
        if min(sizes.image) < config.model.backbone.stride:
            raise UserError(f"--size: give at least {config.model.backbone.stride} pixels a side")
    if sizes.tokens is not None:
        longest = config.model.text.max_positions
        if not task.has_text:
            raise UserError(f"--tokens: {task.short} has no text; leave it out")
        if not 2 <= sizes.tokens <= longest:
            raise UserError(f"--tokens {sizes.tokens}: give 2 to {longest} (model.text.max_positions)")


def describe(head: TaskHead, task: Task, config: RunConfig, sizes: Sizes, folder: Path | None) -> dict:
    """What a program must know to use the file: inputs, outputs, preprocessing, names of classes."""
    found = {"task": task.short, "dataset": task.name, "inputs": head.inputs, "outputs": head.outputs}
    if task.has_image:
        found["image"] = {
            "pixels": "RGB, divided by 255, minus mean, divided by std", "mean": list(MEAN), "std": list(STD),
            "short_side": config.data.short_side, "max_side": config.data.max_side,
            "resize": "bilinear with anti-aliasing to the short side, the long side at most max_side",
            "size": sizes.image,
        }  # fmt: skip
    if task.has_text:
        found["text"] = {
            "word_pieces": "BERT's: lower case, [CLS] first text [SEP] second text [SEP]",
            "longest": sizes.tokens or config.model.tasks[task.name].text_length,
        }
        if folder is not None and (folder / VOCABULARY).is_file():
            found["text"]["vocabulary"] = (folder / VOCABULARY).read_text(encoding="utf-8").splitlines()
    labels = read_json(folder / LABELS).get(task.name) if folder is not None else None
    if labels is None:
        _log.warning("%s: no %s with the run: the file does not name its outputs", task.short, LABELS)
    return found | {"labels": labels}


def _program(head: TaskHead, example, task: Task, config: RunConfig, sizes: Sizes) -> ExportedProgram:
    batch = Dim("batch", min=1) if sizes.batch is None else None
    side = Dim.DYNAMIC if sizes.image is None else None
    any_text = task.has_text and sizes.tokens is None
    tokens = Dim("tokens", min=2, max=config.model.text.max_positions) if any_text else None
    free = {"image": {0: batch, 2: side, 3: side}, "pixel_mask": {0: batch, 1: side, 2: side}}
    shapes = tuple(free.get(name, {0: batch, 1: tokens}) for name in head.inputs)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(head, example, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # the exporter's are of many kinds
        first = " ".join(str(error).split())[:400]
        raise UserError(
            f"{task.short}: cannot be exported ({first}); fix the sizes with --batch, --size, --tokens"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn a lot of what they do."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def _write_archive(program: ExportedProgram, head: TaskHead, example, path: Path, metadata: str) -> Run:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: metadata})
    with path.open("rb") as file, _quiet():
        module = torch.export.load(file).module()
    return lambda inputs: module(*inputs)


def _write_onnx(program: ExportedProgram, head: TaskHead, example, path: Path, metadata: str) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"format onnx needs the package {error.name}; pip install onnx onnxscript onnxruntime"
        ) from None
    with _quiet():
        made = torch.onnx.export(
            program, example, dynamo=True, verbose=False, external_data=False, input_names=list(head.inputs),
            output_names=list(head.outputs),
        )  # fmt: skip
    made.model.metadata_props[METADATA] = metadata
    made.save(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        named = {name: value.numpy() for name, value in zip(head.inputs, inputs)}
        return tuple(map(torch.from_numpy, session.run(list(head.outputs), named)))

    return run


def _difference(head: TaskHead, run: Run, inputs: tuple[Tensor, ...], out: Path) -> float:
    """The largest difference from PyTorch, by the largest number; ``UserError`` where it is too large."""
    with torch.no_grad():
        expected = head(*inputs)
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    try:
        found = run(inputs)
    except Exception as error:  # the runtime's are of many kinds
        raise UserError(f"{out}: not written: it does not run on inputs {shapes} ({str(error)[:300]})") from error
    same_class = None
    worst = 0.0
    for name, ours, theirs in zip(head.outputs, expected, found):
        if name == "logits":
            same_class = ours[..., :-1].argmax(-1) == theirs[..., :-1].argmax(-1)
        if name == "attribute_logits":  # given the most likely class: another where two are equally likely
            ours, theirs = ours[same_class], theirs[same_class]
        if ours.numel():
            scale = max(1.0, ours.abs().max().item())
            worst = max(worst, (ours - theirs).abs().max().item() / scale)
        if not worst <= TOLERANCE:
            raise UserError(f"{out}: not written: {name} differs from PyTorch by {worst:.1e} on inputs {shapes}")
    return worst
