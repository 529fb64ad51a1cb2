"""Every setting of a run: one frozen, keyword-only dataclass per component, a docstring under each field. Those of the
model stand in ``model_config``.

A wrong value is refused when the class is made (``checked``). ``to_dict`` and ``to_json`` are the JSON form,
``config_file`` reads a file of it.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from unit_fast.checked import (
    Bounds,
    Checked,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
)
from unit_fast.config_file import read_config_file
from unit_fast.errors import UserError
from unit_fast.model_config import (
    ALL_TASKS,
    BackboneConfig,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    ModelConfig,
    TaskConfig,
    TextConfig,
    default_tasks,
    known_task,
)
from unit_fast.tasks import get_task
from unit_fast.typed_json import from_dict

__all__ = [
    "ALL_TASKS", "BackboneConfig", "BucketConfig", "DataConfig", "DecoderConfig", "EncoderConfig", "LossConfig",
    "ModelConfig", "OptimConfig", "RunConfig", "TaskConfig", "TextConfig", "default_tasks", "from_dict", "load_config",
    "to_dict", "to_json",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class OptimConfig(Checked):
    """AdamW, clipping and schedule (SPEC 3)."""

    place = "optim"

    lr: NonNegativeFloat = 5e-5
    """Base learning rate."""
    lr_backbone: NonNegativeFloat = 1e-5
    """Base learning rate of the backbone; 0 freezes it."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: NonNegativeFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 1e-4
    """On every parameter."""
    rule: Literal["hf", "torch"] = "hf"
    """Where eps and decay stand: as in Hugging Face's AdamW (the authors') or torch's."""
    unused: Literal["skip", "graph", "update_all"] = "skip"
    """What happens to parameters that take no part in a step (SPEC 3.5)."""
    max_norm: PositiveFloat | None = 0.1
    """Clip the gradient norm here; None does not clip."""
    warmup_steps: NonNegativeInt = 2000
    """Linear warm-up from 0; step 0 runs with learning rate 0."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataConfig(Checked):
    """Where the data sets are and how samples are made (SPEC 4)."""

    place = "data"

    root: str | None = None
    """Data root in the canonical layout; see ``unit-fast data check``."""
    paths: dict[str, str] = field(default_factory=dict)
    """Overrides of single paths, e.g. ``coco.train_images=/other/train2017``; a wrong key is answered
    with the nearest ones."""
    vocab: str | None = None
    """WordPiece vocabulary; default ROOT/bert/vocab.txt."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of your own tables without a usual name: role, or task and role -> column, e.g. ``text=review`` or
    ``answer.image=photo``."""
    answer_min_count: PositiveInt = 1
    """Answers of your own questions that are given to fewer training questions are left out of the list."""
    answers_kept: PositiveInt = 3128
    """Answers of your own questions that are kept at most, the most frequent ones."""
    short_side: PositiveInt = 800
    """Short side of validation, VQA and SNLI-VE images, pixels."""
    max_side: PositiveInt = 1333
    """Longest side, pixels."""
    train_short_sides: tuple[PositiveInt, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Random short sides of detection training images, pixels."""
    crop_short_sides: tuple[PositiveInt, ...] = (400, 500, 600)
    """Random short sides before the random crop, pixels."""
    crop_min: PositiveInt = 384
    """Smallest crop side, pixels."""
    crop_max: PositiveInt = 600
    """Largest crop side, pixels."""
    flip: bool = True
    """Random horizontal flip of detection training images."""
    augment: bool = True
    """Detection training transforms; without it validation's resize is used."""
    pad_text: bool = False
    """Pad text to the full length, as the authors do, instead of to the longest of the batch."""
    engine: Literal["auto", "dali", "torchvision"] = "auto"
    """What reads images: DALI, or torchvision's way (the reference; on a GPU torchvision decodes and the GPU does the
    rest); auto takes DALI where it is installed and ``cache_mib`` is 0. An evaluation on a CPU always has the
    reference's pixels."""
    dali_graph: Literal["decode", "whole"] = "decode"
    """How much DALI does: decode, and resize, flip, normalise and pad are ours; or all of it."""
    decoder: Literal["cpu", "mixed"] = "cpu"
    """Where DALI decodes; mixed uses the GPU too."""
    workers: NonNegativeInt = 0
    """With DALI or on a GPU the threads that decode, 0 is ``threads`` and at most 8. Else loader processes, and 0 loads
    in the training process."""
    prefetch: PositiveInt = 2
    """Steps ready ahead, for torchvision's engine per worker."""
    group: PositiveInt = 16
    """Batches whose samples are sorted by size together, so that they pad less; 1 leaves the order as drawn. Every
    sample is still read once a pass."""
    cache_mib: NonNegativeInt = 0
    """Decoded images kept in memory, MiB: with DALI or on a GPU of the whole run, else of each data set in each loading
    process, where a file that changes meanwhile is not read again. Not with dali_graph whole or decoder mixed."""
    cache_dir: str | None = None
    """Folder where parsed annotations and tokenised texts of large data sets are kept, outside the data root; default
    $XDG_CACHE_HOME/unit_fast or ~/.cache/unit_fast. An empty text keeps nothing."""
    max_pixels: PositiveInt = 50_000_000
    """Images with more pixels are refused before decoding."""
    max_bad_share: Share = 0.01
    """The run fails when a larger share of the images read was unreadable, by more than chance explains."""

    def check_together(self):
        if self.max_side < self.short_side:
            self.refuse("max_side", f"at least data.short_side = {self.short_side}")
        if self.crop_max < self.crop_min:
            self.refuse("crop_max", f"at least data.crop_min = {self.crop_min}")
        for name in ("train_short_sides", "crop_short_sides"):
            if not getattr(self, name):
                self.refuse(name, "at least one length in pixels")


