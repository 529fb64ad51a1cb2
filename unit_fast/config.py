"""Every setting of a run: one frozen, keyword-only dataclass per component, a docstring under each field.

``to_dict`` and ``to_json`` are the JSON form, ``load_config`` reads a file of it.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unit_fast.errors import UserError
from unit_fast.tasks import get_task
from unit_fast.typed_json import from_dict


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Convolutional backbone (SPEC 1.3). The defaults are ResNet-50-DC5 with frozen batch norm."""

    depth: Literal[14, 18, 26, 34, 50, 101] = 50
    """Layers of the residual net: 18 and 34 use basic blocks, 14, 26, 50 and 101 bottlenecks."""
    width: int = 64
    """Channels of the stem; the last stage has 32 times as many (bottleneck) or 8 times (basic)."""
    norm: Literal["frozen", "group"] = "frozen"
    """``frozen``: batch norm with constant statistics, for pretrained weights. ``group``: for training from scratch."""
    group_channels: int = 4
    """Fewest channels of a group of ``group`` norm, which has at most 32 groups. The fewer, the more of what is the
    same all over an image is taken away."""
    norm_eps: float = 1e-5
    """Epsilon of the normalisation; 0 imitates the authors' release stack (SPEC quirk 26)."""
    stride: Literal[8, 16, 32] = 16
    """Pixels per feature cell. 16 is DC5: stage 4 dilated instead of strided."""
    first_trained_stage: int = 2
    """Stages below stay at their initial weights; 0 trains the stem too."""

    @property
    def out_channels(self) -> int:
        return self.width * (8 if self.depth in (18, 34) else 32)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Image encoder (SPEC 1.5)."""

    width: int = 256
    """Model width C."""
    layers: int = 6
    """Number of layers."""
    heads: int = 8
    """Attention heads."""
    ffn_width: int = 2048
    """Hidden width of the feed-forward net."""
    dropout: float = 0.1
    """Probability at every dropout place."""
    residual: bool = True
    """Add the projected input to the encoder's output (``residual_in_encoder``)."""
    task_embedding: bool = True
    """Prepend a learned task token."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """BERT text encoder (SPEC 1.6). The defaults are bert-base-uncased."""

    width: int = 768
    """Hidden size."""
    layers: int = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Hidden width of the feed-forward net."""
    vocab_size: int = 30522
    """Word pieces in the vocabulary."""
    max_positions: int = 512
    """Rows of the position table."""
    dropout: float = 0.1
    """Probability at every dropout place."""
    task_embedding: bool = True
    """Prepend a learned task token after the embedding block."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: BERT's for BERT's width. A narrow encoder trained from nothing needs
    more, about 1 / sqrt(width), or its attention stays uniform for hundreds of steps."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder (SPEC 1.8) and the classifier behind it (SPEC 1.9)."""

    width: int = 768
    """Model width D."""
    layers: int = 6
    """Number of layers L."""
    heads: int = 8
    """Attention heads."""
    ffn_width: int = 2048
    """Hidden width of the feed-forward net."""
    dropout: float = 0.1
    """Probability at every dropout place of the decoder layers."""
    classifier_dropout: float = 0.1
    """Probability on the pooled query of the classification heads."""
    share: bool = True
    """One decoder for all data sets; otherwise one each."""
    separate_init: Literal["reference", "xavier"] = "reference"
    """Initialisation of separate decoders: the authors' (all layers start equal) or xavier as for a shared one."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching costs and loss weights (SPEC 2)."""

    cost_class: float = 1.0
    """Weight of the class probability in the matching cost."""
    cost_bbox: float = 5.0
    """Weight of the L1 distance in the matching cost."""
    cost_giou: float = 2.0
    """Weight of the generalised IoU in the matching cost."""
    weight_bbox: float = 5.0
    """Weight of loss_bbox."""
    weight_giou: float = 2.0
    """Weight of loss_giou."""
    weight_attr: float = 1.0
    """Weight of loss_attr (Visual Genome)."""
    no_object_weight: float = 0.1
    """Class weight of the no-object class."""
    detection_loss_weight: float = 1.0
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
    attribute_outputs: int = 401
    """Attribute logits."""
    max_attributes: int = 16
    """Attributes of one object that count."""
    attribute_embedding: int = 256
    """Width of the attribute head's class table."""
    attribute_hidden: int = 512
    """Hidden width of the attribute head."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a model has for one data set."""

    queries: int
    """Rows of the query table."""
    outputs: int
    """Logits; for detection the last is no-object. 0: as many as the data have classes; a run writes the number into
    its configuration."""
    text_length: int = 0
    """Longest text in word pieces, special tokens included; 0 without text."""
    cls_only: bool = False
    """Only ``[CLS]`` reaches the decoder."""
    classes: tuple[str, ...] = ()
    """Names of the outputs in their order, where they come from the data. Empty: detection numbers classes by the
    published category ids, other tasks have the published labels. A file's classes are found by their names."""
    class_ids: tuple[int, ...] = ()
    """Detection: the category id of each of ``classes`` in the files that were trained on."""


def default_tasks(*names: str, **changes) -> dict[str, TaskConfig]:
    """``TaskConfig`` of each named task with the published numbers (SPEC 1.1), ``changes`` applied to all."""
    out = {}
    for task in map(get_task, names):
        settings = {k: getattr(task, k) for k in ("queries", "outputs", "text_length", "cls_only")}
        out[task.name] = TaskConfig(**{**settings, **changes})
    return out


