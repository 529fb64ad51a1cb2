"""Checkpoints: whole or absent, verified, executing nothing."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import sys

import pytest
import safetensors.torch
import torch

from tests.models import small_config
from unit_fast import faults
from unit_fast.config import RunConfig
from unit_fast.config_check import check_resumable
from unit_fast.errors import UserError
from unit_fast.model import UniT
from unit_fast.weights import checkpoint
from unit_fast.weights.checkpoint import CONFIG, MANIFEST, STATE, STATE_JSON, WEIGHTS
from unit_fast.weights.files import MAX_HEADER, digest, load_weights

MODEL = small_config("sst2")
RUN = RunConfig(model=MODEL, steps=7)
WIDER = dataclasses.replace(MODEL.decoder, width=64)


def state(step=3):
    return {
        "step": step,
        "moments": {"a/b": {"exp_avg": torch.randn(3, 4), "step": torch.tensor(5.0)}},
        "rng": torch.get_rng_state(),
        "list": [1, 2.5, None, True, "text", torch.arange(3, dtype=torch.int32)],
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UniT(MODEL)


@pytest.fixture
def saved(tmp_path, model):
    """A run folder with one checkpoint, ``last`` pointing to it."""
    parent = tmp_path / "run" / "checkpoints"
    folder = checkpoint.save(parent, "step_000003", model.state_dict(), RUN, state())
    checkpoint.point(parent, "last", "step_000003")
    return folder


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    faults.disarm()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_round_trip(tmp_path, form):
    kept, model = state(), UniT(MODEL).to(memory_format=form)
    folder = checkpoint.save(tmp_path, "step_000003", model.state_dict(), RUN, kept)
    checkpoint.verify(folder)
    assert same(kept, checkpoint.load_state(folder))
    assert same(dict(model.state_dict()), load_weights(folder / WEIGHTS))
    assert checkpoint.config_of(folder) == RUN


@pytest.mark.parametrize("what", ["run", "checkpoints", "step", "last", "file"])
def test_load_model_takes_runs_checkpoints_and_files(saved, model, what):
    path = {
        "run": saved.parents[1], "checkpoints": saved.parent, "step": saved, "last": saved.parent / "last",
        "file": saved / WEIGHTS,
    }[what]  # fmt: skip
    loaded, config = checkpoint.load_model(path)
    assert config == RUN
    assert same(dict(model.state_dict()), dict(loaded.state_dict()))


def test_load_model_prefers_the_best(saved, model):
    parent = saved.parent
    other = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    checkpoint.save(parent, "step_000005", other, RUN)
    checkpoint.point(parent, "best", "step_000005")
    loaded, _ = checkpoint.load_model(parent.parent)
    assert same(other, dict(loaded.state_dict()))


def test_averaged_weights_are_apart(tmp_path, model):
    average = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    folder = checkpoint.save(tmp_path, "step_000001", model.state_dict(), RUN, None, average)
    assert same(average, dict(checkpoint.load_model(folder, ema=True)[0].state_dict()))
    assert same(dict(model.state_dict()), dict(checkpoint.load_model(folder)[0].state_dict()))


@pytest.mark.parametrize(
    ("path", "text"),
    [("nowhere", "no such run"), (".", "holds no checkpoint"), ("run", "no averaged weights.*--ema-decay")],
)
def test_nothing_to_load(tmp_path, saved, path, text):
    with pytest.raises(UserError, match=text):
        checkpoint.load_model(tmp_path / path, ema=path == "run")


def test_links_are_replaced_and_older_checkpoints_pruned_but_those_pointed_to(tmp_path, model):
    weights = {"x": torch.zeros(2)}
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, f"step_{step:06d}", weights, RUN)
        checkpoint.point(tmp_path, "last", f"step_{step:06d}")
        if step == 1:
            checkpoint.point(tmp_path, "best", "step_000001")
    checkpoint.prune(tmp_path, 2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best", "last", "step_000001", "step_000003", "step_000004"]
    assert (tmp_path / "last" / WEIGHTS).samefile(tmp_path / "step_000004" / WEIGHTS)
    assert not os.path.isabs(os.readlink(tmp_path / "last")), "a run folder can be moved"


# ------------------------------------------------------------------------------------------------------ corruption


def test_every_flipped_bit_and_every_cut_is_found(saved):
    for name in (WEIGHTS, STATE, STATE_JSON, CONFIG):
        path = saved / name
        good = path.read_bytes()
        for place in range(0, len(good), max(1, len(good) // 64)):
            bad = bytearray(good)
            bad[place] ^= 1 << (place % 8)
            path.write_bytes(bad)
            with pytest.raises(UserError, match=f"{name}.*checksum"):
                checkpoint.verify(saved)
            path.write_bytes(good[:place])
            with pytest.raises(UserError, match=f"{name}.*bytes"):
                checkpoint.verify(saved)
        path.write_bytes(good)
        checkpoint.verify(saved)


def test_a_lost_manifest_leaves_the_digest_inside(saved, model, caplog):
    """Every bit of the tensors counts; the file travels alone."""
    (saved / MANIFEST).unlink()
    checkpoint.load_model(saved)
    assert not caplog.records
    whole = (saved / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 0x10
        (saved / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError, match="differ from the checksum inside it"):
            load_weights(saved / WEIGHTS)


def test_a_path_that_is_not_utf_8(saved):
    folder = saved.rename(saved.with_name("r\udcffw"))
    assert same(load_weights(folder / WEIGHTS), dict(checkpoint.load_model(folder)[0].state_dict()))


def test_tensors_that_changed_places_are_found(saved):
    """The same bytes under another name or shape."""
    tensors = load_weights(saved / WEIGHTS)
    names = [n for n, t in tensors.items() if t.dim() == 1]
    pairs = [(a, b) for a in names for b in names if a < b and tensors[a].shape == tensors[b].shape]
    a, b = next((a, b) for a, b in pairs if not torch.equal(tensors[a], tensors[b]))
    swapped = tensors | {a: tensors[b], b: tensors[a]}
    assert digest(swapped) != digest(tensors)
    assert digest(tensors | {a: tensors[a][None]}) != digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == digest(tensors)


def test_weights_without_any_checksum_load_and_say_so(saved, model, caplog):
    """Those of before, and other programs'."""
    safetensors.torch.save_file(load_weights(saved / WEIGHTS), saved / WEIGHTS)
    (saved / MANIFEST).unlink()
    loaded, _ = checkpoint.load_model(saved)
    assert same(dict(model.state_dict()), dict(loaded.state_dict()))
    assert "has no checksum, neither inside nor in a manifest" in caplog.text


