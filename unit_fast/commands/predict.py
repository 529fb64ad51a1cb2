"""``unit-fast predict``."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from unit_fast.commands.shown import errors_as_json
from unit_fast.config import RunConfig
from unit_fast.errors import UserError, printable


@dataclass(kw_only=True)
class Options:
    """What a trained model says about images and/or texts."""

    run: tyro.conf.Positional[str]
    """Run folder, checkpoint folder or model.safetensors."""
    task: str
    """coco, vg, vqa2, snli_ve, qnli, mnli, qqp or sst2; of your own data detect, answer, entail or classify."""
    image: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A JPEG or PNG file, a folder of them, or a pattern in quotes ('in/*.jpg'); again for more."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The question or sentence; give it twice, or --text-b, for pairs; again for more of single sentences."""
    text_b: str | None = None
    """The second sentence of a pair."""
    texts: str | None = None
    """A file of questions or sentences, one a line (pairs: a tab between)."""
    threshold: float | None = None
    """Least score of a box; default what the run chose on its validation split, else 0.5."""
    top: int = 5
    """Answers or classes shown."""
    batch: int = 8
    """So many images of one size, or texts, are computed together."""
    save: str | None = None
    """Write a picture (.png, .jpg) or the values (.json); of several a folder of pictures."""
    json_file: str | None = None
    """Write the values (also: --json FILE.json)."""
    coco: str | None = None
    """Write boxes as COCO results."""
    annotations: str | None = None
    """COCO file that gives the images' ids to --coco, by file name."""
    ema: bool = False
    """Take the averaged weights."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 keeps the default."""
    json: bool = False
    """Print JSON, also of an error."""


def run(options: Options) -> int:
    with errors_as_json(options.json):
        return _predict(options)


def _predict(options: Options) -> int:
    import torch

    from unit_fast.evaluation.labels import TaskLabels
    from unit_fast.prediction.files import read_image_ids
    from unit_fast.prediction.predictor import load
    from unit_fast.run.setup import device_of
    from unit_fast.tasks import get_task

    task = get_task(options.task)
    if options.coco and not task.is_detection:
        raise UserError(f"--coco: {task.short} has no boxes; give --json FILE.json")
    if options.annotations and not options.coco:
        raise UserError("--annotations: gives ids to --coco FILE; give that too, or leave it out")
    for name, path in (("--json", options.json_file), ("--coco", options.coco)):
        if path and not Path(path).parent.is_dir():
            raise UserError(f"{name} {printable(path, 400)}: there is no such folder; make it, or give another path")
    ids = read_image_ids(options.annotations) if options.annotations else None
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load(options.run, device=device_of(RunConfig(device=options.device)), ema=options.ema)
    text = _text(options, task, model.labels.get(task.name, TaskLabels()))
    image = options.image[0] if len(options.image) == 1 else list(options.image) or None
    found = model.stream(
        options.task, image, text, threshold=options.threshold, top=options.top, batch_size=options.batch
    )
    if options.threshold is None and task.name in model.thresholds:
        chosen = model.threshold(options.task)
        print(f"unit-fast: boxes of at least {chosen:.3g}, as the run chose on its validation split", file=sys.stderr)
    return _write(options, found, ids)


def _text(options: Options, task, labels):
    """The text, or the list of texts, as ``Predictor.predict`` takes them."""
    from unit_fast.prediction.inputs import is_pair, read_texts

    pair = is_pair(task, labels)
    given = options.text + ((options.text_b,) if options.text_b is not None else ())
    if options.texts is not None:
        if given:
            raise UserError("--texts and --text: give one of them")
        return read_texts(options.texts, pair)
    if pair or len(given) < 2:
        return (given[0] if len(given) == 1 else given) or None
    return list(given)


def _write(options: Options, found, ids) -> int:
    """Show and write the predictions as they come; 1 where some have no answer."""
    from unit_fast.data.progress import progress_bar
    from unit_fast.prediction.files import Pictures, write_coco, write_json

    several, kept, failed = not found.single, [], 0
    pictures = Pictures(options.save) if options.save and several and not options.save.endswith(".json") else None
    output = sys.stdout
    with progress_bar(
        "predict", len(found), several and (options.json or not output.isatty()) and sys.stderr.isatty(), stderr=True
    ) as advance:
        for number, prediction in enumerate(found, 1):
            failed += prediction.error is not None
            if options.json or options.json_file or options.coco or (options.save and pictures is None):
                kept.append(prediction)
            if not options.json:
                if several:
                    named = printable(prediction.name or _short(prediction.text), 200)
                    print(f"[{number}/{len(found)}] {named}", file=output)
                print(prediction, file=output)
            if pictures is not None and prediction.error is None:
                pictures.add(prediction, number)
            advance(1)
    result = kept if several else kept[:1]
    if options.json:
        values = [prediction.to_dict() for prediction in result]
        print(json.dumps(values if several else values[0], indent=2, allow_nan=False))
    written = [pictures.folder] if pictures is not None else []
    if options.save and pictures is None:
        written.append(write_json(result, options.save) if several else result[0].save(options.save))
    if options.json_file:
        written.append(write_json(result if several else result[0], options.json_file))
    if options.coco:
        written.append(write_coco(result, options.coco, ids))
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    if failed:
        print(f"unit-fast: {failed} of {len(found)} have no answer, see above", file=sys.stderr)
    return int(failed > 0)


def _short(text) -> str:
    """A text, or a pair, for a heading."""
    return text if isinstance(text, str) else " | ".join(text)
