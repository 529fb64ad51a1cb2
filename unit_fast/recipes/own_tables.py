"""Models for a user's own questions, statements about images, texts, and a mix of these with boxes.

Answers, classes and vocabulary come from the files: their numbers are 0 until a run begins.
"""

from unit_fast.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.recipes.small import LAYER, small_model, small_optim

_DETECTION = "detect"


def _small(tasks: dict[str, TaskConfig], **changes) -> RunConfig:
    """A model that a CPU trains from nothing."""
    settings = {
        "steps": 3000, "batch_per_process": 16, "eval_every": 500, "eval_batch": 16, "save_every": 500,
        "criterion": "mean",
    }  # fmt: skip
    return RunConfig(
        ratios=dict.fromkeys(tasks, 1 / len(tasks)),
        model=small_model(tasks, TextConfig(layers=2, vocab_size=0, init_std=0.1, **LAYER)),
        optim=small_optim(),
        data=DataConfig(
            short_side=192, max_side=256, train_short_sides=(176, 192, 208), crop_short_sides=(192, 224, 256),
            crop_min=144, crop_max=256,
        ),
        **(settings | changes),
    )  # fmt: skip


def _published(tasks: dict[str, TaskConfig], **changes) -> RunConfig:
    """The published model."""
    settings = {
        "steps": 10_000, "batch_per_process": 4, "accumulate": 4, "eval_every": 1000, "save_every": 1000,
        "criterion": "mean",
    }  # fmt: skip
    return RunConfig(
        ratios=dict.fromkeys(tasks, 1 / len(tasks)),
        model=ModelConfig(text=TextConfig(vocab_size=0), tasks=tasks),
        optim=OptimConfig(warmup_steps=500),
        **(settings | changes),
    )


def answer() -> RunConfig:
    """Your own questions about images (a table) in a small model that a CPU trains from nothing."""
    return _small(default_tasks("answer", queries=4))


def entail() -> RunConfig:
    """Your own labels of images with a text (a table) in a small model that a CPU trains from nothing."""
    return _small(default_tasks("entail", queries=4))


def classify() -> RunConfig:
    """Your own labels of texts or pairs of texts (a table) in a small model that a CPU trains from nothing."""
    return _small(default_tasks("classify", queries=1), steps=1500, batch_per_process=32, eval_batch=64)


def mix() -> RunConfig:
    """Boxes, questions, statements and texts of your own in one small model; choose with --tasks and --ratios."""
    tasks = default_tasks(_DETECTION, queries=40) | default_tasks("answer", "entail", queries=4)
    return _small(tasks | default_tasks("classify", queries=1), steps=8000, batch_per_process=8, eval_batch=8)


def mix_resnet50() -> RunConfig:
    """As mix in the published model (ResNet-50, BERT-base), for --init-from and pretrained weights, or for a GPU."""
    return _published(default_tasks(_DETECTION, "answer", "entail", "classify"), steps=40_000)


def answer_resnet50() -> RunConfig:
    """As answer in the published model (ResNet-50, BERT-base), for --init-from and pretrained weights, or for a GPU."""
    return _published(default_tasks("answer"))


def entail_resnet50() -> RunConfig:
    """As entail in the published model (ResNet-50, BERT-base), for --init-from and pretrained weights, or for a GPU."""
    return _published(default_tasks("entail"))


def classify_bert() -> RunConfig:
    """As classify in the published model (BERT-base), for --init-from and pretrained weights, or for a GPU."""
    return _published(default_tasks("classify"), batch_per_process=16, accumulate=1)