@pytest.mark.parametrize("name", [WEIGHTS, STATE, STATE_JSON, CONFIG, MANIFEST])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=name):
        checkpoint.verify(saved)


def test_load_model_refuses_a_corrupt_checkpoint(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors.*checksum"):
        checkpoint.load_model(saved)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"../x": {"bytes": 1, "sha256": ""}}', '{"model.safetensors": 3}'])
def test_a_manifest_that_is_none(saved, content):
    (saved / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=MANIFEST):
        checkpoint.verify(saved)


def test_every_entry_of_the_state_is_needed(saved):
    """Deleting any tensor fails; nothing falls back to a fresh value."""
    tensors = load_weights(saved / STATE)
    for name in tensors:
        safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, saved / STATE)
        with pytest.raises(UserError, match="lacks tensor"):
            checkpoint.load_state(saved)
    safetensors.torch.save_file(tensors | {"more": torch.zeros(1)}, saved / STATE)
    with pytest.raises(UserError, match="1 tensors not named.*more"):
        checkpoint.load_state(saved)


def test_weights_alone_cannot_be_resumed(tmp_path, model):
    folder = checkpoint.save_weights(tmp_path / "converted", model, RUN)
    with pytest.raises(UserError, match="without a training state.*--init-from"):
        checkpoint.load_state(folder)


