"""What a run starts from: frozen parts, initial weights, and settings that are refused."""

import dataclasses

import pytest
import torch

from tests.run.test_step import batch_of
from tests.small_runs import rows, run, small_config
from unit_fast.errors import UserError
from unit_fast.run.setup import build
from unit_fast.schedule import lr_multiplier
from unit_fast.weights import checkpoint

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def moved_by(config, out) -> set[str]:
    start, _, _ = build(config, CPU)
    model = run(config, out).model
    own = dict(start.named_parameters())
    return {n for n, p in model.named_parameters() if not torch.equal(p, own[n])}


def test_frozen_encoders_keep_their_weights(root, tmp_path):
    moved = moved_by(small_config(root, freeze=("image", "text")), tmp_path / "a")
    still = ("backbone.", "input_proj.", "image_encoder.layers.", "text_encoder.layers.", "text_encoder.word")
    assert not [n for n in moved if n.startswith(still)]
    assert "image_encoder.task_embedding.weight" in moved
    assert "text_encoder.task_embedding.weight" in moved
    assert [n for n in moved if n.startswith("decoder.")]
    assert [n for n in moved_by(small_config(root), tmp_path / "b") if n.startswith(still)]


def test_dropout_stays_active_in_frozen_parts(root):
    config = small_config(root, "sst2", freeze=("image", "text"))
    model, _, _ = build(config, CPU)
    batch, model = batch_of(config, "glue_sst2"), model.train()
    first, second = model(batch).scores, model(batch).scores
    assert not torch.equal(first, second)


def test_learning_rate_zero_freezes_the_backbone(root, tmp_path):
    moved = moved_by(small_config(root, optim={"lr_backbone": 0.0}), tmp_path / "a")
    assert not [n for n in moved if n.startswith("backbone.")]


def test_the_learning_rate_follows_warmup_and_cosine_in_both_groups(root, tmp_path):
    config = small_config(root, log_every=1, optim={"lr": 2e-3, "lr_backbone": 1e-4})
    folder = tmp_path / "run"
    result = run(config, folder)
    assert [r["lr"] for r in rows(folder)] == [2e-3 * lr_multiplier(k, 4, 20) for k in range(20)]
    assert rows(folder)[0]["lr"] == 0.0, "update 0 runs with lr 0"
    assert result.step == 20


# ------------------------------------------------------------------------------------------------ initial weights


def test_init_from_takes_all_that_fits_and_skips_what_it_is_told(root, tmp_path):
    first = run(small_config(root, "coco", "sst2", steps=3), tmp_path / "first")
    config = small_config(root, "coco", "vqa2", seed=8, init_from=str(tmp_path / "first"), skip_load=("class_embeds.",))
    model, _, filled = build(config, CPU)
    fresh, _, _ = build(dataclasses.replace(config, init_from=None, skip_load=()), CPU)
    source, own, random = first.model.state_dict(), model.state_dict(), fresh.state_dict()
    for name in own:
        if name in source and not name.startswith("class_embeds."):
            assert torch.equal(own[name], source[name]), name
        else:
            assert torch.equal(own[name], random[name]), name
    assert filled.started_from["model"].endswith("model.safetensors")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_from": "nowhere"}, "--init-from nowhere: no such"),
        ({"skip_load": ("x",)}, "skip_load.*give --init-from too"),
        ({"require_weights": True}, "require_weights: the backbone has not the published size"),
    ],
)
def test_initial_weights_that_cannot_be(root, changes, text):
    with pytest.raises(UserError, match=text):
        build(small_config(root, "sst2", **changes), CPU)


def test_damaged_initial_weights_are_refused_through_every_door(root, tmp_path):
    config = small_config(root, "sst2", steps=1)
    run(config, tmp_path / "run")
    folder = (tmp_path / "run" / "checkpoints" / "last").resolve()
    weights = bytearray((folder / checkpoint.WEIGHTS).read_bytes())
    weights[-100] ^= 0x40
    (folder / checkpoint.WEIGHTS).write_bytes(weights)
    doors = [tmp_path / "run", folder, folder / checkpoint.WEIGHTS]
    for text in ("differs from the checksum in the manifest", "differ from the checksum inside it"):
        for door in doors:
            with pytest.raises(UserError, match=text):
                build(dataclasses.replace(config, init_from=str(door)), CPU)
            with pytest.raises(UserError, match=text):
                checkpoint.load_model(door)
        (folder / checkpoint.MANIFEST).unlink(missing_ok=True)


def test_an_unknown_prefix_to_skip(root, tmp_path):
    run(small_config(root, "sst2", steps=1), tmp_path / "run")
    config = small_config(root, "sst2", init_from=str(tmp_path / "run"), skip_load=("clasifiers",))
    with pytest.raises(UserError, match="clasifiers.*nearest: classifiers"):
        build(config, CPU)


def test_a_device_that_is_none(root, tmp_path):
    with pytest.raises(UserError, match="device 'gpu9'"):
        run(small_config(root, "sst2", device="gpu9"), tmp_path / "run")
