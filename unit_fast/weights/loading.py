"""Tensors of a file into a model by name, with a report of what was loaded, missing, unexpected and left out.

``load_initial_weights`` takes a file of any origin that we know: ours, MMF's UniT, DETR's, a ResNet's, BERT's.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unit_fast.errors import UserError, printable
from unit_fast.model import UniT
from unit_fast.tasks import get_task
from unit_fast.weights.foreign import ABSENT, Foreign, parts_of, recognise, why_not
from unit_fast.weights.names import TRANSFORMER, as_tensor, canonical_mmf, current_name, mmf_name


@dataclass
class LoadReport:
    """What happened to the tensors of a file."""

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Left out on request, or because it is the head of other classes."""
    left: list[str] = field(default_factory=list)
    """One line for every part of the model that stays as it was though the file may have been meant for it: why."""

    @property
    def complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("skipped", self.skipped)):
            first = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            parts.append(f"{len(names)} {title}{first}")
        return (f"{self.source}: " if self.source else "") + ", ".join(parts)

    def counts(self) -> str:
        """What was taken, left out and stays initial, in numbers by part: for the log of a run."""

        def by_part(names: Iterable[str]) -> str:
            found = Counter(name.split(".")[0] for name in names)
            return f" ({', '.join(f'{part} {count}' for part, count in found.items())})" if found else ""

        taken = f"{len(self.loaded)} tensors taken{by_part(self.loaded)}"
        rest = f"{len(self.unexpected) + len(self.skipped)} left out{by_part([*self.skipped, *self.unexpected])}"
        return f"{self.source}: {taken}; {rest}; {len(self.missing)} initial{by_part(self.missing)}"


@torch.no_grad()
def copy_tensors(
    model: torch.nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    source: str = "",
    skip: Iterable[str] = (),
) -> LoadReport:
    """Copy ``state[names[ours]]`` into ``model`` for every ``ours`` in ``names``.

    ``skip``: prefixes of our names to leave. ``UserError`` on a tensor of another shape, before anything is copied.
    """
    report, own, skip = LoadReport(source), model.state_dict(), tuple(skip)
    taken, copied, other = set(), {}, []
    for name, foreign in names.items():
        if foreign not in state:
            report.missing.append(name)
            continue
        taken.add(foreign)
        value = as_tensor(state[foreign])
        if skip and name.startswith(skip):
            report.skipped.append(name)
        elif value.shape == own[name].shape:
            copied[name] = value
            report.loaded.append(name)
        else:
            other.append((name, foreign, tuple(value.shape)))
    if other:
        name, foreign, shape = other[0]
        more = f" ({len(other) - 1} more differ)" if len(other) > 1 else ""
        raise UserError(
            f"{source or 'weights'}: {printable(foreign)} has shape {shape}, the model's {name} "
            f"{tuple(own[name].shape)}{more}; give the configuration the file was made with"
        )
    for name, value in copied.items():
        own[name].copy_(value)
    report.unexpected = sorted(set(state) - taken)
    return report


def load_initial_weights(
    model: UniT, state: Mapping[str, Tensor], *, skip: Iterable[str] = (), source: str = ""
) -> LoadReport:
    """Start ``model`` from the tensors of a file of any known origin; nothing is copied where it raises.

    Ours and MMF's UniT: see ``load_matching``. Others: see ``load_foreign``. ``skip``: beginnings of our names that
    stay as they are. ``UserError`` where the file is none of these, with what takes it.
    """
    for wrapper in ("module.", "_orig_mod."):  # of DDP and of torch.compile
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    if any(current_name(name).startswith("unit_base_model.") for name in state) or _is_ours(model, state):
        return load_matching(model, state, skip=skip, source=source)
    if (foreign := recognise(state)) is None:
        first = ", ".join(printable(name, 60) for name in list(state)[:3])
        raise UserError(
            f"{source or 'weights'}: no weights of UniT, DETR, a ResNet or BERT ({len(state)} tensors, {first}, ...); "
            "give such a file; `unit-fast convert --help` lists what can be converted"
        )
    return load_foreign(model, foreign, skip=skip, source=source)