# ------------------------------------------------------------------------------------------------- another config


def test_weights_of_another_model_are_refused_before_reading(saved, model):
    config = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, decoder=WIDER))
    (saved / CONFIG).write_text(json.dumps(dataclasses.asdict(config)))
    (saved / MANIFEST).unlink()  # otherwise the checksum speaks first
    with pytest.raises(UserError, match=r"model\.safetensors.*(tensors missing|is torch).*another config"):
        checkpoint.load_model(saved)


def test_dtypes_are_not_cast_silently(saved, model):
    half = {k: v.half() if v.dtype == torch.float32 else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(half, saved / WEIGHTS)
    with pytest.raises(UserError, match=r"float16.*float32"):
        load_weights(saved / WEIGHTS, expected=model.state_dict())


def changed(**changes):
    """``RUN`` with other fields; dicts change fields within a part."""
    parts = {
        k: dataclasses.replace(getattr(RUN, k), **v) for k, v in changes.items() if k in ("optim", "data", "model")
    }
    return dataclasses.replace(RUN, **(changes | parts))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 900}, {"eval_every": 3}, {"save_every": 1}, {"log_every": 2}, {"device": "cpu"},
        {"graph": "off"}, {"data": {"cache_mib": 9}},
        {"data": {"root": "/elsewhere"}}, {"data": {"workers": 3}}, {"data": {"paths": {"coco.train": "x"}}},
    ],
)  # fmt: skip
def test_harmless_changes_may_be_made(saved, change):
    assert check_resumable(saved, RUN, changed(**change))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 9}, "seed"), ({"accumulate": 2}, "accumulate"),
        ({"ratios": {"glue_sst2": 1.0}}, r"ratios\.glue_sst2"),
        ({"optim": {"lr": 1.0}}, r"optim\.lr"), ({"data": {"short_side": 9}}, r"data\.short_side"),
        ({"freeze": ("text",)}, "freeze"), ({"ema_decay": 0.9}, "ema_decay"),
    ],
)  # fmt: skip
def test_other_changes_are_refused_by_name_unless_allowed(saved, change, name):
    with pytest.raises(UserError, match=f"another config: {name} was .* is .*--allow-changed"):
        check_resumable(saved, RUN, changed(**change))
    assert check_resumable(saved, RUN, changed(**change), [name.replace("\\", "")])


def test_the_model_may_never_change(saved):
    new = changed(model={"decoder": WIDER})
    with pytest.raises(UserError, match=r"model\.decoder\.width was 48, is 64.*the model cannot change"):
        check_resumable(saved, RUN, new, ["model"])


def test_an_unknown_name_to_allow(saved):
    with pytest.raises(UserError, match=r"--allow-changed optim\.lrr: no such field; nearest: optim\.lr"):
        check_resumable(saved, RUN, RUN, ["optim.lrr"])


# --------------------------------------------------------------------------------------------------- hostile files


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "inside a state dict"])
def test_a_pth_file_cannot_execute_code(tmp_path, form):
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"model": Evil(canary)}))
    else:
        content = {"model": {"w": torch.zeros(2), "x": Evil(canary)}} if form.startswith("inside") else Evil(canary)
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(UserError, match=r"evil\.pth: refused.*execute code.*(mkdir|operand)"):
        load_weights(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.exists(), "armed: the file does execute code when it is read carelessly"


def test_foreign_state_dicts_are_read(tmp_path):
    weights = {"module.a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for name, content in (
        ("plain.pth", weights),
        ("detr.pth", {"model": weights}),
        ("l.ckpt", {"state_dict": weights}),
    ):
        torch.save(content, tmp_path / name)
        assert same(weights, load_weights(tmp_path / name))
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    assert same(weights, load_weights(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds no state dict but list"), ({}, "holds no state dict"), ({"a": 3}, "a is not a tensor"),
        ({1: torch.zeros(1)}, "not a tensor"),
    ],
)  # fmt: skip
def test_a_pth_file_without_tensors(tmp_path, content, text):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=text):
        load_weights(tmp_path / "x.pth")


