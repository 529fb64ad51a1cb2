"""What is installed and what an import costs; style and layers; the same checks that a reviewer would run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from unit_fast import ops

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("tyro", "pycocotools", "nvidia.dali", "xformers", "apex", "faster_coco_eval", "pyarrow")


def _run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_imports_beside_hugging_faces_kernels(where, tmp_path):
    """From any folder: our kernels are not called ``kernels``, which transformers imports."""
    code = "import unit_fast_kernels.attention, transformers, unit_fast.model; print(unit_fast.UniT.__name__)"
    result = _run(code, ROOT if where == "root" else tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "UniT"


def test_importing_the_package_is_cheap():
    result = _run("import sys, unit_fast; print('torch' in sys.modules)", ROOT)
    assert result.stdout.strip() == "False", result.stderr


def test_importing_the_loader_loads_neither_the_model_nor_checkpoints():
    rooms = ("model", "detection", "weights", "evaluation", "run")
    code = f"import sys, unit_fast.data.loader; print(*(r for r in {rooms} if 'unit_fast.' + r in sys.modules))"
    result = _run(code, ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_a_training_process_does_not_import_what_assembles_kernels():
    code = "import sys, unit_fast.run.train; print([m for m in sys.modules if 'unit_fast_kernels.assembly' in m])"
    result = _run(code, ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_package_works_without_the_optional_libraries():
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL)
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "unit_fast").rglob("*.py")
        if not p.name.startswith("__") and p.parent.name != "commands"
    )
    kernels = [
        ".".join(("unit_fast_kernels", *p.relative_to(ROOT / "kernels").with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for p in (ROOT / "kernels").rglob("*.py")
    ]
    code = "import sys\n" + blocked + "\n".join(f"import {m}" for m in modules + kernels)
    result = _run(code, ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


def test_ruff_and_layers():
    bin_folder = Path(sys.executable).parent
    for command in ([bin_folder / "ruff", "check", "."], [bin_folder / "ruff", "format", "--check", "."]):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
    result = subprocess.run([bin_folder / "lint-imports"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def _imports(path: Path) -> set[str]:
    """What a file imports, anywhere in it, with the name that comes from a module as its last part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


KERNEL_LAYERS = (
    {"shared"},
    {"adamw", "assignment", "attention", "attribute_loss", "dropout", "frozen_bn_act", "match_cost"},
    {"bias_act_dropout", "residual_norm", "set_loss"},
    {"assembly"},
)
"""Rooms of the kernels, from the bottom: no operator imports another but those that build on it."""


def test_kernels_import_downwards_and_nothing_of_unit():
    """Here because import-linter does not see ``unit_fast_kernels``, which has no ``__init__.py``, in an editable
    install."""
    floor = {room: i for i, rooms in enumerate(KERNEL_LAYERS) for room in rooms}
    for path in (ROOT / "kernels").rglob("*.py"):
        room = path.relative_to(ROOT / "kernels").with_suffix("").parts[0]
        for package, *rest in (name.split(".") for name in _imports(path)):
            assert package != "unit_fast", path
            assert package != "unit_fast_kernels" or rest[0] == room or floor[rest[0]] < floor[room], (path, rest)


def test_operators_are_the_only_door_to_the_kernels():
    doors = {
        path.relative_to(ROOT / "unit_fast").as_posix()
        for path in (ROOT / "unit_fast").rglob("*.py")
        if any(m.split(".")[0] == "unit_fast_kernels" for m in _imports(path))
    }
    assert doors == {"ops.py", "report/kernels.py"}  # the report prints what the kernels are, and calls none


def test_kernels_have_a_test_of_the_same_name():
    stems = {operator.reference.__module__.split(".")[1] for operator in ops.OPERATORS.values()}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert stems <= tests, f"no test file for {sorted(stems - tests)}"


def test_no_machine_path_and_no_unsafe_load_is_committed():
    """No path of a developer's machine; no pickle that runs code: torch.load and np.load only in their safe forms."""
    files = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "/" + "work/" not in text, name
        if not name.startswith("unit_fast/"):
            continue
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
                safe = settings.get("weights_only") == "True" or settings.get("allow_pickle") == "False"
                assert safe, f"{name}:{node.lineno}: {ast.unparse(node)}"