_MODULES = (
    "backbone", "input_proj", "image_encoder", "enc2dec_proj", "pos_embed_proj", "text_encoder", "bert_projection",
    "bert_pos_projection", "decoder", "decoders", "query_embeds", "class_embeds", "bbox_embeds", "attribute_heads",
    "classifiers",
)  # fmt: skip
"""Modules of UniT: every name of a file of ours begins with one."""


def _is_ours(model: UniT, state: Mapping[str, Tensor]) -> bool:
    """Whether all names of ``state`` are of modules of UniT, and one is the model's."""
    return all(name.split(".")[0] in _MODULES for name in state) and any(name in state for name in model.state_dict())


# ----------------------------------------------------------------------------------------------------- UniT's files


def load_matching(
    model: UniT, state: Mapping[str, Tensor], *, skip: Iterable[str] = (), source: str = ""
) -> LoadReport:
    """COCO initialisation (SPEC 5.2, 7.4): the tensors of ``state`` by name, weights only.

    ``state``: ours or MMF's names. A single-task model's own decoder goes to a shared decoder. A task on a user's own
    data that is not in the file starts from the published one that it is like (``Task.like``). A head of other classes
    (answers, attributes) is left out, with a line in ``LoadReport.left``; so is the text encoder where it differs and
    no task of the model has texts. ``UserError`` where anything else has another shape, or a module of the model is in
    the file in part only: it would be trained from a mixture.
    """
    mmf = any(current_name(key).startswith("unit_base_model.") for key in state)
    if mmf:
        state = canonical_mmf(state)
    names = {name: mmf_name(name) if mmf else name for name in model.state_dict()}
    alike = {}
    for task in (get_task(name) for name in model.config.tasks):
        own = [name for name in names if f".{task.name}." in name]
        if task.like and not any(names[name] in state for name in own):
            ours = {name: name.replace(f".{task.name}.", f".{task.like}.", 1) for name in own}
            names |= {name: mmf_name(like) if mmf else like for name, like in ours.items()}
            alike[task.index] = get_task(task.like).index
    if model.config.decoder.share:
        own = f"decoders.{get_task('coco').name}."
        foreign = own if names["decoder.norm.weight"] == "decoder.norm.weight" else (
            f"{TRANSFORMER}decoders.detection.{get_task('coco').name}."
        )  # fmt: skip
        if f"{foreign}norm.weight" in state:
            names |= {n: foreign + n.removeprefix("decoder.") for n in names if n.startswith("decoder.")}
    if not any(foreign in state for foreign in names.values()):
        raise UserError(f"{source or 'weights'}: no tensor fits the model; it has {len(state)} of other names")
    skip = (*skip, *(unread := _unread_texts(model, state, names)))
    heads = _other_heads(model, state, names, skip)
    try:
        _refuse_mixtures(model, state, names, skip, source)
        report = copy_tensors(model, state, names, source=source, skip=(*skip, *heads))
    except UserError as error:
        raise UserError(f"{error}, or leave the module out with --skip-load NAME") from None
    for table in _task_tables(model):
        if table in report.loaded:
            rows = model.get_parameter(table).data
            for index, like in alike.items():
                rows[index] = rows[like]
    report.left = list(heads.values())
    if unread:
        report.left.append("the text encoder is left out: no task of the model has texts")
    return report


_TEXT = ("text_encoder.", "bert_projection.", "bert_pos_projection.")


def _unread_texts(model: UniT, state: Mapping, names: Mapping[str, str]) -> tuple[str, ...]:
    """Beginnings of the names of the text encoder, where no task of the model needs it and the file's is another."""
    if any(task.has_text for task in model.tasks.values()):
        return ()
    own = {name: value for name, value in model.state_dict().items() if name.startswith(_TEXT)}
    same = all(names[n] in state and as_tensor(state[names[n]]).shape == value.shape for n, value in own.items())
    return () if same else _TEXT


def _task_tables(model: UniT) -> list[str]:
    """Names of the task-embedding tables."""
    return [name for name, _ in model.named_parameters() if ".task_embedding." in name]


