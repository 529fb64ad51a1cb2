"""The choice of the engine."""

import sys

import pytest

from tests.data.image_roots import needs_dali, photo_config, photographs, steps_of, with_data
from unit_fast.config import DataConfig
from unit_fast.data.images import dali
from unit_fast.data.images.engine import engine_of
from unit_fast.errors import UserError


def test_dali_that_cannot_be_loaded_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="cannot be loaded .* take --data.engine torchvision"):
        dali.check("decode", "cpu", None)


@needs_dali
def test_engines_that_cannot_be_are_refused(monkeypatch, tmp_path):
    assert engine_of(DataConfig()) == "dali"
    assert engine_of(DataConfig(cache_mib=5)) == "torchvision"
    assert engine_of(DataConfig(engine="dali", cache_mib=5)) == "dali"
    for unfit in ({"dali_graph": "whole"}, {"decoder": "mixed"}):
        with pytest.raises(UserError, match="--data.cache-mib 5: .* take 0 or --data"):
            engine_of(DataConfig(engine="dali", cache_mib=5, **unfit))
    config = photo_config(tmp_path, photographs(1))
    with pytest.raises(UserError, match="--data.decoder mixed: decodes on a GPU"):
        steps_of(with_data(config, engine="dali", decoder="mixed"))
    monkeypatch.setattr("unit_fast.data.images.engine.has_dali", lambda: False)
    assert engine_of(DataConfig()) == "torchvision"
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        engine_of(DataConfig(engine="dali"))
