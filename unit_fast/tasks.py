"""What a task is. The eight data sets of UniT are the values of ``TASKS`` (paper, Table A.1; SPEC 1.1), those of
``OWN`` take a user's own files.

Everything that differs between data sets and does not depend on a run stands here; a run's own choices (batch,
sampling, number of queries) are in ``config.py``.
"""

from dataclasses import dataclass, field

from unit_fast.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set: inputs, outputs, loss and metric."""

    name: str
    """The data set key of the authors' code, e.g. ``detection_coco``."""
    short: str
    """The name on the command line and in file names, e.g. ``coco``."""
    title: str
    """The name in tables and figures."""
    kind: str
    """``detection``, ``vl`` (image and text) or ``glue`` (text only): the task type of the authors' state dict."""
    index: int
    """Row of the task-embedding tables."""
    outputs: int
    """Logits a query or a sample gets; for detection the last one is the no-object class. 0: as many as the data have
    classes."""
    queries: int
    """Default number of decoder queries."""
    text_length: int = 0
    """Maximum word pieces, special tokens included; 0 without text."""
    cls_only: bool = False
    """Only the ``[CLS]`` token of the text reaches the decoder."""
    attributes: bool = False
    """Objects carry attributes (Visual Genome)."""
    metric: str = "accuracy"
    """Key of the validation metric: ``detection_mean_ap``, ``vqa_accuracy`` or ``accuracy``."""
    labels: tuple[str, ...] = field(default=())
    """Names of the classes of a classification task with a fixed list."""
    like: str = ""
    """Data set key of the published task of the same kind, whose weights this one may start from."""

    @property
    def has_image(self) -> bool:
        return self.kind != "glue"

    @property
    def has_text(self) -> bool:
        return self.kind != "detection"

    @property
    def is_detection(self) -> bool:
        return self.kind == "detection"

    @property
    def loss(self) -> str:
        """``set`` (detection), ``bce`` (VQA) or ``ce``."""
        return "set" if self.is_detection else "bce" if self.metric == "vqa_accuracy" else "ce"


_NLI = ("entailment", "neutral", "contradiction")
_GLUE = {"kind": "glue", "queries": 25, "text_length": 128, "cls_only": True}

COCO = Task(
    name="detection_coco", short="coco", title="COCO detection", kind="detection", index=0, outputs=92, queries=100,
    metric="detection_mean_ap",
)  # fmt: skip
VISUAL_GENOME = Task(
    name="detection_visual_genome", short="vg", title="Visual Genome detection", kind="detection", index=1,
    outputs=1602, queries=100, attributes=True, metric="detection_mean_ap",
)  # fmt: skip
VQA2 = Task(
    name="vqa2", short="vqa2", title="VQAv2", kind="vl", index=3, outputs=3129, queries=25, text_length=25,
    metric="vqa_accuracy",
)  # fmt: skip
SNLI_VE = Task(
    name="visual_entailment", short="snli_ve", title="SNLI-VE", kind="vl", index=9, outputs=3, queries=25,
    text_length=25, cls_only=True, labels=_NLI,
)  # fmt: skip
QNLI = Task(
    name="glue_qnli", short="qnli", title="QNLI", index=5, outputs=2, labels=("entailment", "not_entailment"), **_GLUE
)
MNLI = Task(name="glue_mnli_mismatched", short="mnli", title="MNLI-mm", index=6, outputs=3, labels=_NLI, **_GLUE)
QQP = Task(
    name="glue_qqp", short="qqp", title="QQP", index=8, outputs=2, labels=("not_duplicate", "duplicate"), **_GLUE
)
SST2 = Task(name="glue_sst2", short="sst2", title="SST-2", index=7, outputs=2, labels=("negative", "positive"), **_GLUE)

TASKS: dict[str, Task] = {t.name: t for t in (COCO, VISUAL_GENOME, VQA2, SNLI_VE, QNLI, MNLI, QQP, SST2)}
"""All tasks by data set key, in the order of the paper's tables."""

DETECT = Task(
    name="detect", short="detect", title="Detection", kind="detection", index=10, outputs=0, queries=100,
    metric="detection_mean_ap", like=COCO.name,
)  # fmt: skip
ANSWER = Task(
    name="answer", short="answer", title="Questions", kind="vl", index=11, outputs=0, queries=25, text_length=40,
    metric="vqa_accuracy", like=VQA2.name,
)  # fmt: skip
ENTAIL = Task(
    name="entail", short="entail", title="Images with texts", kind="vl", index=12, outputs=0, queries=25,
    text_length=64, cls_only=True, like=SNLI_VE.name,
)  # fmt: skip
CLASSIFY = Task(
    name="classify", short="classify", title="Texts", kind="glue", index=13, outputs=0, queries=25, text_length=128,
    cls_only=True, like=SST2.name,
)  # fmt: skip

OWN: dict[str, Task] = {t.name: t for t in (DETECT, ANSWER, ENTAIL, CLASSIFY)}
"""Tasks on a user's own files, by data set key."""

_KNOWN = {**TASKS, **OWN}
_SHORT = {t.short: t for t in _KNOWN.values()}


def index_limits(task: Task, model) -> dict[str, tuple[int, str]]:
    """Field of a batch -> (numbers below this have a place in a model with this ``ModelConfig``, what sets it).

    The last output of detection is the no-object class, which no object can have.
    """
    outputs, name = model.tasks[task.name].outputs, f"model.tasks.{task.name}.outputs"
    limits = {}
    if task.has_text:
        limits["input_ids"] = (model.text.vocab_size, f"model.text.vocab_size is {model.text.vocab_size}")
    if task.is_detection:
        limits["labels"] = (outputs - 1, f"{name} is {outputs}, the last of them no-object")
    if task.attributes:
        count = model.loss.attribute_outputs
        limits["attributes"] = (count, f"model.loss.attribute_outputs is {count}")
    if task.loss == "ce":
        limits["label"] = (outputs, f"{name} is {outputs}")
    return limits


def check_indices(where: str, largest: dict[str, int], limits: dict[str, tuple[int, str]]) -> None:
    """``UserError`` beginning with ``where`` on a number in ``largest`` (field -> largest) beyond ``limits``."""
    for field_name, (limit, set_by) in limits.items():
        found = largest.get(field_name, -1)
        if found >= limit:
            raise UserError(
                f"{where}: {field_name} has {found}, the model has places for 0 to {limit - 1} ({set_by}); correct the "
                "samples, or give the model more"
            )


def get_task(name: str) -> Task:
    """The task called ``name`` (data set key or short name). ``UserError`` with the nearest names otherwise."""
    found = _KNOWN.get(name) or _SHORT.get(name)
    if found is None:
        raise UserError(f"unknown task {name!r}; {nearest(name, dict.fromkeys([*_SHORT, *_KNOWN]))}")
    return found
