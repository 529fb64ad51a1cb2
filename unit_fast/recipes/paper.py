"""The runs of the paper's tables, and the published ones beside them, a row each (SPEC 6).

Every published run had one image on each of 64 processes. Here they have 64 samples an update too, in as large batches
as the device's memory holds: ``target_batch``.
"""

from dataclasses import dataclass

from unit_fast.config import (
    ALL_TASKS,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    default_tasks,
)
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import get_task

PAPER_BATCH = 64
"""Samples per update of every published run."""

SAMPLINGS = {
    "detection_vqa": {"coco": 0.33, "vg": 0.33, "vqa2": 0.33},
    "all8": {
        "coco": 0.20, "vg": 0.07, "vqa2": 0.26, "snli_ve": 0.12, "qnli": 0.10, "mnli": 0.10, "qqp": 0.10, "sst2": 0.05,
    },
    "ablation": {"coco": 0.30, "snli_ve": 0.50, "mnli": 0.20},
}  # fmt: skip
"""Table A.2: sampling probability by task."""


def sampling(name: str) -> dict[str, float]:
    """Row ``name`` of Table A.2 by data set key."""
    if name not in SAMPLINGS:
        raise UserError(f"unknown sampling {name!r}; {nearest(name, SAMPLINGS)}")
    return {get_task(task).name: ratio for task, ratio in SAMPLINGS[name].items()}


@dataclass(frozen=True)
class Row:
    """What one run differs from the others in: Table A.1 is the defaults of the config classes."""

    about: str
    """One line for the list of recipes."""
    tasks: str
    """Short names."""
    steps: int
    share: bool = True
    """One decoder for all tasks. A single task has its decoder for itself, as the authors' single-task files say."""
    unused: str = "update_all"
    """``OptimConfig.unused``."""
    criterion: str = "vqa2"
    sampling: str | None = None
    """Row of Table A.2; None draws the tasks equally often."""
    task_embedding: bool = True

    def config(self) -> RunConfig:
        """The whole configuration."""
        tasks = default_tasks(*self.tasks.split())
        return RunConfig(
            steps=self.steps,
            batch_per_process=0,
            accumulate=0,
            target_batch=PAPER_BATCH,
            # Written out also where they are equal: the published 2- and 3-task files had none (SPEC quirk 23).
            ratios=sampling(self.sampling) if self.sampling else dict.fromkeys(tasks, 1 / len(tasks)),
            criterion=self.criterion,
            model=ModelConfig(
                encoder=EncoderConfig(task_embedding=self.task_embedding),
                text=TextConfig(task_embedding=self.task_embedding),
                decoder=DecoderConfig(share=self.share),
                tasks=tasks,
            ),
            optim=OptimConfig(unused=self.unused),
        )


def _all8(about: str, **changes) -> Row:
    return Row(about, " ".join(ALL_TASKS), 500_000, sampling="all8", **changes)


def _single(task: str, about: str, **changes) -> Row:
    return Row(about, task, 150_000, share=False, criterion=task, **changes)


_ALONE = "alone (Table 3 line 1; the number of steps is not published)."

ROWS: dict[str, Row] = {
    # Eight tasks (Table 3).
    "all8_shared": _all8(
        "Eight tasks, one decoder, unused parameters updated as published (Table 3 line 3; with --init-from line 5)."
    ),
    "all8_shared_skip": _all8(
        "As all8_shared, but parameters that take no part in a step are left alone.", unused="skip"
    ),
    "all8_separate": _all8("Eight tasks, a decoder each (Table 3 line 2; with --init-from line 4).", share=False),
    "all8_shared_no_task_embedding": _all8(
        "As all8_shared without task embeddings in the encoders (MMF's published ablation).", task_embedding=False
    ),
    # Single tasks (Tables 1 and 3).
    "coco": _single(
        "coco", "COCO detection alone (Table 1 line 1); its weights are the COCO initialisation of others."
    ),
    "coco_no_task_embedding": _single("coco", "As coco without task embeddings in the encoders.", task_embedding=False),
    "vg": _single("vg", "Visual Genome detection with attributes alone (Table 1 line 1)."),
    "vqa2": _single("vqa2", "VQAv2 alone (Table 1 line 1)."),
    "snli_ve": _single("snli_ve", f"SNLI-VE {_ALONE}"),
    "qnli": _single("qnli", f"QNLI {_ALONE}"),
    "mnli": _single("mnli", f"MNLI {_ALONE}"),
    "qqp": _single("qqp", f"QQP {_ALONE}"),
    "sst2": _single("sst2", f"SST-2 {_ALONE}"),
    # Detection and VQA (Table 2).
    "coco_vqa2": Row("COCO and VQAv2, one decoder (Table 2 line 2).", "coco vqa2", 300_000, unused="skip"),
    "coco_vqa2_separate": Row("COCO and VQAv2, a decoder each.", "coco vqa2", 300_000, share=False),
    "vg_vqa2": Row("Visual Genome and VQAv2, one decoder (Table 2 line 3).", "vg vqa2", 300_000, unused="skip"),
    "vg_vqa2_separate": Row("Visual Genome and VQAv2, a decoder each.", "vg vqa2", 300_000, share=False),
    "coco_vg_vqa2": Row(
        "COCO, Visual Genome and VQAv2, one decoder (Table 2 line 4).", "coco vg vqa2", 450_000, unused="skip",
        sampling="detection_vqa",
    ),
    "coco_vg_vqa2_separate": Row(
        "COCO, Visual Genome and VQAv2, a decoder each.", "coco vg vqa2", 450_000, share=False,
        sampling="detection_vqa",
    ),
    # Ablations (Table C.1). The optimiser of these runs is not published: as for the eight tasks. Nor is the criterion:
    # COCO leads the table.
    "ablation": Row(
        "COCO, SNLI-VE and MNLI, one decoder: row 1 of Table C.1; other rows change one field.", "coco snli_ve mnli",
        500_000, criterion="coco", sampling="ablation",
    ),
}  # fmt: skip
