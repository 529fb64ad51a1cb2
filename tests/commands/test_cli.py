"""The command line: what it does, and that a mistake is one line."""

import io
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import log_of, rows, small_config, state_hash
from unit_fast.commands import env, train
from unit_fast.commands import main as cli
from unit_fast.commands.command_line import parse, split_lists, value_of
from unit_fast.config import load_config, to_json
from unit_fast.errors import UserError
from unit_fast.recipes import RECIPES, recipe
from unit_fast.recipes.paper import sampling

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A finished run, trained through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_config(root, "coco", "vqa2", "qnli", "sst2", eval_every=0, eval_limit=6)
    (folder / "small.json").write_text(to_json(config))
    assert cli.main(training(folder, folder / "run")) == 0
    return folder / "run"


def training(folder: Path, out: Path, *more: str) -> list[str]:
    """The command that trains what ``folder/small.json`` says."""
    return ["train", "--config-file", str(folder / "small.json"), "--out", str(out), "--progress", "none", *more]


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trian"], "unknown command 'trian'; nearest: train"),
        (["data", "chek"], "unknown command 'data chek'; nearest: data check"),
        (["train", "--recipe", "all8_shred"], "unknown recipe 'all8_shred'; nearest: all8_shared"),
        (["train", "--recipe=nothing_like_it_zz"], "unknown recipe"),
        (["train", "--optim.lrr", "3"], "unknown option --optim.lrr; nearest: --optim.lr"),
        (["train", "--modl.decoder.layers", "3"], "unknown option --modl.decoder.layers; nearest: --model."),
        (["train", "--stpes=3"], "unknown option --stpes"),
        (["train", "--steps", "many"], "--steps: invalid literal for int()"),
        (["train", "--steps"], "Missing value for argument '--steps'"),
        (["train", "--model.backbone.depth", "51"], "invalid choice '51' for argument '--model.backbone.depth'"),
        (["train", "--tasks", "coco,vqa"], "unknown task 'vqa'; nearest: vqa2"),
        (["train", "--recipe", "coco", "--tasks", "vqa2"], "vqa2 is not in recipe 'coco'; it has coco"),
        (["train", "--tasks", ","], "--tasks: names no task"),
        (["train", "--recipe", "coco"], "no data: give --data-root"),
        (["train", "--resume", "auto", "--data-root", "x"], "--resume auto: give the run folder with --out"),
        (["train", "--resume", "nowhere"], "nowhere: no such run"),
        (["train", "--config-file", "nowhere.json"], "nowhere.json: no such file"),
        (["train", "--optim.betas", "0.9", "1"], "unit-fast: optim.betas[1]: is 1.0; give at least 0 and below 1"),
        (["train", "--recipe", "sst2", "--data-root", "/nowhere", "--out", "{tmp}/x"], "/nowhere"),
        (["train", "--batch", "4", "--accumulate", "2", "--target-batch", "64"], "give at most two of the three"),
        (["train", "--recipe", "coco", "--batch", "3", "--dry-run"], "3 does not divide the 64 samples of an update"),
        (["train", "--recipe", "coco", "--target-batch", "0", "--dry-run"], "batch_per_process: is 0; give at least 1"),
        (["train", "--recipe", "coco", "--measure"], "--measure: give it with --dry-run"),
        (["runs", "/nowhere"], "/nowhere: no such folder"),
        (["report", "/nowhere"], "/nowhere: no such folder"),
        (["report", "{tmp}"], "neither config.json nor metrics.jsonl is in it"),
        (["train", "--steps", "0", "--data-root", "{root}", "--out", "{tmp}/x"], "steps: is 0"),
        (["train", "--freeze", "image,txt"], "invalid choice 'txt' for argument '--freeze'"),
        (["evaluate", "nowhere"], "nowhere: no such run"),
        (["evaluate", "{run}", "--tasks", "vg"], "this model does not have it"),
        (["evaluate", "{run}", "--split", "tset"], "invalid choice 'tset'"),
        (["evaluate", "{run}", "--data-root", "/nowhere"], "/nowhere: not a folder; give --data-root"),
        (["evaluate", "{run}", "--scorer", "pycoco"], "nearest: pycocotools"),
        (["evaluate", "{run}", "--ema"], "no averaged weights"),
        (["evaluate", "{run}", "--limit", "-1"], "--limit must be at least 0"),
        (["predict", "{run}"], "--task"),
        (["predict", "{run}", "--task", "vga2"], "nearest: vqa2"),
        (["predict", "{run}", "--task", "vqa2", "--text", "what ?"], "needs an image"),
        (["predict", "{run}", "--task", "sst2"], "needs a sentence"),
        (["predict", "{run}", "--task", "coco", "--image", "{run}/config.json"], "config.json"),
        (["data", "check", "/nowhere"], "/nowhere"),
        (["data", "generate", "{run}"], "did not generate"),
        (["data", "generate", "{tmp}/w", "--scale", "0"], "scale must be"),
        (["recipes", "all8"], "unknown recipe 'all8'; nearest: "),
        (["convert", "{run}/config.json", "{tmp}/out"], "config.json: neither a safetensors nor a PyTorch file"),
        (["convert", "{run}", "{tmp}/out", "--to", "mmf"], "ends in .safetensors or .pth"),
        (["convert", "{run}/config.json", "{run}"], "is there already"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, root, run, tmp_path, arguments, text):
    names = {"root": root, "run": run, "tmp": tmp_path}
    code, _, err = call(capsys, *[a.format(**names) if "{" in a else a for a in arguments])
    lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("unit-fast: ")
    assert text in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_mistake_on_terminals_of_both_kinds(encoding):
    command = [sys.executable, "-m", "unit_fast", "train", "--optim.lrr", "3"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert result.stderr == (
        "unit-fast: unknown option --optim.lrr; nearest: --optim.lr; `unit-fast train --help` lists the options\n"
    )


def test_debug_shows_the_trace(run):
    with pytest.raises(UserError):
        cli.main(["evaluate", "nowhere", "--debug"])


def test_a_fault_of_ours_is_not_hidden(capsys, monkeypatch):
    def broken(options):
        raise ZeroDivisionError

    monkeypatch.setattr(env, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_more_than_one_process_is_one_line(capsys, monkeypatch, root, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(capsys, "train", "--recipe", "sst2", "--data-root", str(root), "--out", str(tmp_path / "x"))
    assert (code, err.count("\n")) == (2, 1)
    assert "more than one process is not supported yet" in err


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        # the shortcuts
        ("--recipe all8_shared_skip", "recipe", "all8_shared_skip"),
        ("--recipe all8_shared_skip", "optim.unused", "skip"),
        ("--data-root ROOT", "data.root", "ROOT"),
        ("--batch 4 --accumulate 16", "batch_per_process", 4),
        ("--batch 4 --accumulate 16", "accumulate", 16),
        ("--batch 4 --accumulate 16", "effective_batch", 64),
        ("--batch 4 --accumulate 2", "effective_batch", 8),
        ("--batch 4", "accumulate", 0),
        ("--batch-per-process=4", "effective_batch", 64),
        ("--accumulate 4", "batch_per_process", 0),
        ("--target-batch 32", "effective_batch", 32),
        ("--recipe small --batch 4", "effective_batch", 4),
        ("--recipe small --target-batch 64", "batch_per_process", 8),
        ("--recipe small --target-batch 64", "accumulate", 0),
        ("--track tensorboard,wandb", "track", ("tensorboard", "wandb")),
        ("--early-stop 3 --eval-first", "early_stop", 3),
        ("--steps 1234", "steps", 1234),
        ("--seed 7", "seed", 7),
        ("--init-from RUN", "init_from", "RUN"),
        ("--freeze image,text", "freeze", ("image", "text")),
        ("--skip-load class_embeds.,bbox_embeds.", "skip_load", ("class_embeds.", "bbox_embeds.")),
        ("--weights DIR", "weights", "DIR"),
        ("--require-weights", "require_weights", True),
        ("--eval-split train", "eval_split", "train"),
        ("--recipe all8_shared --tasks coco,vqa2", "ratios", {"detection_coco": 0.20, "vqa2": 0.26}),
        # every field by its dotted name
        ("--model.decoder.layers 3", "model.decoder.layers", 3),
        ("--optim.lr 1e-4", "optim.lr", 1e-4),
        ("--data.workers 2", "data.workers", 2),
        ("--optim.max-norm None", "optim.max_norm", None),
        ("--ratios.vqa2 0.5", "ratios", sampling("all8") | {"vqa2": 0.5}),
        ("--data.train-short-sides 64 96", "data.train_short_sides", (64, 96)),
        ("--model.decoder.no-share", "model.decoder.share", False),
        ("--model.backbone.norm group", "model.backbone.norm", "group"),
        ("--ema-decay 0.99", "ema_decay", 0.99),
    ],
)
def test_an_option_sets_its_field(option, field, value):
    assert operator.attrgetter(field)(config_from(option)) == value


def config_from(options: str):
    arguments = options.split()
    return train.config_of(parse(train.Options, arguments, prog="x", default=train.default(arguments)))


def test_tasks_have_options_too_and_may_be_left_out():
    config = config_from("--tasks coco,vqa2 --model.tasks.detection-coco.queries 25")
    assert list(config.model.tasks) == ["detection_coco", "vqa2"]
    assert config.model.tasks["detection_coco"].queries == 25


def test_no_option_is_left_out(capsys):
    """The long help names every field of the configuration."""
    assert cli.main(["train", "--help-all"]) == 0
    said = capsys.readouterr().out
    fields = json.loads(to_json(recipe("all8_shared")))

    def names(tree, prefix=""):
        for key, value in tree.items():
            path = f"{prefix}{key.replace('_', '-')}"
            if isinstance(value, dict) and value:
                yield from names(value, f"{path}.")
            else:
                yield path.rpartition(".")[0], path.rpartition(".")[2]

    for prefix, name in names(fields):
        flag = f"--{prefix}.{name}" if prefix else f"--{name}"
        assert flag in said, flag


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["--freeze", "image,text", "--out", "a,b"], ["--freeze", "image", "text", "--out", "a,b"]),
        (["--freeze=image,text"], ["--freeze", "image", "text"]),
        (["--skip_load", "a.,b.", "--x"], ["--skip-load", "a.", "b.", "--x"]),
        (["--freeze", "image", "text"], ["--freeze", "image", "text"]),
        (
            ["--data.paths", "a.b=/c", "d", "/e=f", "--x", "g=h"],
            ["--data.paths", "a.b", "/c", "d", "/e=f", "--x", "g=h"],
        ),
        (["--paths=a.b=/c=d", "e=f,g"], ["--paths", "a.b", "/c=d", "e", "f,g"]),
    ],
)
def test_lists_may_have_commas_and_pairs_an_equals_sign(given, found):
    assert split_lists(given) == found


