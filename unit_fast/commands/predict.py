"""``unit-fast predict``."""

import json
import sys
from dataclasses import dataclass

import tyro

from unit_fast.commands.shown import errors_as_json
from unit_fast.config import RunConfig


@dataclass(kw_only=True)
class Options:
    """What a trained model says about one image and/or text."""

    run: tyro.conf.Positional[str]
    """Run folder, checkpoint folder or model.safetensors."""
    task: str
    """coco, vg, vqa2, snli_ve, qnli, mnli, qqp or sst2."""
    image: str | None = None
    """A JPEG or PNG file."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The question or sentence; give it twice, or --text-b, for pairs."""
    text_b: str | None = None
    """The second sentence of a pair."""
    threshold: float = 0.5
    """Least score of a box."""
    top: int = 5
    """Answers or classes shown."""
    save: str | None = None
    """Write a picture (.png, .jpg) or the values (.json)."""
    ema: bool = False
    """Take the averaged weights."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    json: bool = False
    """Print JSON, also of an error."""


def run(options: Options) -> int:
    with errors_as_json(options.json):
        return _predict(options)


def _predict(options: Options) -> int:
    from unit_fast.prediction.predictor import load
    from unit_fast.run.setup import device_of

    texts = options.text + ((options.text_b,) if options.text_b is not None else ())
    model = load(options.run, device=device_of(RunConfig(device=options.device)), ema=options.ema)
    found = model.predict(
        options.task, options.image, (texts[0] if len(texts) == 1 else texts) or None,
        threshold=options.threshold, top=options.top,
    )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if options.json else found)
    if options.save:
        print(f"written: {found.save(options.save)}", file=sys.stderr)
    return 0
