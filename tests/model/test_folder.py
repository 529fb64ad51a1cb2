"""A model as a folder: written whole, read back to the same bits, with the names of its outputs."""

import pytest
import torch

from tests.models import random_batch, small_config
from unit_fast import UniT
from unit_fast.errors import UserError
from unit_fast.weights import checkpoint


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniT(small_config("coco", "sst2")).eval()


@pytest.fixture
def run(tmp_path):
    """A run folder with names, as far as they matter here."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "labels.json").write_text("{}")
    (tmp_path / "run" / "vocab.txt").write_text("[PAD]\n")
    return tmp_path / "run"


def test_what_is_written_is_read_back(model, run, tmp_path):
    folder = model.save_pretrained(tmp_path / "a", labels=run)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "labels.json", "model.safetensors", "vocab.txt"]
    read = UniT.from_pretrained(folder)
    assert not read.training
    batch = random_batch("coco", model.config)
    with torch.no_grad():
        assert torch.equal(read(batch).logits, model(batch).logits)
    again = read.save_pretrained(tmp_path / "b")  # the names go along
    assert (again / "labels.json").is_file()
    other, config = checkpoint.load_model(folder)
    assert config.model == model.config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_what_cannot_be_read_or_written(model, run, tmp_path):
    folder = model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="a: is there already"):
        model.save_pretrained(folder)
    with pytest.raises(UserError, match="labels: .*a has no labels.json"):
        model.save_pretrained(tmp_path / "b", labels=folder)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="run: has no config.json"):
        UniT.from_pretrained(run)
    (run / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        model.save_pretrained(run / "file" / "a")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="differ from the checksum"):
        UniT.from_pretrained(folder)
    wider = UniT(small_config("coco", "sst2", queries=6))
    other = wider.save_pretrained(tmp_path / "c")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit config.json.*query_embeds"):
        UniT.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        UniT.from_pretrained(folder)
