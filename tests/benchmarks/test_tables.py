"""The tables of the README: those of the results, with one meaning of "times as fast", and no two cards in one."""

import pytest

from benchmarks import tables
from tests.benchmarks.common import CARD, steps_of_a_card


def test_readme_tables_are_those_of_the_results(tmp_path, capsys):
    assert tables.main(["--check"]) == 0
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results: bench_step -->\nold\n<!-- end of results -->\nb\n")
    assert tables.main(["--check", "--file", str(readme)]) == 1
    assert "python -m benchmarks.tables" in capsys.readouterr().err
    assert tables.main(["--file", str(readme)]) == 0
    made = readme.read_text()
    assert made.startswith("a\n<!-- results: bench_step -->\n| machine | problem |")
    assert made.endswith(".\n<!-- end of results -->\nb\n")
    rows = tables.load("bench_step")
    ours, eager = (next(r for r in rows if (r["case"], r["provider"]) == ("coco", p)) for p in ("ours", "eager"))
    assert f"| {eager['time_ms'] / ours['time_ms']:.2f} |" in made
    with pytest.raises(FileNotFoundError, match="run: python -m benchmarks.bench_nothing"):
        tables.load("bench_nothing")
    with pytest.raises(FileNotFoundError, match="run: python -m benchmarks.bench_set_loss$"):
        tables.load("bench_set_loss_h999")
    readme.write_text("<!-- results: bench_nothing -->\n<!-- end of results -->\n")
    assert tables.main(["--file", str(readme)]) == 2
    assert "bench_nothing.jsonl is missing" in capsys.readouterr().err


def test_tables_of_a_cards_operators_have_both_times():
    rows = [
        {**CARD, "case": "c", "shape": "s", "dtype": "bfloat16", "provider": name, "captured_ms": captured,
         "time_ms": host, "p20_ms": host - 0.1, "p80_ms": host + 0.1, "percent_of_peak": share}
        for name, captured, host, share in (("ours", 0.02, 0.4, 85.0), ("eager", 0.06, 0.2, 30.0), ("loop", None, 9, 1))
    ]  # fmt: skip
    made = tables.table(rows).splitlines()
    assert made[2] == "| NVIDIA H200 | s, bfloat16 | eager | 0.06 | 3.00 | 0.2 (0.1 to 0.3) | 0.50 | 30 |"
    assert made[3] == "| NVIDIA H200 | s, bfloat16 | loop | not captured |  | 9 (8.9 to 9.1) | 22.50 | 1 |"
    assert made[4] == "| NVIDIA H200 | s, bfloat16 | ours | 0.02 |  | 0.4 (0.3 to 0.5) |  | 85 |"


def test_the_tables_of_a_cards_steps():
    ours, eager = steps_of_a_card()
    made = tables.table([ours, eager]).splitlines()
    assert made[2].startswith(
        "| NVIDIA H200 | detection_coco, 2 x 800x1344, 19 objects, bfloat16 | eager | out of memory"
    )
    assert "| ours | 222 | 9 (8.4 to 9.6) |  | 2 | 2 | 0 | 0 / 0 | 0.16 | 4 | 0.35 |" in made[3]
    assert len({line.count("|") for line in made[:4]}) == 1
    assert made[-1] == "Measured on NVIDIA H200; driver 580; torch 2.11.0; commit abc; 2026-11-27."
    kernels = tables.kernels_table([ours, eager]).splitlines()
    assert kernels[0] == "| ms (kernels) of a step on NVIDIA H200 | coco_b2, ours |"
    assert kernels[2] == "| AdamW (ours) | 1.00 (1) |"
    with pytest.raises(ValueError, match="one table would mix NVIDIA H200, NVIDIA H100"):
        tables.table([ours, *steps_of_a_card("NVIDIA H100 80GB HBM3")])
    with pytest.raises(ValueError, match="one table would mix NVIDIA H200, no card"):
        tables.table([ours, {**ours, "device": "cpu", "gpu": None}])
    with pytest.raises(ValueError, match="no row has kernels"):
        tables.kernels_table([eager])


def test_the_table_of_a_loader():
    stamp = {**CARD, "device": "cpu", "gpu": None, "driver": None, "shape": "8 images a batch", "case": "vqa"}
    rows = [
        {**stamp, "provider": name, "workers": workers, "images_per_s": speed, "images_per_s_p20": speed - 1,
         "images_per_s_p80": speed + 1, "cpu_ms_per_image": 9.0, "peak_memory_gib": 1.25}
        for name, workers, speed in (("ours", 2, 120.0), ("torchvision_v2", 3, 50.0))
    ]  # fmt: skip
    made = tables.table(rows).splitlines()
    assert (
        made[2] == "| Xeon, 2 threads | vqa, 8 images a batch | torchvision_v2 | 3 | 50 (49 to 51) | 2.40 | 9 | 1.25 |"
    )
    assert made[3] == "| Xeon, 2 threads | vqa, 8 images a batch | ours | 2 | 120 (119 to 121) |  | 9 | 1.25 |"
    assert made[-1] == "Measured on Xeon, 2 threads; torch 2.11.0; commit abc; 2026-11-27."


def test_the_headline_has_the_machine_measured_last_and_says_what_is_missing():
    ours = steps_of_a_card()[0]
    cpu = {**ours, "gpu": None, "device": "cpu", "samples_per_s": None, "driver": None}
    results = {
        "bench_step_h200": [ours, {**ours, "provider": "eager", "time_ms": 90.0}, {**ours, "case": "coco_b8"}],
        "bench_step": [
            {**cpu, "case": case, "cpu": name, "date": date, "provider": provider, "time_ms": ms}
            for name, date in (("Old", "2026-01-01"), ("New", "2026-02-01"))
            for case in ("coco", "coco_large")
            for provider, ms in (("ours", 10.0), ("eager", 25.0), ("library", 20.0))
        ],
    }
    made = tables.headline(results).splitlines()
    problem = "detection_coco, 2 x 800x1344, 19 objects, bfloat16"
    assert made[2] == f"| NVIDIA H200 | {problem} | 222 | 9 | 10.00 | not measured |"
    assert made[3] == f"| NVIDIA H200 | {problem} | 222 | 9 | not measured | not measured |"
    assert made[4] == made[5] == f"| New, 2 threads | {problem} |  | 10 | 2.50 | 2.00 |"
    assert len(made) == 9
    assert made[7].endswith("commit abc; 2026-11-27.")