def test_value_of():
    assert value_of(["--a", "1", "--b=2"], "--a") == "1"
    assert value_of(["--a", "1", "--b=2"], "--b") == "2"
    assert value_of(["--a"], "--a") is None
    assert value_of([], "--a") is None


# --------------------------------------------------------------------------------------------------- the commands


def test_help(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out
    for name in cli.COMMANDS:
        assert cli.main([*name.split(), "--help"]) == 0


def test_train_leaves_a_whole_run(run):
    for name in ("summary.json", "report.html", "curves.svg", "checkpoints/last/model.safetensors", "samples"):
        assert (run / name).exists(), name
    assert set(json.loads((run / "summary.json").read_text())["metrics"]) == {"coco", "vqa2", "qnli", "sst2"}


def test_train_and_resume_by_command(capsys, run, root, tmp_path):
    code, out, _ = call(capsys, *training(run.parent, tmp_path / "r", "--progress", "plain", "--stop-at", "10"))
    assert code == 75
    command = f"unit-fast train --resume auto --out {tmp_path / 'r'}"
    assert command in out
    assert cli.main(command.split()[1:] + ["--progress", "none"]) == 0
    assert state_hash(tmp_path / "r") == state_hash(run)
    assert sum(r["updates"] for r in rows(tmp_path / "r")) == 20


def test_resume_with_another_setting(capsys, run, tmp_path):
    cli.main(training(run.parent, tmp_path / "r", "--stop-at", "4"))
    capsys.readouterr()
    again = ["train", "--resume", "auto", "--out", str(tmp_path / "r"), "--progress", "none", "--optim.lr", "1e-5"]
    code, _, err = call(capsys, *again)
    assert code == 2
    assert "optim.lr was 0.001, is 1e-05" in err
    assert cli.main([*again, "--allow-changed", "optim.lr"]) == 0


def test_resume_from_another_folder(run, tmp_path):
    other = ["train", "--resume", str(run), "--steps", "22", "--out", str(tmp_path / "r"), "--progress", "none"]
    assert cli.main(other) == 0
    assert "going on after step 20" in log_of(tmp_path / "r")
    assert load_config(tmp_path / "r" / "config.json").steps == 22


def test_dry_run(capsys, root):
    code, out, err = call(
        capsys, "train", "--recipe", "all8_shared", "--data-root", str(root), "--batch", "2", "--dry-run"
    )
    config = json.loads(out[: out.index("\n}\n") + 3])
    assert config["steps"] == 500_000
    assert "201,507,900, 201,285,500 trained" in out
    assert "effective batch 64 (2 x 32 accumulated), the paper's is 64" in out
    assert "GiB" in out
    assert code == 2, "as the run would: this world has other answers than the model"
    assert "18 answers, but the model has 3129 outputs" in err
    assert not Path("runs").exists() or "all8_shared" not in " ".join(os.listdir("runs"))


def test_dry_run_counts_frozen_parameters(capsys, root):
    _, whole, _ = call(capsys, "train", "--recipe", "coco", "--dry-run")
    _, frozen, _ = call(capsys, "train", "--recipe", "coco", "--freeze", "image,text", "--dry-run")
    assert "191,790,880, 191,568,480 trained" in whole
    assert "191,790,880, 191,568,480 trained" not in frozen
    assert "191,790,880, " in frozen


def test_evaluate(capsys, run, root):
    code, out, _ = call(capsys, "evaluate", str(run), "--tasks", "vqa2,sst2")
    assert code == 0
    assert "vqa_accuracy" in out
    assert "chance" in out
    assert (run / "predictions" / "vqa2_val.json").exists()
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["metrics"]) == {"vqa2", "sst2"}


