"""The configuration: files and back, and a wrong value of any field is refused by its name when it is made."""

import dataclasses
import inspect
import json
import math
import pathlib
import re

import pytest

from unit_fast import config as module
from unit_fast.checked import Checked
from unit_fast.config import ModelConfig, RunConfig, default_tasks, from_dict, load_config, to_dict, to_json
from unit_fast.errors import UserError


def test_json_and_back():
    run = RunConfig(
        ratios={"vqa2": 0.5, "glue_sst2": 0.5},
        freeze=("image",),
        model=ModelConfig(tasks=default_tasks("vqa2", "sst2", queries=1)),
    )
    assert from_dict(RunConfig, json.loads(to_json(run))) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, r"RunConfig: unknown key 'stepz'; nearest: steps"),
        ({"model": {"decoder": {"layrs": 3}}}, r"RunConfig: model.decoder: unknown key 'layrs'; nearest: layers"),
        ({"steps": "many"}, r"RunConfig: steps: expected int, found 'many'"),
        ({"steps": True}, r"RunConfig: steps: expected int, found True"),
        ({"precision": "fp8"}, r"RunConfig: precision: 'fp8' is not one of 'auto', 'fp32', 'tf32', 'bf16'"),
        ({"optim": {"betas": [0.9]}}, r"RunConfig: optim.betas: expected 2 values, found 1"),
        ({"ratios": [1]}, r"RunConfig: ratios: expected an object"),
        ({"model": {"tasks": {"vqa2": {"queries": 3}}}}, r"RunConfig: model.tasks.vqa2: .*outputs"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(RunConfig, change)


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="absent.json: no such file"):
        load_config(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json: not valid JSON"):
        load_config(tmp_path / "bad.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="folder.json: cannot be read"):
        load_config(tmp_path / "folder.json")
    (tmp_path / "other.json").write_text('{"seeed": 1}')
    with pytest.raises(UserError, match="other.json: unknown key 'seeed'; nearest: seed"):
        load_config(tmp_path / "other.json")


def test_every_field_has_a_docstring():
    found = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Checked)]
    classes = [c for c in found if c is not Checked]
    assert len(classes) >= 11
    for cls in classes:
        source = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            pattern = rf'^    {field.name}: [^\n]*(\n        [^\n]*|\n    \))*\n    """'
            assert re.search(pattern, source, re.MULTILINE), f"{cls.__name__}.{field.name} has no docstring"


def test_defaults_are_the_published_model():
    values = to_dict(RunConfig())
    assert values["model"]["decoder"]["width"] == 768
    assert values["model"]["tasks"]["vqa2"] == {"queries": 25, "outputs": 3129, "text_length": 25, "cls_only": False}
    assert values["optim"]["max_norm"] == 0.1