def _other_heads(model: UniT, state: Mapping, names: Mapping[str, str], skip: tuple[str, ...]) -> dict[str, str]:
    """Beginnings of the names of heads for other classes than the file's -> what to say."""
    heads = {f"class_embeds.{name}.": f"{name}.bias" for name in model.class_embeds}
    heads |= {f"classifiers.{name}.out.": f"{name}.out.bias" for name in model.classifiers}
    own, found = model.state_dict(), {}
    for prefix in heads:
        bias = f"{prefix}bias"
        if bias.startswith(skip or ("\0",)) or names[bias] not in state:
            continue
        theirs, ours = len(as_tensor(state[names[bias]])), len(own[bias])
        if theirs != ours:
            name = get_task(prefix.split(".")[1]).short
            found[prefix] = f"{name}: the head of {theirs} outputs is left out, the model has {ours}"
    for name in model.attribute_heads:
        prefix = f"attribute_heads.{name}."
        members = [n for n in own if n.startswith(prefix) and names[n] in state and not n.startswith(skip or ("\0",))]
        if any(as_tensor(state[names[n]]).shape != own[n].shape for n in members):
            found[prefix] = f"{get_task(name).short}: the attribute head is left out, the model's has other sizes"
    return found


_FREE = (".task_embedding.", ".pooler.")
"""Within names of tensors that a model may have or not."""


def _refuse_mixtures(model: UniT, state: Mapping, names: Mapping[str, str], skip: tuple[str, ...], source: str) -> None:
    """``UserError`` where a module is in the file in part only, or with more layers than the model has."""
    modules: dict[str, list[str]] = {}
    for name in names:
        if not name.startswith(skip or ("\0",)) and not any(free in name for free in _FREE):
            by_task = isinstance(getattr(model, name.split(".")[0]), torch.nn.ModuleDict)
            modules.setdefault(".".join(name.split(".")[: 2 if by_task else 1]), []).append(name)
    for module, members in modules.items():
        lacking = [name for name in members if names[name] not in state]
        if lacking and len(lacking) < len(members):
            raise UserError(
                f"{source or 'weights'}: has {len(members) - len(lacking)} of the {len(members)} tensors of {module}, "
                f"{names[lacking[0]]} is not among them; give the configuration the file was made with"
            )
    known = {re.sub(r"\d+", "#", names[n]) for members in modules.values() for n in members if names[n] in state}
    named = set(names.values())
    more = [n for n in state if n not in named and re.sub(r"\d+", "#", n) in known]
    if more:
        raise UserError(
            f"{source or 'weights'}: has {len(more)} tensors more than the model in modules of the same name "
            f"({printable(more[0])} first); give the configuration the file was made with"
        )


# -------------------------------------------------------------------------------------------- other projects' files


def load_foreign(model: UniT, foreign: Foreign, *, skip: Iterable[str] = (), source: str = "") -> LoadReport:
    """Every part of the model that the file has as a whole: backbone, input projection, encoder and, where its widths
    are the model's, decoder, queries and heads. The report says why a part was left.

    ``UserError`` where no part fits.
    """
    own, skip = model.state_dict(), tuple(skip)
    names, reasons, without = {}, {}, {}
    for part in parts_of(model):
        reason = why_not(part, own, foreign)
        if part.needs in reasons:  # means nothing without it
            reasons[part.title] = reasons[part.needs]
            if reason != ABSENT:
                without.setdefault(reasons[part.needs][0], []).append(part.title)
        elif reason is None:
            names |= {ours: theirs for ours, theirs in part.names.items() if theirs in foreign.tensors}
        else:
            reasons[part.title] = part.title, reason
    left = []
    for title, reason in dict.fromkeys(reasons.values()):
        others = f", and {', '.join(without[title])} with it" if title in without else ""
        if others or reason != ABSENT:
            left.append(f"{title}{others} left out: {reason}")
    where = source or "weights"
    if not names:
        raise UserError(
            f"{where}: {foreign.kind} file, none of whose parts fits the model ({'; '.join(left) or 'no part of it'}); "
            "give the configuration it was made with"
        )
    report = copy_tensors(model, foreign.tensors, names, source=f"{where} ({foreign.kind})", skip=skip)
    report.unexpected += foreign.unknown
    report.missing = [name for name in own if name not in names]
    report.left = left
    return report