ALL_TASKS = ("coco", "vg", "vqa2", "snli_ve", "qnli", "mnli", "qqp", "sst2")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole UniT model. The defaults are the published 8-dataset model with a shared decoder."""

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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, clipping and schedule (SPEC 3)."""

    lr: float = 5e-5
    """Base learning rate."""
    lr_backbone: float = 1e-5
    """Base learning rate of the backbone; 0 freezes it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-4
    """On every parameter."""
    rule: Literal["hf", "torch"] = "hf"
    """Where eps and decay stand: as in Hugging Face's AdamW (the authors') or torch's."""
    unused: Literal["skip", "graph", "update_all"] = "skip"
    """What happens to parameters that take no part in a step (SPEC 3.5)."""
    max_norm: float | None = 0.1
    """Clip the gradient norm here; None does not clip."""
    warmup_steps: int = 2000
    """Linear warm-up from 0; step 0 runs with learning rate 0."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data sets are and how samples are made (SPEC 4)."""

    root: str | None = None
    """Data root in the canonical layout; see ``unit-fast data check``."""
    paths: dict[str, str] = field(default_factory=dict)
    """Overrides of single paths, e.g. ``coco.train_images=/other/train2017``; a wrong key is answered
    with the nearest ones."""
    vocab: str | None = None
    """WordPiece vocabulary; default ROOT/bert/vocab.txt."""
    short_side: int = 800
    """Short side of validation, VQA and SNLI-VE images, pixels."""
    max_side: int = 1333
    """Longest side, pixels."""
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Random short sides of detection training images, pixels."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Random short sides before the random crop, pixels."""
    crop_min: int = 384
    """Smallest crop side, pixels."""
    crop_max: int = 600
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
    workers: int = 0
    """With DALI or on a GPU the threads that decode, 0 is one a core and at most 8. Else loader processes, and 0 loads
    in the training process."""
    prefetch: int = 2
    """Steps ready ahead, for torchvision's engine per worker."""
    group: int = 16
    """Batches whose samples are sorted by size together, so that they pad less; 1 leaves the order as drawn. Every
    sample is still read once a pass."""
    cache_mib: int = 0
    """Decoded images kept in memory, MiB: with DALI or on a GPU of the whole run, else of each data set in each loading
    process, where a file that changes meanwhile is not read again. Not with dali_graph whole or decoder mixed."""
    cache_dir: str | None = None
    """Folder where parsed annotations and tokenised texts of large data sets are kept, outside the data root; default
    $XDG_CACHE_HOME/unit_fast or ~/.cache/unit_fast. An empty text keeps nothing."""
    max_pixels: int = 50_000_000
    """Images with more pixels are refused before decoding."""
    max_bad_share: float = 0.01
    """The run fails when a larger share of the images read was unreadable, by more than chance explains."""


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Static shapes that batches are padded to where whole steps are captured (``buckets.Buckets``)."""

    heights: int = 2
    """Short sides of image buckets, evenly down from the longest one."""
    widths: int = 3
    """Long sides for each short side, in both orientations. More of either pad less and capture more graphs."""
    least_text: int = 16
    """Shortest text bucket, tokens; each next one is twice as long, without an image also half as much again."""
    least_targets: int = 32
    """Fewest places for objects; each next bucket has twice as many."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: what ``config.json`` of a run folder holds."""

    recipe: str = ""
    """Name of the recipe this came from."""
    steps: int = 500_000
    """Optimiser updates."""
    batch_per_process: int = 1
    """Samples per forward pass; 0 with a ``target_batch``: chosen from the device's memory."""
    task_batch: dict[str, int] = field(default_factory=dict)
    """Other batch sizes for single tasks (data set key -> samples)."""
    accumulate: int = 1
    """Forward passes per update; 0 with a ``target_batch``: as many as reach it."""
    target_batch: int = 0
    """Samples per update that batch and accumulate make where one of them is 0; 0 leaves both as they are."""
    seed: int = 0
    """Initial weights, task order, data order, augmentation and dropout follow from it."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Sampling probability by data set key, renormalised over the tasks trained."""
    eval_every: int = 10_000
    """Steps between evaluations; 0 evaluates only at the end, -1 never."""
    eval_first: bool = False
    """Evaluate before the first step too."""
    early_stop: int = 0
    """End after so many evaluations in a row without a better ``criterion``; 0 trains all ``steps``."""
    eval_batch: int = 1
    """Samples per evaluation batch."""
    eval_limit: int = 0
    """Evaluate at most this many samples per task; 0 takes all."""
    eval_split: Literal["val", "train"] = "val"
    """Split to evaluate on."""
    save_every: int = 10_000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 5
    """Numbered checkpoints kept beside best and last."""
    log_every: int = 20
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
    threads: int = 0
    """CPU threads; 0 keeps the default. The number used is recorded: results depend on it."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    freeze: tuple[str, ...] = ()
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


def load_config(path: str | Path, cls=RunConfig):
    """Config of class ``cls`` from a JSON file. ``UserError`` names the file and the key."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a run folder's config.json") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another run or file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return from_dict(cls, values, str(path))
