"""Every setting of a run: one frozen, keyword-only dataclass per component, a docstring under each field.

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
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import OWN, TASKS, Task, get_task
from unit_fast.typed_json import from_dict


@dataclass(frozen=True, kw_only=True, repr=False)
class BackboneConfig(Checked):
    """Convolutional backbone (SPEC 1.3). The defaults are ResNet-50-DC5 with frozen batch norm."""

    place = "model.backbone"

    depth: Literal[14, 18, 26, 34, 50, 101] = 50
    """Layers of the residual net: 18 and 34 use basic blocks, 14, 26, 50 and 101 bottlenecks."""
    width: PositiveInt = 64
    """Channels of the stem; the last stage has 32 times as many (bottleneck) or 8 times (basic)."""
    norm: Literal["frozen", "group"] = "frozen"
    """``frozen``: batch norm with constant statistics, for pretrained weights. ``group``: for training from scratch."""
    group_channels: PositiveInt = 4
    """Fewest channels of a group of ``group`` norm, which has at most 32 groups. The fewer, the more of what is the
    same all over an image is taken away."""
    norm_eps: NonNegativeFloat = 1e-5
    """Epsilon of the normalisation; 0 imitates the authors' release stack (SPEC quirk 26)."""
    stride: Literal[8, 16, 32] = 16
    """Pixels per feature cell. 16 is DC5: stage 4 dilated instead of strided."""
    first_trained_stage: Annotated[int, Bounds("0 (all) to 5 (none)", least=0, most=5)] = 2
    """Stages below stay at their initial weights; 0 trains the stem too."""

    def check_together(self):
        if self.depth in (18, 34) and self.stride != 32:
            self.refuse("stride", f"32: depth {self.depth} has basic blocks, which cannot be dilated")

    @property
    def out_channels(self) -> int:
        return self.width * (8 if self.depth in (18, 34) else 32)


