"""What a machine with a card may lack is imported by no benchmark, kernel or test marked gpu at module level."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("tyro", "pycocotools", "nvidia.dali", "xformers")
COMMAND_LINE = "unit_fast.commands."
"""The modules of the package that may need them: the command line is made with tyro."""

SCRIPT = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error.name)
"""


def modules():
    """Names of all modules in question; tests only where a test is marked gpu."""
    for folder, package in (("benchmarks",) * 2, ("unit_fast",) * 2, ("kernels", "unit_fast_kernels"), ("tests",) * 2):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.stem == "__main__" or (folder == "tests" and "mark.gpu" not in path.read_text(encoding="utf-8")):
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__")))


def test_nothing_but_the_command_line_needs_them():
    names = list(modules())
    assert {"benchmarks.bench_data", "unit_fast.data.images.dali", "unit_fast_kernels.attention"} <= set(names)
    script = SCRIPT.format(blocked=BLOCKED, names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    broken = dict(line.split() for line in done.stdout.splitlines())
    others = {name: needs for name, needs in broken.items() if not name.startswith(COMMAND_LINE)}
    assert not others, f"imports at module level what may not be there: {others}"
    assert broken  # the block works: the command line cannot do without


def test_benchmarks_parse_their_options_without_them():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "import tyro" not in path.read_text(encoding="utf-8"), path.name
