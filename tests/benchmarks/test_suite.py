"""The suite for a machine with a card: its parts and their order, what it keeps, what it may write."""

import json
import sys
import zipfile

import pytest
import torch

from benchmarks import bench_step, gpu_suite
from benchmarks.step import card


def script(code):
    return (sys.executable, "-c", code)


def test_the_suite_keeps_what_it_has(tmp_path, capsys):
    sleep = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('here', flush=True); time.sleep(60)"
    row = {"benchmark": "bench_step", "case": "coco_b2", "provider": "ours", "device": "cuda", "gpu": "NVIDIA H200"}
    row |= {"status": "ok", "samples_per_s": 180.0, "kernels": 1600.0}
    write = f"open({str(tmp_path / 'results.jsonl')!r}, 'a').write({json.dumps(row)!r} + '\\n{{\"cut')"
    todo = [
        gpu_suite.Step("fine", script(f"print('done'); {write}"), 60),
        gpu_suite.Step("bad", script("raise SystemExit(3)"), 60),
        gpu_suite.Step("long", script(sleep), 3),
    ]
    done = gpu_suite.run(todo, tmp_path, 600, notes=["a note"])
    assert [(row["status"], row["exit_code"]) for row in done] == [("ok", 0), ("failed", 3), ("cut off", None)]
    said = [part.partition("\n") for part in (tmp_path / "log.txt").read_text().split("\n=== ")[1:]]
    assert [(first.partition(":")[0], rest.strip()) for first, _, rest in said] == [
        ("fine", "done"), ("bad", ""), ("long", "here"),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == done
    assert summary["notes"] == ["a note"]
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    verdicts = {goal["goal"]: goal["verdict"] for goal in summary["goals"]}
    assert verdicts["COCO DC5 800x1344, bfloat16, batch 2"] == "met"
    assert verdicts["COCO DC5 800x1344, bfloat16, batch 2: kernels"] == "missed"
    assert verdicts["COCO DC5 800x1344, bfloat16, batch 8"] == "not measured"
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "results.jsonl", "summary.json"}


def test_the_suite_ends_in_time(tmp_path):
    done = gpu_suite.run([gpu_suite.Step("late", script("1"), 60)], tmp_path, 1)
    assert [row["status"] for row in done] == ["not started"]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == done


def planted(folder, *benchmarks):
    (folder / "benchmarks").mkdir()
    for name in benchmarks:
        (folder / "benchmarks" / f"{name}.py").touch()
    (folder / "kernels").mkdir()
    for op in ("alpha", "residual_norm", "zeta"):
        (folder / "kernels" / f"{op}.py").touch()
    (folder / "kernels" / "attention").mkdir()  # an op of several files
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text("@pytest.mark.gpu\ndef test_a(): pass\n")
    (folder / "tests" / "test_b.py").write_text("import what_is_not_there\n")


def test_the_order_of_the_suite(tmp_path):
    names = ("bench_step", "bench_match", "bench_zeta", "bench_residual_norm", "bench_attention", "bench_alpha")
    planted(tmp_path, *names, "bench_nothing")
    first, *steps, compiled = gpu_suite.STEPS
    found = gpu_suite.steps(tmp_path, quick=False, cuda=True, folder=tmp_path)
    assert [step.name for step in found] == [
        first, "pytest", "bench_attention", "bench_match", *steps, "bench_residual_norm", "bench_alpha", "bench_zeta",
        compiled,
    ]  # fmt: skip
    assert not any("--quick" in step.command for step in found)
    assert all(step.limit_seconds <= 240 for step in found)
    found = gpu_suite.steps(tmp_path, quick=True, cuda=False, folder=tmp_path)
    assert [step.name for step in found] == [
        "bench_step", "bench_attention", "bench_match", "bench_residual_norm", "bench_alpha", "bench_zeta",
    ]  # fmt: skip
    assert all("--quick" in step.command for step in found)
    found = gpu_suite.steps(tmp_path, quick=True, cuda=False, folder=tmp_path, only=["bench_zeta"])
    assert [step.name for step in found] == ["bench_zeta"]
    with pytest.raises(ValueError, match="--only: unknown bench_eta; known: bench_step, bench_attention"):
        gpu_suite.steps(tmp_path, quick=True, cuda=False, folder=tmp_path, only=["bench_eta"])


