"""``unit-fast predict``."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from unit_fast.commands.shown import errors_as_json, take_threads
from unit_fast.config import RunConfig
from unit_fast.errors import UserError, printable

COMMON = ("task", "image", "text", "texts", "threshold", "save", "json", "coco", "device")
"""What most people need."""


@dataclass(kw_only=True)
class Options:
    """What a trained model says about images and/or texts."""

    run: tyro.conf.Positional[str]
    """Run folder, checkpoint folder or model.safetensors."""
    task: str
    """coco, vg, vqa2, snli_ve, qnli, mnli, qqp, sst2, or a task of one's own: detect, answer, entail, classify."""
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
    """CPU threads; 0 takes OMP_NUM_THREADS, else the cores that are free."""
    json: bool = False
    """Print JSON, also of an error."""


def run(options: Options) -> int:
    with errors_as_json(options.json):
        return _predict(options)


def _predict(options: Options) -> int:
    from unit_fast.evaluation.labels import TaskLabels
    from unit_fast.prediction.files import Pictures, read_image_ids
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
    take_threads(options.device, options.threads)
    model = load(options.run, device=device_of(RunConfig(device=options.device)), ema=options.ema)
    text = _text(options, task, model.labels.get(task.name, TaskLabels()))
    image = options.image[0] if len(options.image) == 1 else list(options.image) or None
    found = model.stream(
        options.task, image, text, threshold=options.threshold, top=options.top, batch_size=options.batch
    )
    several = not found.single
    pictures = Pictures(options.save) if options.save and several and not options.save.endswith(".json") else None
    answers = _shown(options, found, pictures)
    if options.threshold is None and task.name in model.thresholds and not options.json:
        chosen = model.threshold(options.task)
        print(f"unit-fast: boxes of at least {chosen:.3g}, as the run chose on its validation split", file=sys.stderr)
    for path in _written(options, answers if several else answers[0], pictures, ids):
        print(f"written: {path}", file=sys.stderr)
    likeliest = [answer.likeliest for answer in answers if answer.likeliest is not None]
    if likeliest and not any(answer.items for answer in answers) and not options.json:
        print(f"unit-fast: the likeliest box has {max(likeliest):.3g}; a lower --threshold shows it", file=sys.stderr)
    failed = sum(answer.error is not None for answer in answers)
    if failed:
        print(f"unit-fast: {failed} of {len(answers)} have no answer, see above", file=sys.stderr)
    return int(failed > 0)


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


def _shown(options: Options, found, pictures) -> list:
    """The predictions, each shown and drawn as it comes."""
    from unit_fast.data.progress import progress_bar

    answers, output = [], sys.stdout
    bar = not found.single and (options.json or not output.isatty()) and sys.stderr.isatty()
    with progress_bar("predict", len(found), bar, stderr=True) as advance:
        for number, answer in enumerate(found, 1):
            answers.append(answer)
            if not options.json:
                if not found.single:
                    named = printable(answer.name or _short(answer.text), 200)
                    print(f"[{number}/{len(found)}] {named}", file=output)
                print(answer, file=output)
            if pictures is not None and answer.error is None:
                pictures.add(answer, number)
            advance(1)
    if options.json:
        values = [answer.to_dict() for answer in answers]
        print(json.dumps(values[0] if found.single else values, indent=2, allow_nan=False))
    return answers


def _written(options: Options, found, pictures, ids) -> list[Path]:
    """What is asked for is written; where."""
    from unit_fast.prediction.files import write_coco, write_json

    written = [pictures.folder] if pictures is not None else []
    if options.save and pictures is None:
        written.append(write_json(found, options.save) if isinstance(found, list) else found.save(options.save))
    if options.json_file:
        written.append(write_json(found, options.json_file))
    if options.coco:
        written.append(write_coco(found, options.coco, ids))
    return written


def _short(text) -> str:
    """A text, or a pair, for a heading."""
    return text if isinstance(text, str) else " | ".join(text)
