"""The configuration: JSON and back, and errors that name the key."""

import dataclasses
import inspect
import json
import re

import pytest

from unit_fast import config as module
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
        ({"model": {"decoder": {"layrs": 3}}}, r"RunConfig.model.decoder: unknown key 'layrs'; nearest: layers"),
        ({"steps": "many"}, r"RunConfig.steps: expected int, found 'many'"),
        ({"steps": True}, r"RunConfig.steps: expected int, found True"),
        ({"precision": "fp8"}, r"RunConfig.precision: 'fp8' is not one of 'auto', 'fp32', 'tf32', 'bf16'"),
        ({"optim": {"betas": [0.9]}}, r"RunConfig.optim.betas: expected 2 values, found 1"),
        ({"ratios": [1]}, r"RunConfig.ratios: expected an object"),
        ({"model": {"tasks": {"vqa2": {"queries": 3}}}}, r"RunConfig.model.tasks.vqa2: .*outputs"),
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
    classes = [c for _, c in inspect.getmembers(module, dataclasses.is_dataclass) if c.__module__ == module.__name__]
    assert len(classes) >= 9
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