def test_evaluate_as_json_elsewhere_with_a_limit(capsys, run, root, tmp_path):
    code, out, _ = call(
        capsys, "evaluate", str(run), "--data-root", str(root), "--split", "train", "--limit", "3", "--json", "--out",
        str(tmp_path / "e"), "--tasks", "coco",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert (found["split"], found["limit"]) == ("train", 3)
    assert found["metrics"]["coco"]["count"] == 3
    assert found == json.loads((tmp_path / "e" / "evaluation.json").read_text())


def test_predict(capsys, run, root, tmp_path):
    image = str(next((root / "coco" / "images" / "val2017").iterdir()))
    picture = tmp_path / "boxes.png"
    code, out, err = call(
        capsys, "predict", str(run), "--task", "coco", "--image", image, "--threshold", "0.0", "--save", str(picture)
    )
    assert code == 0
    assert "label" in out
    assert picture.stat().st_size > 100
    code, out, _ = call(capsys, "predict", str(run), "--task", "vqa2", "--image", image, "--text", "what ?", "--json")
    assert code == 0
    assert len(json.loads(out)["predictions"]) == 5
    for pair in (["--text", "a", "--text", "b"], ["--text", "a", "--text-b", "b"]):
        code, out, _ = call(capsys, "predict", str(run), "--task", "qnli", *pair)
        assert code == 0
        assert "entailment" in out


def test_data(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "generate", str(tmp_path / "w"), "--scale", "0.01", "--seed", "2")
    assert code == 0
    assert "vqa2" in out
    code, out, _ = call(capsys, "data", "check", str(tmp_path / "w"), "--decode", "--json")
    assert code == 0
    assert json.loads(out)["ok"]
    (next((tmp_path / "w" / "coco" / "images" / "train2017").iterdir())).unlink()
    code, out, _ = call(capsys, "data", "check", str(tmp_path / "w"))
    assert code == 1
    assert "missing" in out


def test_recipes(capsys, tmp_path):
    _, out, _ = call(capsys, "recipes")
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    _, out, _ = call(capsys, "recipes", "coco")
    (tmp_path / "my.json").write_text(out)
    assert load_config(tmp_path / "my.json") == recipe("coco")


def test_convert_there_and_back(capsys, run, tmp_path):
    import safetensors.torch
    import torch

    from unit_fast.weights.checkpoint import load_weights

    assert call(capsys, "convert", str(run), str(tmp_path / "mmf.pth"), "--to", "mmf")[0] == 0
    names = load_weights(tmp_path / "mmf.pth")
    assert "unit_base_model.input_proj.weight" in names
    assert call(capsys, "convert", str(run), str(tmp_path / "detr.safetensors"), "--to", "detr")[0] == 0
    backbone = safetensors.torch.load_file(tmp_path / "detr.safetensors")
    own = load_weights(run / "checkpoints" / "last" / "model.safetensors")
    assert torch.equal(backbone["backbone.0.body.conv1.weight"], own["backbone.conv1.weight"])


@pytest.mark.long
def test_convert_a_published_size_model(capsys, tmp_path):
    """Ours to MMF's names and back gives the same tensors."""
    import torch

    from unit_fast.model import UniT
    from unit_fast.recipes import recipe
    from unit_fast.weights.checkpoint import load_model, save_weights

    config = recipe("coco_vqa2")
    torch.manual_seed(0)
    model = UniT(config.model)
    save_weights(tmp_path / "ours", model, config)
    assert call(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "mmf.safetensors"), "--to", "mmf")[0] == 0
    assert call(capsys, "convert", str(tmp_path / "mmf.safetensors"), str(tmp_path / "again"))[0] == 0
    again, _ = load_model(tmp_path / "again")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_env(capsys):
    _, out, _ = call(capsys, "env")
    assert json.loads(out)["versions"]["torch"]


