"""Recipes: the published configurations by name."""

import dataclasses

import pytest

from unit_fast.config import RunConfig, from_dict, to_dict
from unit_fast.data.generated import scene, text, world
from unit_fast.errors import UserError
from unit_fast.recipes import RECIPES, batch_note, recipe
from unit_fast.recipes.paper import SAMPLINGS, sampling
from unit_fast.tasks import TASKS, get_task

# name, tasks, shared decoder, policy, steps, criterion: SPEC 6.2
MMF = [
    ("coco", ["coco"], False, "update_all", 150_000, "coco"),
    ("vg", ["vg"], False, "update_all", 150_000, "vg"),
    ("vqa2", ["vqa2"], False, "update_all", 150_000, "vqa2"),
    ("coco_vqa2", ["coco", "vqa2"], True, "skip", 300_000, "vqa2"),
    ("coco_vqa2_separate", ["coco", "vqa2"], False, "update_all", 300_000, "vqa2"),
    ("vg_vqa2", ["vg", "vqa2"], True, "skip", 300_000, "vqa2"),
    ("vg_vqa2_separate", ["vg", "vqa2"], False, "update_all", 300_000, "vqa2"),
    ("coco_vg_vqa2", ["coco", "vg", "vqa2"], True, "skip", 450_000, "vqa2"),
    ("coco_vg_vqa2_separate", ["coco", "vg", "vqa2"], False, "update_all", 450_000, "vqa2"),
    ("all8_shared", list(TASKS), True, "update_all", 500_000, "vqa2"),
    ("all8_separate", list(TASKS), False, "update_all", 500_000, "vqa2"),
    ("coco_no_task_embedding", ["coco"], False, "update_all", 150_000, "coco"),
    ("all8_shared_no_task_embedding", list(TASKS), True, "update_all", 500_000, "vqa2"),
]


@pytest.mark.parametrize(("name", "tasks", "share", "unused", "steps", "criterion"), MMF, ids=[m[0] for m in MMF])
def test_published_configurations(name, tasks, share, unused, steps, criterion):
    config = recipe(name)
    assert config.recipe == name
    assert set(config.model.tasks) == {get_task(t).name for t in tasks}
    assert config.model.decoder.share is share
    assert config.optim.unused == unused
    assert (config.steps, config.criterion) == (steps, criterion)
    assert (config.batch_per_process, config.accumulate, config.target_batch) == (0, 0, 64)
    assert config.effective_batch == 64
    embedded = "no_task_embedding" not in name
    assert config.model.encoder.task_embedding is config.model.text.task_embedding is embedded
    assert {t.queries for n, t in config.model.tasks.items() if TASKS[n].is_detection} <= {100}
    assert {t.queries for n, t in config.model.tasks.items() if not TASKS[n].is_detection} <= {25}


def test_table_a1():
    config = recipe("all8_shared")
    model, optim = config.model, config.optim
    assert (model.encoder.width, model.encoder.layers, model.decoder.width, model.decoder.layers) == (256, 6, 768, 6)
    assert (model.encoder.heads, model.decoder.heads, model.decoder.ffn_width) == (8, 8, 2048)
    assert (optim.lr, optim.lr_backbone, optim.weight_decay, optim.warmup_steps) == (5e-5, 1e-5, 1e-4, 2000)
    assert (optim.max_norm, optim.rule, optim.betas, optim.eps) == (0.1, "hf", (0.9, 0.999), 1e-8)
    assert (config.eval_every, config.save_every, config.keep_checkpoints) == (10_000, 10_000, 5)


def test_table_a2():
    assert sampling("all8") == {
        "detection_coco": 0.20, "detection_visual_genome": 0.07, "vqa2": 0.26, "visual_entailment": 0.12,
        "glue_qnli": 0.10, "glue_mnli_mismatched": 0.10, "glue_qqp": 0.10, "glue_sst2": 0.05,
    }  # fmt: skip
    assert sum(sampling("all8").values()) == pytest.approx(1)
    assert sampling("ablation") == {"detection_coco": 0.3, "visual_entailment": 0.5, "glue_mnli_mismatched": 0.2}
    assert set(sampling("detection_vqa").values()) == {0.33}
    assert recipe("all8_shared").ratios == recipe("all8_separate").ratios == sampling("all8")
    assert recipe("ablation").ratios == sampling("ablation")
    assert set(SAMPLINGS) == {"all8", "detection_vqa", "ablation"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete(name):
    config = recipe(name)
    assert set(config.ratios) == set(config.model.tasks), "ratios are explicit"
    assert sum(config.ratios.values()) == pytest.approx(1, abs=0.011)
    assert RECIPES[name].about
    assert from_dict(RunConfig, to_dict(config)) == config


def test_skip_variant_changes_nothing_else():
    plain, skip = to_dict(recipe("all8_shared")), to_dict(recipe("all8_shared_skip"))
    assert skip["optim"].pop("unused") == "skip"
    assert plain["optim"].pop("unused") == "update_all"
    plain.pop("recipe"), skip.pop("recipe")
    assert plain == skip


def test_unknown_names_give_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'all8_shred'; nearest: all8_shared"):
        recipe("all8_shred")
    with pytest.raises(UserError, match="nearest: all8"):
        sampling("all9")


def test_batch_note_states_the_paper_beside_the_effective_batch():
    config = dataclasses.replace(recipe("coco"), batch_per_process=2, accumulate=8)
    assert "effective batch 16 (2 x 8 accumulated), the paper's is 64" in batch_note(config)
    assert "effective batch 64 (chosen for the device), the paper's is 64" in batch_note(recipe("coco"))


def test_the_demo_fits_its_world():
    config, quick = recipe("demo"), recipe("demo_quick")
    tasks = config.model.tasks
    assert tasks["vqa2"].outputs == len(text.ANSWERS)
    assert tasks["detection_visual_genome"].outputs == len(world.VG_OBJECT_IDS) + 2
    assert config.model.loss.attribute_outputs == len(world.VG_ATTRIBUTE_IDS) + 1
    assert config.model.text.vocab_size == len(text.VOCABULARY)
    assert min(t.queries for n, t in tasks.items() if TASKS[n].is_detection) > scene.MOST
    assert config.data.short_side == config.data.max_side == scene.SIDE, "neither scaled nor padded"
    assert quick.model == config.model
    assert quick.steps < config.steps / 10
