"""Models that train from the pixels on a CPU: the demo on the generated world, and a small one for real data sets."""

import dataclasses

from unit_fast.config import (
    BackboneConfig,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.recipes.paper import sampling
from unit_fast.recipes.small import LAYER, small_model, small_optim
from unit_fast.tasks import get_task


def small() -> RunConfig:
    """Eight tasks in a small model that trains from the pixels on a CPU: to try real data sets (not in the paper)."""
    return RunConfig(
        steps=800,
        batch_per_process=8,
        ratios=sampling("all8"),
        eval_every=0,
        eval_batch=8,
        save_every=200,
        criterion="mean",
        model=small_model(
            default_tasks("coco", "vg", queries=40) | default_tasks("vqa2", "snli_ve", queries=4)
            | default_tasks("qnli", "mnli", "qqp", "sst2", queries=1),
            TextConfig(layers=2, **LAYER),
        ),
        optim=small_optim(),
        data=DataConfig(
            short_side=160, max_side=213, train_short_sides=(144, 160, 176), crop_short_sides=(160, 192, 224),
            crop_min=128, crop_max=213,
        ),
    )  # fmt: skip


DEMO_SCALE = {"demo": 1.0, "demo_quick": 0.1}
"""Recipe -> size of the world that ``unit-fast demo`` generates for it."""


def demo() -> RunConfig:
    """Eight tasks of the generated world in minutes on two CPU cores (not in the paper)."""
    from unit_fast.data.generated import scene, text, world

    tasks = default_tasks("coco", "vg", queries=8) | default_tasks("vqa2", "snli_ve", queries=4)
    tasks |= default_tasks("qnli", "mnli", "qqp", "sst2", queries=1)
    outputs = {"vqa2": len(text.ANSWERS), "detection_visual_genome": len(world.VG_OBJECT_IDS) + 2}
    tasks = {name: dataclasses.replace(task, outputs=outputs.get(name, task.outputs)) for name, task in tasks.items()}
    return RunConfig(
        steps=3000,
        batch_per_process=32,
        ratios={
            get_task(name).name: ratio
            for name, ratio in {
                "coco": 0.14, "vg": 0.15, "vqa2": 0.29, "snli_ve": 0.17, "qnli": 0.06, "mnli": 0.06, "qqp": 0.10,
                "sst2": 0.03,
            }.items()
        },
        eval_every=750,
        eval_batch=50,
        save_every=0,
        log_every=50,
        criterion="mean",
        # One thread: a second one makes such small operators a fifth faster, on a core that nobody else wants, and ten
        # times slower on another. The second core reads ahead instead.
        threads=1,
        model=ModelConfig(
            backbone=BackboneConfig(
                depth=14, width=8, norm="group", group_channels=16, stride=8, first_trained_stage=0
            ),
            encoder=EncoderConfig(layers=2, **LAYER),
            text=TextConfig(
                layers=2, vocab_size=len(text.VOCABULARY), max_positions=64, init_std=0.1, **LAYER
            ),
            decoder=DecoderConfig(layers=3, classifier_dropout=0.0, **LAYER),
            loss=LossConfig(
                ce_normalisation="per_process", weight_bbox=2.5, weight_giou=1.0,
                attribute_outputs=len(world.VG_ATTRIBUTE_IDS) + 1, attribute_embedding=32, attribute_hidden=64,
            ),
            tasks=tasks,
        ),
        # A looser clip and a shorter memory of the second moment than the paper's: in the runs that led here detection
        # left its first plateau sooner (LOG.md; they were not varied one at a time).
        optim=OptimConfig(
            lr=8e-4, lr_backbone=8e-4, betas=(0.9, 0.99), max_norm=3.0, warmup_steps=100, unused="skip"
        ),
        # All images stay decoded in memory, which leaves DALI nothing to do, and have nearly one size.
        data=DataConfig(
            short_side=scene.SIDE, max_side=scene.SIDE, augment=False, cache_mib=32,
            engine="torchvision", group=1, workers=1,
        ),
    )  # fmt: skip


def demo_quick() -> RunConfig:
    """The demo in about a minute: the same model, fewer steps; it learns little (not in the paper)."""
    return dataclasses.replace(demo(), steps=160, eval_every=40)