def test_as_a_module_and_fast_to_help(tmp_path):
    code = "import sys, unit_fast.commands.main as c; sys.exit(c.main(['--help']) or ('torch' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, "the help must not load PyTorch"
    result = subprocess.run(
        [sys.executable, "-m", "unit_fast", "recipes", "nowhere"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("unit-fast: unknown recipe")


# ------------------------------------------------------------------------------------------------- its output


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", command, "x", sys.executable, "-m", "unit_fast"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip


def test_output_that_could_not_be_written_is_an_error_where_it_is_all_there_is():
    done = shell('exec "$@" recipes >/dev/full')
    assert done.returncode == 1
    assert done.stderr == "unit-fast: the output could not be written (No space left on device)\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_process_without_streams_works(closed):
    done = shell(f'exec "$@" recipes {closed}')
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_console_cannot_show_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(env, "run", lambda *_: print("größe 写") or 0)
    assert cli.main(["env"]) == 0
    assert stream.buffer.getvalue() == b"gr\\xf6\\xdfe \\u5199\n"
    assert sys.stdout is stream


def test_a_report_that_cannot_be_written_does_not_change_how_a_run_ended(capsys, root, tmp_path):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    (tmp_path / "small.json").write_text(to_json(small_config(root, "sst2", steps=2)))
    code, _, err = call(capsys, *training(tmp_path, tmp_path / "run", "--stop-at", "1"))
    assert code == 75
    assert err.startswith("unit-fast: no report: ")
