"""The list of a command's options: it is what tyro takes, and help, suggestions and completion stand on it."""

import contextlib
import io
import re
import shutil
import subprocess

import pytest
import tyro

from unit_fast.commands import main as cli
from unit_fast.commands import predict, train
from unit_fast.commands.options import SYNONYMS, near, options_of, page
from unit_fast.recipes import RECIPES


def _command(name: str):
    module, default = cli.load(name, [])
    return module.Options, default


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_is_what_tyro_takes(name):
    command, default = _command(name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"], **({} if default is None else {"default": default}))
    taken = set(re.findall(r"^[│| ] {1,2}(--[a-z0-9][\w.-]*)", said.getvalue(), re.MULTILINE))
    listed = {option.name for option in options_of(command, default) if not option.positional}
    negations = {n for n in taken if re.sub(r"(--|\.)no-", r"\1", n) in taken - {n}}
    assert taken - negations - {"--help"} == listed
    assert all(option.about for option in options_of(command, default))


def test_the_short_help_has_what_most_need_and_the_long_one_all(capsys):
    assert cli.main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert [f"--{name.replace('_', '-')}" for name in train.COMMON] == re.findall(r"^  (--\S+)", short, re.MULTILINE)
    assert len(short.splitlines()) < 60
    assert "more options: `unit-fast train --help-all`" in short
    assert cli.main(["help", "train", "--help-all"]) == 0
    assert "--model.decoder.layers INT" in capsys.readouterr().out


def test_positionals_are_named(capsys):
    assert cli.main(["help", "predict"]) == 0
    assert capsys.readouterr().out.startswith("usage: unit-fast predict RUN [OPTIONS]\n")
    assert cli.main(["recipes", "-h"]) == 0
    assert "usage: unit-fast recipes [NAME] [OPTIONS]" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"], ["help", "data"]])
def test_a_group_lists_its_commands(capsys, arguments):
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "data check" in said
    assert "evaluate" not in said


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("--epochs", "; training is counted in updates"), ("--epochs", "; nearest: --steps"),
        ("--optim.learning-rate", "; nearest: --optim.lr"), ("--lr", "; nearest: --optim.lr"),
        ("--batch_size", "; nearest: --batch"), ("--optim.lrr", "; nearest: --optim.lr"),
        ("--modl.decoder.layers", "; nearest: --model.decoder.layers,"), ("--stpes", "; nearest: --steps"),
        ("--weight-decay", "; nearest: --optim.weight-decay"), ("--zzz", ""),
    ],
)  # fmt: skip
def test_suggestions(wrong, found):
    said = near(wrong, *_command("train"))
    assert found in said if found else not said


def test_what_others_call_it_exists_here():
    known = {o.name for name in ("train", "predict") for o in options_of(*_command(name))}
    assert set(SYNONYMS.values()) <= known


def test_the_page_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    lines = page(predict.Options, "unit-fast predict", None, ()).splitlines()
    assert max(map(len, lines)) <= 70


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tra", {"train"}),
        ("data ch", {"check"}),
        ("data generate --sc", {"--scale"}),
        ("train --optim.l", {"--optim.lr", "--optim.lr-backbone"}),
        ("train --precision b", {"bf16"}),
        ("train --recipe ablat", {"ablation"}),
    ],
)
def test_completion(capsys, tmp_path, shell, words, found):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    assert cli.main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    *_, last = words.split()
    code = (
        f"{'setopt ksharrays; ' if shell == 'zsh' else ''}source {tmp_path}/script; COMP_WORDS=(unit-fast {words}); "
        f'COMP_CWORD={len(words.split())}; _unit_fast; echo "${{COMPREPLY[@]}}"'
    )
    said = subprocess.run([shell, "-c", code], capture_output=True, text=True)
    # zsh itself drops what does not begin with the word
    assert {word for word in said.stdout.split() if shell == "bash" or word.startswith(last)} == found, said.stderr


def test_completion_of_recipes_and_fish(capsys):
    assert cli.main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in RECIPES)
    assert "-l optim.lr-backbone" in script
    if shutil.which("fish"):
        assert subprocess.run(["fish", "--no-execute"], input=script, text=True).returncode == 0
