"""What `make venv` asks pip for: torch's CPU build where no GPU is and an index has it, and one line where none has."""

import os
import platform
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
linux_x86 = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="elsewhere PyPI's torch is the CPU build"
)

PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'END'
#!/bin/sh
echo "$@" >> "$ASKED"
case "$* $OFFERED" in *+cpu*none) exit 1;; esac
END
chmod +x "$3/bin/pip"
"""
"""Stands for ``python -m venv FOLDER``: a pip that writes down what it is asked for."""


def make(tmp_path, target: str, *settings: str, offered: str = "all") -> tuple[list[str], str]:
    """(what pip was asked for, what was printed) of ``make target`` with an index that offers CPU builds or none."""
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["make", target, f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", *settings]
    environment = os.environ | {"ASKED": str(asked), "OFFERED": offered}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = [
        line.replace("install --quiet --constraint constraints.txt ", "") for line in asked.read_text().splitlines()
    ]
    return lines, "\n".join(line for line in result.stdout.splitlines() if line.startswith("No CPU build"))


CPU = f"torch=={PINNED['torch']}+cpu torchvision=={PINNED['torchvision']}+cpu"


@needs_make
@linux_x86
def test_without_a_gpu_the_cpu_build_is_taken_where_an_index_has_it(tmp_path):
    assert make(tmp_path, "venv", "GPU=no") == ([CPU, "--editable ."], "")


@needs_make
@linux_x86
def test_where_no_index_has_it_one_line_says_why_the_download_is_large(tmp_path):
    asked, said = make(tmp_path, "venv", "GPU=no", offered="none")
    assert asked == [CPU, "torch torchvision", "--editable ."]
    assert "3.3 of 6 GB to come are NVIDIA's" in said
    assert "extra-index-url" in said


@needs_make
def test_with_a_gpu_the_default_build_and_dali_are_taken(tmp_path):
    assert make(tmp_path, "venv", "GPU=yes") == (["torch torchvision", "--editable .[gpu]"], "")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_what_only_a_gpu_or_the_tests_need_is_an_extra():
    light = {requirement.split(";")[0].split(">")[0].split("<")[0].strip() for requirement in project()["dependencies"]}
    assert not light & {"triton", "nvidia-dali-cuda130", "transformers", "onnx", "wandb", "tensorboard", "pyarrow"}
    extras = project()["optional-dependencies"]
    assert {"gpu", "dali", "export", "track", "test"} <= set(extras)
    assert any("dali" in requirement for requirement in extras["gpu"])
    assert any("gpu" in requirement for requirement in extras["test"]), "the gate runs DALI's tests and the kernels"