@dataclass(frozen=True, kw_only=True, repr=False)
class EncoderConfig(Checked):
    """Image encoder (SPEC 1.5)."""

    place = "model.encoder"

    width: PositiveInt = 256
    """Model width C."""
    layers: PositiveInt = 6
    """Number of layers."""
    heads: PositiveInt = 8
    """Attention heads."""
    ffn_width: PositiveInt = 2048
    """Hidden width of the feed-forward net."""
    dropout: Probability = 0.1
    """Probability at every dropout place."""
    residual: bool = True
    """Add the projected input to the encoder's output (``residual_in_encoder``)."""
    task_embedding: bool = True
    """Prepend a learned task token."""

    def check_together(self):
        if self.width % 4:
            self.refuse("width", "a multiple of 4: sines and cosines of two coordinates (SPEC 1.4)")
        _check_heads(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class TextConfig(Checked):
    """BERT text encoder (SPEC 1.6). The defaults are bert-base-uncased."""

    place = "model.text"

    width: PositiveInt = 768
    """Hidden size."""
    layers: PositiveInt = 12
    """Number of layers."""
    heads: PositiveInt = 12
    """Attention heads."""
    ffn_width: PositiveInt = 3072
    """Hidden width of the feed-forward net."""
    vocab_size: NonNegativeInt = 30522
    """Word pieces in the vocabulary. 0: as many as the vocabulary file has, or as are made of the user's texts; a run
    writes the number into its configuration."""
    max_positions: PositiveInt = 512
    """Rows of the position table."""
    dropout: Probability = 0.1
    """Probability at every dropout place."""
    task_embedding: bool = True
    """Prepend a learned task token after the embedding block."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights: BERT's for BERT's width. A narrow encoder trained from nothing needs
    more, about 1 / sqrt(width), or its attention stays uniform for hundreds of steps."""

    def check_together(self):
        _check_heads(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class DecoderConfig(Checked):
    """Decoder (SPEC 1.8) and the classifier behind it (SPEC 1.9)."""

    place = "model.decoder"

    width: PositiveInt = 768
    """Model width D."""
    layers: PositiveInt = 6
    """Number of layers L."""
    heads: PositiveInt = 8
    """Attention heads."""
    ffn_width: PositiveInt = 2048
    """Hidden width of the feed-forward net."""
    dropout: Probability = 0.1
    """Probability at every dropout place of the decoder layers."""
    classifier_dropout: Probability = 0.1
    """Probability on the pooled query of the classification heads."""
    share: bool = True
    """One decoder for all data sets; otherwise one each."""
    separate_init: Literal["reference", "xavier"] = "reference"
    """Initialisation of separate decoders: the authors' (all layers start equal) or xavier as for a shared one."""

    def check_together(self):
        _check_heads(self)


def _check_heads(config) -> None:
    if config.width % config.heads:
        config.refuse("heads", f"a divisor of {config.dotted('width')} = {config.width}")


@dataclass(frozen=True, kw_only=True, repr=False)
class LossConfig(Checked):
    """Matching costs and loss weights (SPEC 2)."""

    place = "model.loss"

    cost_class: NonNegativeFloat = 1.0
    """Weight of the class probability in the matching cost."""
    cost_bbox: NonNegativeFloat = 5.0
    """Weight of the L1 distance in the matching cost."""
    cost_giou: NonNegativeFloat = 2.0
    """Weight of the generalised IoU in the matching cost."""
    weight_bbox: NonNegativeFloat = 5.0
    """Weight of loss_bbox."""
    weight_giou: NonNegativeFloat = 2.0
    """Weight of loss_giou."""
    weight_attr: NonNegativeFloat = 1.0
    """Weight of loss_attr (Visual Genome)."""
    no_object_weight: NonNegativeFloat = 0.1
    """Class weight of the no-object class."""
    detection_loss_weight: NonNegativeFloat = 1.0
    """Factor on all detection terms."""
    auxiliary: bool = True
    """Losses on every decoder layer, not only the last."""
    ce_normalisation: Literal["per_image", "per_process"] = "per_image"
    """Whether loss_ce and loss_attr are means per image, then over images (the published runs had one image a
    process), or one mean over the process's batch."""
    balanced_class_loss: bool = False
    """The authors' ``use_bcl``: positives and negatives weighted apart; not defined together with attributes."""
    on_all_hidden_states: bool = False
    """Classification losses on every decoder layer (``loss_on_all_hs``)."""
    attribute_relu: bool = True
    """ReLU on attribute logits, as the authors have it (SPEC quirk 3)."""
    attribute_outputs: PositiveInt = 401
    """Attribute logits."""
    max_attributes: PositiveInt = 16
    """Attributes of one object that count."""
    attribute_embedding: PositiveInt = 256
    """Width of the attribute head's class table."""
    attribute_hidden: PositiveInt = 512
    """Hidden width of the attribute head."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskConfig(Checked):
    """What a model has for one data set."""

    place = "model.tasks.*"

    queries: PositiveInt
    """Rows of the query table."""
    outputs: NonNegativeInt
    """Logits; for detection the last is no-object. 0: as many as the data have classes; a run writes the number into
    its configuration."""
    text_length: NonNegativeInt = 0
    """Longest text in word pieces, special tokens included, at most ``TextConfig.max_positions``; 0 without text."""
    cls_only: bool = False
    """Only ``[CLS]`` reaches the decoder."""
    classes: tuple[str, ...] = ()
    """Names of the outputs in their order, where they come from the data. Empty: detection numbers classes by the
    published category ids, other tasks have the published labels. A file's classes are found by their names."""
    class_ids: tuple[int, ...] = ()
    """Detection: the category id of each of ``classes`` in the files that were trained on."""

    def check_together(self):
        if self.cls_only and not self.text_length:
            self.refuse("cls_only", "False, or a text_length: without text there is no [CLS]")
        if self.class_ids and len(self.class_ids) != len(self.classes):
            self.refuse("class_ids", f"one for each of the {len(self.classes)} classes")


def default_tasks(*names: str, **changes) -> dict[str, TaskConfig]:
    """``TaskConfig`` of each named task with the published numbers (SPEC 1.1), ``changes`` applied to all."""
    out = {}
    for task in map(get_task, names):
        settings = {k: getattr(task, k) for k in ("queries", "outputs", "text_length", "cls_only")}
        out[task.name] = TaskConfig(**{**settings, **changes})
    return out


ALL_TASKS = ("coco", "vg", "vqa2", "snli_ve", "qnli", "mnli", "qqp", "sst2")


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelConfig(Checked):
    """The whole UniT model. The defaults are the published 8-dataset model with a shared decoder."""

    place = "model"

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Convolutional backbone."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Image encoder."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Decoder and classifier."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Matching costs and loss weights."""
    tasks: dict[str, TaskConfig] = field(default_factory=lambda: default_tasks(*ALL_TASKS))
    """Data set key -> what the model has for it; the order is the authors' registration order."""

    def check_together(self):
        if not self.tasks:
            raise UserError(f"model.tasks: names no task; known: {', '.join(TASKS | OWN)}")
        for name, settings in self.tasks.items():
            task, where = _known_task("model.tasks", name), f"model.tasks.{name}"
            if task.is_detection and settings.outputs == 1:
                raise UserError(f"{where}.outputs: is {settings.outputs}; give the classes and one more, no object")
            if settings.classes and 0 < settings.outputs < len(settings.classes) + task.is_detection:
                least = len(settings.classes) + task.is_detection
                raise UserError(
                    f"{where}.outputs: is {settings.outputs}; give 0 or at least {least}, as for its classes"
                )
            if task.attributes and self.loss.balanced_class_loss:
                self.loss.refuse("balanced_class_loss", f"False: it is not defined with the attributes of {name}")
            if task.has_text and settings.text_length < 3:
                found = settings.text_length
                raise UserError(f"{where}.text_length: is {found}; give at least 3, a word piece and two special ones")
        longest = self.text.max_positions
        if any(settings.text_length > longest for settings in self.tasks.values()):
            tasks = {
                name: dataclasses.replace(settings, text_length=min(settings.text_length, longest))
                for name, settings in self.tasks.items()
            }
            object.__setattr__(self, "tasks", tasks)  # frozen


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
            _known_task("ratios" if name in self.ratios else "task_batch", name)
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


def _known_task(field_name: str, name: str) -> Task:
    """The task with the data set key ``name``; not its short name, of which saved files know nothing."""
    known = TASKS | OWN
    if name not in known:
        raise UserError(f"{field_name}: {name!r} is not a data set key; {nearest(name, known)}")
    return known[name]


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
