"""``unit-fast completion``."""

import shlex
from dataclasses import dataclass
from typing import Literal

import tyro

from unit_fast.commands.options import Option, options_of


@dataclass(kw_only=True)
class Options:
    """Print a script that completes commands, options and their choices.

    bash and zsh: add `source <(unit-fast completion bash)` to ~/.bashrc or with zsh to ~/.zshrc; fish: write it to
    ~/.config/fish/completions/unit-fast.fish.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def run(options: Options) -> int:
    known = _known()
    print(_fish(known) if options.shell == "fish" else _bash(known, zsh=options.shell == "zsh"), end="")
    return 0


def _known() -> dict[str, list[Option]]:
    """Command -> its options."""
    from unit_fast.commands.main import COMMANDS, load

    found = {}
    for name in COMMANDS:
        module, default = load(name, [])
        found[name] = options_of(module.Options, default)
    return found


def _choices(option: Option) -> tuple[str, ...]:
    if option.name == "--recipe":
        from unit_fast.recipes import RECIPES

        return tuple(RECIPES)
    return option.choices


def _bash(known: dict[str, list[Option]], *, zsh: bool) -> str:
    lines = ["autoload -U +X compinit && compinit -u", "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    first = sorted({name.split()[0] for name in known})
    second = [name.split()[1] for name in known if " " in name]
    lines += [
        "_unit_fast() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"',
        '  local command="${COMP_WORDS[1]}" words=""',
        '  if [[ "$command" == data && $COMP_CWORD -gt 2 ]]; then command="data ${COMP_WORDS[2]}"; fi',
        '  case "$COMP_CWORD $command $prev" in',
        f'    "1 "*) words="{" ".join(first)}" ;;',
        f'    "2 data data") words="{" ".join(second)}" ;;',
    ]
    for name, options in known.items():
        for option in options:
            if choices := _choices(option):
                lines.append(f"    *{shlex.quote(f' {name} {option.name}')}) words={shlex.quote(' '.join(choices))} ;;")
    lines += ["    *)", '      if [[ "$cur" == -* ]]; then case "$command" in']
    for name, options in known.items():
        flags = " ".join(["--help", *(o.name for o in options if not o.positional)])
        lines.append(f"        {shlex.quote(name)}) words={shlex.quote(flags)} ;;")
    lines += [
        "      esac; fi ;;",
        "  esac",
        '  if [[ -n "$words" ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        '  else COMPREPLY=($(compgen -f -- "$cur")); fi',
        "}",
        "complete -o filenames -F _unit_fast unit-fast",
    ]
    return "\n".join(lines) + "\n"


def _fish(known: dict[str, list[Option]]) -> str:
    from unit_fast.commands.main import COMMANDS

    lines, first = [], sorted({name.split()[0] for name in known})
    unset = f"not __fish_seen_subcommand_from {' '.join(first)}"
    for name in known:
        word = name.split()[-1]
        when = (
            unset if word == name else f"__fish_seen_subcommand_from data; and not __fish_seen_subcommand_from {word}"
        )
        lines.append(
            f"complete -c unit-fast -f -n {shlex.quote(when)} -a {word} -d {shlex.quote(COMMANDS[name].about)}"
        )
    lines.append(f"complete -c unit-fast -f -n {shlex.quote(unset)} -a data")
    for name, options in known.items():
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        for option in options:
            if not option.positional:
                choices = _choices(option)
                takes = f"-x -a {shlex.quote(' '.join(choices))} " if choices else "-r " if option.value else ""
                about = shlex.quote(option.about.partition(". ")[0][:80])
                lines.append(f"complete -c unit-fast -n {shlex.quote(when)} -l {option.name[2:]} {takes}-d {about}")
    return "\n".join(lines) + "\n"