def test_the_suite_has_every_benchmark(tmp_path):
    names = {step.name for step in gpu_suite.steps(tmp_path, quick=True, cuda=False)}
    assert names == {path.stem for path in (gpu_suite.ROOT / "benchmarks").glob("bench_*.py")}


def test_every_problem_of_the_step_is_in_a_part():
    asked = []
    for name, part in {step.name: step for step in gpu_suite.steps(gpu_suite.ROOT, quick=False, cuda=False)}.items():
        if name not in gpu_suite.STEPS:
            continue
        args = bench_step.parser().parse_args(part.command[part.command.index("--json") + 2 :])
        assert card.refused(args, on_card=True) is None
        assert args.minutes * 60 < part.limit_seconds
        providers = {"ours", *args.provider}
        assert ("compiled" in providers) == (name == "bench_step_compiled")
        asked += [(case, p) for case in card.cases_of(args.case, card.CARD) for p in providers]
    assert {(case, p) for case in card.CARD for p in card.PROVIDERS if p != "compiled"} <= set(asked)
    assert ("coco_b8", "compiled") in asked


def test_tests_run_in_as_many_processes_as_there_are_cores(tmp_path):
    planted(tmp_path)
    alone = gpu_suite.pytest_command(tmp_path, 16, False, tmp_path)
    spread = gpu_suite.pytest_command(tmp_path, 16, True, tmp_path)
    assert alone[-1] == spread[-1] == "tests/test_a.py"  # and not the file that cannot be imported
    assert "-n" not in alone
    at = spread.index("-n")
    assert spread[at : at + 4] == ("-n", "16", "--dist", "worksteal")
    assert not gpu_suite.has("no_such_package")
    (tmp_path / "no_such_package").mkdir()
    assert gpu_suite.has("no_such_package", tmp_path)


def test_a_log_is_not_larger_than_may_come_back(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"first\n" + b"x" * 5000 + b"\nlast")
    gpu_suite.shorten(path, 1000)
    text = path.read_bytes()
    assert len(text) <= 1000
    assert text.startswith(b"first\n")
    assert text.endswith(b"\nlast")
    assert b"bytes and a few left out" in text
    before = path.stat().st_mtime_ns
    gpu_suite.shorten(path, 1000)
    assert path.stat().st_mtime_ns == before
    gpu_suite.shorten(tmp_path / "none", 10)  # nothing there, nothing to do


def wheel(folder):
    """A wheel of one module."""
    info = "planted_wheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "planted_wheel-1.0-py3-none-any.whl", "w") as file:
        file.writestr("planted_wheel.py", "ANSWER = 42\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: planted-wheel\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_wheels_are_for_the_parts_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        gpu_suite.unpack(tmp_path / "wheels", tmp_path / "target")
    wheel(tmp_path / "wheels")
    part = gpu_suite.Step("part", script("import planted_wheel; print(planted_wheel.ANSWER)"), 60)
    monkeypatch.setattr(gpu_suite, "steps", lambda *arguments, **settings: [part])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--quick", "--wheels", str(tmp_path / "wheels")]) == 0
    assert (out / "log.txt").read_text().endswith("\n42\n")
    assert not gpu_suite.has("planted_wheel")
    assert "not measured: COCO" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a card says")
def test_the_suite_needs_a_card(tmp_path, capsys):
    assert gpu_suite.main(["--out", str(tmp_path / "x")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_of_another_card_is_refused(tmp_path, monkeypatch, capsys):
    row = {"benchmark": "bench_step", "case": "coco_b2", "provider": "ours", "device": "cuda", "gpu": "NVIDIA H100"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr(gpu_suite, "steps", lambda *arguments, **settings: [gpu_suite.Step("x", script("1"), 60)])
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "is of another card" in capsys.readouterr().err