NOT_COUNTS, NOT_AMOUNTS, NOT_WEIGHTS = (0, -1), (-1,), (-0.5, math.nan, math.inf)
PROBABILITY = (-0.1, 1.0, 1.5, math.nan)
WRONG = {
    "steps": NOT_COUNTS, "batch_per_process": NOT_COUNTS, "accumulate": NOT_COUNTS, "target_batch": NOT_AMOUNTS,
    "early_stop": (-1,), "track": (("mlflow",), "wandb"), "eval_batch": NOT_COUNTS,
    "keep_checkpoints": NOT_COUNTS, "log_every": NOT_COUNTS, "eval_limit": NOT_AMOUNTS, "save_every": NOT_AMOUNTS,
    "threads": NOT_AMOUNTS, "eval_every": (-2,), "seed": (2**63, 10**400), "ema_decay": PROBABILITY,
    "task_batch": ({"vqa2": 0}, {"vqa": 4}), "criterion": ("vqa", ""), "eval_split": ("test",),
    "ratios": ({"vqa2": -1.0}, {"vqa2": math.nan}, {"vqa2": 0.0}, {"vqa": 1.0}), "freeze": (("imge",), "image"),
    "precision": ("fp16",), "deterministic": ("yes",), "graph": ("yes",),
    "model.tasks": ({}, {"vqa": module.TaskConfig(queries=1, outputs=2)}),
    "model.backbone.depth": (0, 15), "model.backbone.width": NOT_COUNTS, "model.backbone.norm": ("batch",),
    "model.backbone.group_channels": NOT_COUNTS, "model.backbone.norm_eps": NOT_WEIGHTS,
    "model.backbone.stride": (4, 64), "model.backbone.first_trained_stage": (-1, 6),
    "model.encoder.width": (*NOT_COUNTS, 255, 130), "model.encoder.layers": NOT_COUNTS,
    "model.encoder.heads": (*NOT_COUNTS, 3), "model.encoder.ffn_width": NOT_COUNTS,
    "model.encoder.dropout": PROBABILITY,
    "model.text.width": NOT_COUNTS, "model.text.layers": NOT_COUNTS, "model.text.heads": (*NOT_COUNTS, 5),
    "model.text.ffn_width": NOT_COUNTS, "model.text.vocab_size": NOT_AMOUNTS, "model.text.max_positions": NOT_COUNTS,
    "model.text.dropout": PROBABILITY, "model.text.init_std": NOT_WEIGHTS,
    "model.decoder.width": NOT_COUNTS, "model.decoder.layers": NOT_COUNTS, "model.decoder.heads": (*NOT_COUNTS, 5),
    "model.decoder.ffn_width": NOT_COUNTS, "model.decoder.dropout": PROBABILITY,
    "model.decoder.classifier_dropout": PROBABILITY, "model.decoder.separate_init": ("zeros",),
    **{
        f"model.loss.{name}": NOT_WEIGHTS
        for name in (
            "cost_class", "cost_bbox", "cost_giou", "weight_bbox", "weight_giou", "weight_attr", "no_object_weight",
            "detection_loss_weight",
        )
    },
    "model.loss.ce_normalisation": ("batch",), "model.loss.attribute_outputs": NOT_COUNTS,
    "model.loss.max_attributes": NOT_COUNTS, "model.loss.attribute_embedding": NOT_COUNTS,
    "model.loss.attribute_hidden": NOT_COUNTS,
    "optim.lr": NOT_WEIGHTS, "optim.lr_backbone": NOT_WEIGHTS, "optim.eps": NOT_WEIGHTS,
    "optim.weight_decay": NOT_WEIGHTS, "optim.betas": ((0.9,), (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)),
    "optim.rule": ("adam",), "optim.unused": ("all",), "optim.max_norm": (0.0, -1.0, math.nan),
    "optim.warmup_steps": NOT_AMOUNTS,
    "data.short_side": NOT_COUNTS, "data.max_side": (*NOT_COUNTS, 799), "data.crop_min": NOT_COUNTS,
    "data.crop_max": (*NOT_COUNTS, 383), "data.train_short_sides": ((), (480, 0), 480),
    "data.crop_short_sides": ((), (-1,)), "data.engine": ("pil",), "data.dali_graph": ("half",),
    "data.decoder": ("gpu",), "data.workers": NOT_AMOUNTS, "data.prefetch": NOT_COUNTS, "data.group": NOT_COUNTS,
    "data.cache_mib": NOT_AMOUNTS, "data.max_pixels": NOT_COUNTS, "data.max_bad_share": (-0.1, 1.1, math.nan),
    "data.paths": (("a", "b"), {"a": 1}), "data.columns": (("a", "b"), {"a": 1}),
    "data.answer_min_count": NOT_COUNTS, "data.answers_kept": NOT_COUNTS,
    "buckets.heights": NOT_COUNTS, "buckets.widths": NOT_COUNTS, "buckets.least_text": NOT_COUNTS,
    "buckets.least_targets": NOT_COUNTS,
}  # fmt: skip
"""Dotted name -> values of it that are refused, beside those of another type."""
ANY_TEXT = {
    "recipe", "device", "skip_load", "weights", "init_from", "started_from", "data.root", "data.vocab",
    "data.cache_dir",
}  # fmt: skip
"""Fields whose every text is checked where it is used: names of files, devices, parts of a model."""


def _fields(config=RunConfig, place=""):
    """(dotted name, type) of every field."""
    for field in dataclasses.fields(config):
        hint = inspect.get_annotations(config)[field.name]
        name = f"{place}.{field.name}" if place else field.name
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, name)
        else:
            yield name, hint


def _changed(name: str, value) -> RunConfig:
    """The default configuration with one field changed."""

    def change(config, first, *rest):
        return dataclasses.replace(config, **{first: change(getattr(config, first), *rest) if rest else value})

    return change(RunConfig(), *name.split("."))


