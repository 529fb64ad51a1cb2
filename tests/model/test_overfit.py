"""Real COCO photographs can be learned: 30 images, the small model, minutes on a CPU."""

import dataclasses
import json
from pathlib import Path

import pytest

from unit_fast.recipes import recipe
from unit_fast.run.train import train

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "realdata"


def _thirty_images(root: Path) -> None:
    source = REAL / "coco"
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    content["images"] = content["images"][:30]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (root / "coco" / "annotations").mkdir(parents=True)
    (root / "coco" / "images").mkdir()
    (root / "coco" / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    (root / "coco" / "images" / "train2017").symlink_to(source / "images" / "train2017")


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason="no real samples beside the repository")
def test_thirty_real_coco_images_are_overfitted(tmp_path):
    root, out = tmp_path / "root", tmp_path / "run"
    _thirty_images(root)
    config = recipe("small")
    coco = {"detection_coco": config.model.tasks["detection_coco"]}
    config = dataclasses.replace(
        config,
        threads=1,
        batch_per_process=10,
        log_every=1,
        eval_split="train",
        ratios={"detection_coco": 1.0},
        model=dataclasses.replace(config.model, tasks=coco),
        data=dataclasses.replace(config.data, root=str(root), augment=False),
    )
    run = train(config, out, progress="none")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    terms = [row["terms"] for row in rows if row["kind"] == "train"]
    for name in ("loss_bbox", "loss_giou"):
        key = next(k for k in terms[0] if k.endswith(name))
        first, last = (sum(t[key] for t in part) / len(part) for part in (terms[:10], terms[-10:]))
        assert last < 0.5 * first, f"{name}: {first:.3f} -> {last:.3f}"
    assert run.metrics["coco"]["AP50"] >= 0.3
