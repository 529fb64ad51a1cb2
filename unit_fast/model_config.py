"""Every setting of the model: one frozen, keyword-only dataclass per component, a docstring under each field."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from unit_fast.checked import Bounds, Checked, NonNegativeFloat, NonNegativeInt, PositiveInt, Probability
from unit_fast.errors import UserError, nearest
from unit_fast.tasks import OWN, TASKS, Task, get_task


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
            task, where = known_task("model.tasks", name), f"model.tasks.{name}"
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


def known_task(field_name: str, name: str) -> Task:
    """The task with the data set key ``name``; not its short name, of which saved files know nothing."""
    known = TASKS | OWN
    if name not in known:
        raise UserError(f"{field_name}: {name!r} is not a data set key; {nearest(name, known)}")
    return known[name]
