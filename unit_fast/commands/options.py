"""A command's options as a list, read off its dataclass as tyro does: for the help, suggestions and completion."""

import ast
import dataclasses
import difflib
import functools
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

SYNONYMS = {
    name: option
    for option, names in {
        "--steps": "epochs max-steps iterations iters max-iter",
        "--batch": "batch-size bs",
        "--accumulate": "gradient-accumulation-steps grad-accum",
        "--optim.lr": "lr learning-rate",
        "--optim.max-norm": "clip grad-clip",
        "--optim.warmup-steps": "warmup",
        "--out": "output output-dir save-dir outdir name project",
        "--device": "gpu gpus cuda cpu",
        "--data.workers": "num-workers workers",
        "--data-root": "data dataset data-dir root num-classes",
        "--init-from": "pretrained finetune load-from",
        "--resume": "checkpoint ckpt",
        "--precision": "amp fp16 bf16 half",
        "--graph": "compile",
        "--data.short-side": "imgsz img-size image-size",
        "--config-file": "config",
        "--recipe": "model",
        "--threshold": "conf score-threshold",
        "--image": "images source",
        "--text": "question sentence",
    }.items()
    for name in names.split()
}
"""What other trainers call it -> what it is here, where the command has that."""
REMARKS = {
    "epochs": "training is counted in updates (an epoch is the samples divided by the effective batch)",
    "num-classes": "the number of classes comes from the data",
}


@dataclass(frozen=True)
class Option:
    """One option, or with ``positional`` an argument by its place."""

    name: str
    """As it is typed: ``--optim.lr``; of a positional its name in capitals."""
    about: str
    """The docstring under the field."""
    value: str
    """What it takes, e.g. INT; empty for a flag."""
    choices: tuple[str, ...]
    default: object
    """``dataclasses.MISSING`` where it must be given."""
    positional: bool = False


def options_of(command, default=None) -> list[Option]:
    """All options of the dataclass ``command``; ``default``, an instance, also knows e.g. a recipe's tasks."""
    return list(_options(command, default, ""))


def _options(cls, default, place: str) -> Iterator[Option]:
    about = docstrings(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, own = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            own = field.default_factory()
        value = own if default is None else getattr(default, field.name)
        notes = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        hint = typing.get_args(hint)[0] if notes else hint
        inner = next((note.name for note in notes if getattr(note, "name", None) is not None), field.name)
        name = ".".join(filter(None, (place, inner.replace("_", "-"))))
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, None if value is dataclasses.MISSING else value, name)
        elif typing.get_origin(hint) is dict and isinstance(value, dict) and value:
            for key, entry in value.items():
                inside = f"{name}.{key.replace('_', '-')}"
                if dataclasses.is_dataclass(entry):
                    yield from _options(type(entry), entry, inside)
                else:
                    yield Option(f"--{inside}", about[field.name], *_takes(type(entry)), entry)
        else:
            positional = any("positional" in str(note).lower() for note in notes)
            shown = name.upper() if positional else f"--{name}"
            yield Option(shown, about[field.name], *_takes(hint), value, positional)


def _takes(hint) -> tuple[str, tuple[str, ...]]:
    """What a value of type ``hint`` is called, and its choices."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _takes(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return _takes(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return "|".join(map(str, arguments)), tuple(map(str, arguments))
    if origin is tuple:
        inner, choices = _takes(arguments[0])
        return f"{inner} ..." if arguments[-1] is Ellipsis else " ".join([inner] * len(arguments)), choices
    if origin is dict:
        return "NAME=VALUE ...", ()
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: ""}.get(hint, hint.__name__.upper()), ()


@functools.cache
def docstrings(cls) -> dict[str, str]:
    """Field -> the text under it, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {}
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def page(command, prog: str, default, common: tuple[str, ...]) -> str:
    """The help of a command. common: the options shown, by field name; all where it is empty."""
    options = options_of(command, default)
    places = [o for o in options if o.positional]
    flags = [o for o in options if not o.positional]
    order = [c.replace("_", "-") for c in common]
    shown = sorted((o for o in flags if o.name[2:] in order), key=lambda o: order.index(o.name[2:])) if order else flags
    usage = " ".join([prog, *(o.name if o.default is dataclasses.MISSING else f"[{o.name}]" for o in places)])
    width = min(100, max(60, shutil.get_terminal_size().columns))
    lines = [f"usage: {usage} [OPTIONS]", "", *textwrap.wrap(" ".join(inspect.getdoc(command).split()), width), ""]
    for option in (*places, *shown):
        takes = "" if option.positional or not option.value else f" {option.value}"
        lines.append(f"  {option.name}{takes}")
        text = option.about + _default_note(option)
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    hidden = len(flags) - len(shown)
    lines += ["", f"{hidden} more options: `{prog} --help-all`."] if hidden else []
    return "\n".join(lines) + "\n"


def _default_note(option: Option) -> str:
    if option.default is dataclasses.MISSING:
        return " (required)"
    if option.default is None or option.default in ((), "", {}) or option.default is False:
        return ""
    if option.default is True:
        return f" (on; --{_negated(option.name[2:])} turns it off)"
    value = option.default
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def _negated(name: str) -> str:
    *place, last = name.split(".")
    return ".".join([*place, f"no-{last}"])


def near(wrong: str, command, default=None) -> str:
    """The remark on, and the options like, one that does not exist."""
    known = [o.name for o in options_of(command, default) if not o.positional]
    name = wrong.lstrip("-").replace("_", "-").lower()
    last = name.rpartition(".")[2]
    found = [SYNONYMS[n] for n in (name, last) if SYNONYMS.get(n) in known]
    if not found:
        bare, ends = [k[2:] for k in known], {k[2:].rpartition(".")[2]: k for k in reversed(known)}
        alike = [difflib.get_close_matches(name, bare, n=3, cutoff=cutoff) for cutoff in (0.85, 0.7)]
        found = [f"--{k}" for k in alike[0] or alike[1]]
        found += [k for k in known if k[2:].rpartition(".")[2] == last]
        found += [ends[end] for end in difflib.get_close_matches(last, ends, n=2, cutoff=0.75)]
    found = list(dict.fromkeys(found))[:3]
    remark = f"; {REMARKS[last]}" if last in REMARKS and found else ""
    return remark + (f"; nearest: {', '.join(found)}" if found else "")