def test_the_table_of_wrong_values_has_every_field():
    flags = {name for name, hint in _fields() if hint is bool}
    assert dict(_fields()).keys() == WRONG.keys() | ANY_TEXT | flags


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^(model\.\w+\.heads: is 8.*)?{re.escape(name)}"):
        _changed(name, value)


@pytest.mark.parametrize("name", [name for name, _ in _fields()])
def test_a_value_of_another_type_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: "):
        _changed(name, object())
    if dict(_fields())[name] is not str and name not in ANY_TEXT:
        with pytest.raises(UserError, match=rf"^{re.escape(name)}: "):
            _changed(name, "some")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("coco", {"queries": 0}, r"model\.tasks\.\*\.queries: is 0; give at least 1"),
        ("coco", {"outputs": 1}, r"model\.tasks\.detection_coco\.outputs: is 1"),
        ("vqa2", {"text_length": 2}, r"model\.tasks\.vqa2\.text_length: is 2; give at least 3"),
        ("vqa2", {"outputs": "many"}, r"outputs: expected int, found 'many'"),
        ("coco", {"cls_only": True}, r"cls_only: is True; give False"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name, changes, text):
    with pytest.raises(UserError, match=text):
        ModelConfig(tasks=default_tasks(name, **changes))


def test_fields_that_do_not_go_together():
    with pytest.raises(UserError, match="model.backbone.stride: is 16; give 32: depth 18"):
        module.BackboneConfig(depth=18)
    with pytest.raises(UserError, match="balanced_class_loss: is True; give False.*detection_visual_genome"):
        ModelConfig(loss=module.LossConfig(balanced_class_loss=True))


def test_texts_are_not_longer_than_the_positions():
    model = ModelConfig(text=module.TextConfig(max_positions=64), tasks=default_tasks("sst2", "vqa2"))
    assert {name: task.text_length for name, task in model.tasks.items()} == {"glue_sst2": 64, "vqa2": 25}


def test_what_stands_for_the_same_is_taken():
    run = RunConfig(freeze=["image"], data=module.DataConfig(root=pathlib.Path("a"), train_short_sides=[480]))
    assert (run.freeze, run.data.root, run.data.train_short_sides) == (("image",), "a", (480,))
    assert RunConfig(ema_decay=0) == RunConfig()


FILES = {
    "c.json": '{"steps": 7, "optim": {"lr": 1e-4, "max_norm": null}, "ratios": {"vqa2": 1}}',
    "c.yaml": "steps: 7\noptim:\n  lr: 1e-4  # YAML 1.2's number\n  max_norm: null\nratios: {vqa2: 1}\n",
    "c.toml": "steps = 7\n[optim]\nlr = 1e-4\n[ratios]\nvqa2 = 1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind_on_top_of_a_configuration(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    base = RunConfig(accumulate=3, ratios={"glue_sst2": 1.0}, optim=module.OptimConfig(warmup_steps=5, max_norm=0.2))
    norm = 0.2 if name == "c.toml" else None  # TOML has no null
    wanted = RunConfig(
        steps=7, accumulate=3, ratios={"vqa2": 1}, optim=module.OptimConfig(lr=1e-4, max_norm=norm, warmup_steps=5)
    )
    assert load_config(tmp_path / name, base) == wanted
    assert load_config(tmp_path / name).accumulate == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [", "a.yaml: not valid YAML"),
        ("a.yaml", "steps: 1\nsteps: 2\n", "not valid YAML .*line 1: the key 'steps' stands twice"),
        ("a.yaml", "data: &a {root: x}\nmodel: *a\n", "not valid YAML .*line 2: aliases"),
        ("a.yaml", "- 1\n", "a.yaml: expected an object with keys, found list"),
        ("a.yaml", "steps: 0\n", "a.yaml: steps: is 0; give at least 1"),
        ("a.yaml", "x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a.toml", "steps = ", "a.toml: not valid TOML"),
        ("a.toml", "[optim]\nlearning_rate = 1\n", "a.toml: optim: unknown key 'learning_rate'"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON"),
        ("a.json", "\ud800", "a.json: not UTF-8 text"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / name)