def _header(entries: bytes, size=None) -> bytes:
    return struct.pack("<Q", len(entries) if size is None else size) + entries


@pytest.mark.parametrize(
    "data",
    [
        b"", b"abc", b"\x00" * 8, _header(b"{}", 2**63), _header(b"{}", MAX_HEADER + 1), _header(b"not json"),
        _header(b"[" * 5000), _header(b"[]"), _header(b'{"a": 3}'),
        _header(b'{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4000000]}}'),
        _header(b'{"a": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}'), b"\x80", b"PK\x03\x04",
        b"\xff\xd8\xff\xe0 a photograph", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    ],
    ids=range(15),
)  # fmt: skip
def test_files_that_are_no_weights(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        load_weights(path)


def test_too_many_tensors_are_refused_before_reading(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "many.safetensors"
    path.write_bytes(_header(json.dumps({f"t{i}": entry for i in range(10_001)}).encode()))
    with pytest.raises(UserError, match="10001 entries"):
        load_weights(path)


@pytest.mark.parametrize("begin", [b"\x80\x02", b"PK"])
def test_a_header_length_that_looks_like_a_pickle_or_a_zip(tmp_path, begin):
    entries = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    length = int.from_bytes(begin, "little")
    path = tmp_path / "w.safetensors"
    path.write_bytes(_header(entries + b" " * (length - len(entries))) + b"\x07")
    assert path.read_bytes().startswith(begin), "armed"
    assert load_weights(path)["a"].tolist() == [7]


def test_names_from_a_file_are_printed_harmlessly(tmp_path, model):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"\x1b[2J\nroot": torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        load_weights(path, expected={"a": torch.zeros(1)})
    torch.save({"\x1b[2J": 3}, path)
    with pytest.raises(UserError) as second:
        load_weights(path)
    assert not any(c < " " for c in str(caught.value) + str(second.value))


# ------------------------------------------------------------------------------------------------------ the disk


def test_a_full_disk_leaves_what_was_there(saved, model, monkeypatch):
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(checkpoint.SaveError, match=r"step_000004.*MiB needed, 0 MiB free"):
        checkpoint.save(saved.parent, "step_000004", model.state_dict(), RUN, state())
    assert sorted(p.name for p in saved.parent.iterdir()) == ["last", "step_000003"]
    checkpoint.verify(saved)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
@pytest.mark.parametrize("limit", [100, 5_000, 60_000])
def test_a_write_that_fails_half_way_leaves_what_was_there(saved, model, limit):
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(checkpoint.SaveError, match="could not be written"):
            checkpoint.save(saved.parent, "step_000003", model.state_dict(), RUN, state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["last", "step_000003"]
    checkpoint.verify(saved)


class Killed(BaseException):
    pass


POINTS = [f"save.before.{n}" for n in (WEIGHTS, CONFIG, STATE, STATE_JSON, "manifest", "rename")]
POINTS += ["save.between.renames", "save.after.rename", "point.last"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["step_000003", "step_000004"])
def test_a_save_cut_at_any_point_leaves_an_intact_checkpoint(saved, model, point, name):
    """As after a kill: nothing runs after the point. One of the two, old or new, loads whole, and the rest is swept."""

    def die():
        raise Killed

    faults.arm(point, die)
    parent = saved.parent

    def save():
        checkpoint.save(parent, name, model.state_dict(), RUN, state(step=9))
        checkpoint.point(parent, "last", name)

    if point == "save.between.renames" and name == "step_000004":
        save()
        return  # there is no second rename without an old one
    with pytest.raises(Killed):
        save()
    faults.disarm()
    checkpoint.sweep(parent)
    assert not [p for p in parent.iterdir() if ".tmp-" in p.name or ".old-" in p.name]
    for folder in checkpoint.numbered(parent):
        checkpoint.verify(folder)
    checkpoint.verify(parent / "last")
    assert checkpoint.load_state(checkpoint.numbered(parent)[0])["step"] in (3, 9)