@dataclass(frozen=True, kw_only=True, repr=False)
class BucketConfig(Checked):
    """Static shapes that batches are padded to where whole steps are captured (``buckets.Buckets``)."""

    place = "buckets"

    heights: PositiveInt = 2
    """Short sides of image buckets, evenly down from the longest one."""
    widths: PositiveInt = 3
    """Long sides for each short side, in both orientations. More of either pad less and capture more graphs."""
    least_text: PositiveInt = 16
    """Shortest text bucket, tokens; each next one is twice as long, without an image also half as much again."""
    least_targets: PositiveInt = 32
    """Fewest places for objects; each next bucket has twice as many."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RunConfig(Checked):
    """A whole run: what ``config.json`` of a run folder holds."""

    recipe: str = ""
    """The recipe this came from, by name; `unit-fast recipes` lists them."""
    steps: PositiveInt = 500_000
    """Optimiser updates."""
    batch_per_process: NonNegativeInt = 1
    """Samples per forward pass; 0 with a ``target_batch``: chosen from the device's memory."""
    task_batch: dict[str, PositiveInt] = field(default_factory=dict)
    """Other batch sizes for single tasks (data set key -> samples)."""
    accumulate: NonNegativeInt = 1
    """Forward passes per update; 0 with a ``target_batch``: as many as reach it."""
    target_batch: NonNegativeInt = 0
    """Samples per update that batch and accumulate make where one of them is 0; 0 leaves both as they are."""
    seed: Annotated[int, Bounds("a number of 64 bits", least=-(2**63), most=2**63 - 1)] = 0
    """Initial weights, task order, data order, augmentation and dropout follow from it."""
    ratios: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Sampling probability by data set key, renormalised over the tasks trained."""
    eval_every: Annotated[int, Bounds("at least -1", least=-1)] = 10_000
    """Steps between evaluations; 0 evaluates only at the end, -1 never."""
    eval_first: bool = False
    """Evaluate before the first step too."""
    early_stop: NonNegativeInt = 0
    """End after so many evaluations in a row without a better ``criterion``; 0 trains all ``steps``."""
    eval_batch: PositiveInt = 1
    """Samples per evaluation batch."""
    eval_limit: NonNegativeInt = 0
    """Evaluate at most this many samples per task; 0 takes all."""
    eval_split: Literal["val", "train"] = "val"
    """Split to evaluate on."""
    save_every: NonNegativeInt = 10_000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: PositiveInt = 5
    """Numbered checkpoints kept beside best and last."""
    log_every: PositiveInt = 20
    """Steps between log lines; losses are read from the device only then."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers that get the rows of ``metrics.jsonl`` too."""
    criterion: str = "vqa2"
    """Task whose metric chooses the best checkpoint; ``mean`` takes the mean over tasks."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on a CPU. fp32 is single precision everywhere; tf32 (CUDA) rounds the inputs of
    products and convolutions to TF32."""
    deterministic: Literal["auto", "on", "off"] = "auto"
    """on: two runs on one kind of card give the same bits, and so does a resumed one. auto: on a CPU they always do (at
    one number of threads); on CUDA cuDNN chooses, and gradients of convolutions may differ in their last bits."""
    device: str = "auto"
    """auto takes CUDA where there is one."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Whole steps as CUDA graphs: auto takes them on CUDA, on is an error elsewhere, off runs every step eagerly."""
    buckets: BucketConfig = field(default_factory=BucketConfig)
    """Shapes that captured steps are made for."""
    threads: NonNegativeInt = 0
    """CPU threads; 0 takes OMP_NUM_THREADS, else the cores (the commands: those that are free). The number used is
    recorded: results depend on it."""
    ema_decay: Probability = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    freeze: tuple[Literal["image", "text"], ...] = ()
    """``image`` and/or ``text``: encoders that are not trained (Table C.1 rows 10 to 12)."""
    skip_load: tuple[str, ...] = ()
    """Name prefixes that ``init_from`` leaves at their initial values."""
    weights: str | None = None
    """Folder of pretrained weights; default ROOT/pretrained."""
    require_weights: bool = False
    """A missing pretrained file is an error instead of a warning."""
    init_from: str | None = None
    """Run folder or checkpoint whose matching weights are loaded (weights only)."""
    started_from: dict[str, str] = field(default_factory=dict)
    """Written by training: part of the model -> the weights it started from, ``random`` where there were none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data sets and transforms."""

    def check_together(self):
        for name in ("batch_per_process", "accumulate"):
            if not getattr(self, name) and not self.target_batch:
                self.refuse(name, "at least 1, or a target_batch that it follows from")
        if self.early_stop and self.eval_every < 1:
            self.refuse("early_stop", f"0, or an eval_every of at least 1 (it is {self.eval_every})")
        if self.eval_first and self.eval_every < 0:
            self.refuse("eval_first", f"False, or an eval_every of at least 0 (it is {self.eval_every})")
        for name in (*self.ratios, *self.task_batch):
            known_task("ratios" if name in self.ratios else "task_batch", name)
        if self.ratios and not sum(self.ratios.values()):
            self.refuse("ratios", "a positive one: no task would be trained")
        if self.criterion != "mean":
            try:
                get_task(self.criterion)
            except UserError as error:
                raise UserError(f"criterion: {error}, or mean") from None

    @property
    def effective_batch(self) -> int:
        """Samples per update."""
        return self.batch_per_process * self.accumulate or self.target_batch

    def batch_of(self, task: str) -> int:
        """Samples per forward pass of the data set ``task``."""
        return self.task_batch.get(task, self.batch_per_process)


def to_dict(config) -> dict:
    """Plain dict of a config dataclass, ready for JSON. Classes are there where a task has its own."""
    own = ("classes", "class_ids")
    return dataclasses.asdict(config, dict_factory=lambda pairs: {k: v for k, v in pairs if v or k not in own})


def to_json(config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def load_config(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a JSON, YAML or TOML file; what it leaves out is as in ``base`` or the default.

    ``UserError`` names the file and the key.
    """
    return from_dict(RunConfig, read_config_file(path), str(path), base)
