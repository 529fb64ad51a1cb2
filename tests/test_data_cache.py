"""The cache of annotations and word pieces: the same samples with and without it, whatever happens to its files."""

import dataclasses
import errno
import gc
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_roots import REAL, VOCABULARY, coco_file, coco_root, data, needs_real, task_config, whole_root, write
from tests.small_runs import ALL, small_config
from unit_fast import checkpoint
from unit_fast.config import RunConfig
from unit_fast.data import MissingSplit, cache, files, open_dataset, pickles, text, tokens
from unit_fast.data.check import check
from unit_fast.data.errors import Findings
from unit_fast.data.text import WordPieces
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

VQA = task_config("vqa2", outputs=4)


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 0)


@pytest.fixture
def world(tmp_path):
    return whole_root(tmp_path / "world")


def small(root, task, split="train", config=None, keep=None, **more):
    """A split of a small root; ``keep``: the cache folder, None for no cache."""
    config = config or (VQA if task == "vqa2" else task_config(task))
    changes = {"short_side": 40, "max_side": 100, "cache_dir": str(keep) if keep else "", **more.pop("data", {})}
    return open_dataset(task, split, data(root, **changes), config, augment=False, **more)


def plain(value):
    """A sample, or a list of them, for ``==``."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return type(value).__name__, value


def seen(dataset, images=True):
    """Everything that a user of a data set can see of it."""
    count = len(dataset)
    found = {
        "samples": [plain(dataset.get(i)) for i in range(count)] if images else None,
        "ids": [plain(dataset.sample_id(i)) for i in range(count)],
        "facts": list(dataset.facts.items()),
        "findings": [dataclasses.asdict(f) for f in dataset.findings.found.values()],
        "images": [(str(path), size) for path, size in dataset.image_paths()],
    }
    if dataset.task.has_text:
        found["texts"] = [dataset.text(i) for i in range(count)]
        found["lengths"] = dataset.text_lengths().tolist()
        found["tokens"] = [dataset.text_tokens(i) for i in range(count)]
    if dataset.task.is_detection:
        found["names"] = list(dataset.class_names.items())
        found["truth"] = dataset.coco_ground_truth() if dataset.has_targets else None
    return found


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


class Reads:
    """Which files were opened by readers, besides vocabulary and answer list."""

    def __init__(self, monkeypatch):
        self.names, real = [], files.open_file

        def open_file(path, *more):
            if "label2ans" not in str(path):
                self.names.append(os.path.basename(path))
            return real(path, *more)

        for module in (files, pickles):
            monkeypatch.setattr(module, "open_file", open_file)

    def take(self):
        names, self.names[:] = list(self.names), []
        return names


# --------------------------------------------------------------------------------------------------- same samples


def same_three_ways(open_with, keep, monkeypatch, images=True):
    """``open_with(folder)`` without a cache, into an empty one and from a full one; whether the last read no source."""
    reads = Reads(monkeypatch)
    without = seen(open_with(None), images)
    assert reads.take()
    cold = seen(open_with(keep), images)
    assert reads.take()
    warm_dataset = open_with(keep)
    assert reads.take() == []
    assert cold == without
    assert seen(warm_dataset, images) == without
    return warm_dataset


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("task", ALL)
def test_samples_of_the_generated_world(root, task, split, tmp_path, monkeypatch):
    run = small_config(root, *ALL)
    name = get_task(task).name

    def open_with(keep):
        config = dataclasses.replace(run.data, cache_dir=str(keep or ""))
        return open_dataset(name, split, config, run.model.tasks[name], augment=False)

    same_three_ways(open_with, tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("task", ALL)
def test_samples_facts_and_notes_of_a_root_with_oddities(world, task, split, tmp_path, monkeypatch):
    try:
        without = small(world, task, split)
    except MissingSplit as missing:
        message = str(missing)
        for _ in range(2):
            with pytest.raises(MissingSplit) as info:
                small(world, task, split, keep=tmp_path / "cache")
            assert str(info.value) == message
        return
    warm = same_three_ways(lambda keep: small(world, task, split, keep=keep), tmp_path / "cache", monkeypatch)
    if task in ("vg", "snli_ve", "mnli"):
        assert without.findings.found
        assert [f.count for f in warm.findings.found.values()] == [f.count for f in without.findings.found.values()]


@needs_real
@pytest.mark.parametrize("task", ALL)
def test_samples_of_real_data(task, tmp_path, monkeypatch):
    def open_with(keep):
        settings = data(REAL, short_side=48, max_side=64, cache_dir=str(keep or ""))
        return open_dataset(task, "train", settings, task_config(task), augment=False)

    # not every image of the sample of real data is in it
    same_three_ways(open_with, tmp_path / "cache", monkeypatch, images=get_task(task).kind == "glue")


def _vg_authors(root):
    write(root / "visual_genome/annotations/instances_train_split_by_coco_2017.json", _vg_instances())


def _vg_instances():
    content = coco_file()
    for image, name in zip(content["images"], ("VG_100K/1.jpg", "2.jpg")):
        image.update(file_name=name, width=60, height=40)
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["attribute_ids_max16"] = [3, 1] + [-1] * 14
    return content


def _vg_one_file(root):
    write(root / "visual_genome/annotations/instances_from_scene_graphs.json", _vg_instances())


def _vg_objects(root):
    (root / "visual_genome/scene_graphs.json").unlink()
    thing = {"object_id": 7, "names": ["automobile"], "x": 1, "y": 2, "w": 3, "h": 4}
    write(root / "visual_genome/objects.json", [{"image_id": 1, "objects": [thing, {**thing, "w": -2}]}])
    write(root / "visual_genome/attributes.json", [{"image_id": 1, "attributes": [{**thing, "attributes": ["green"]}]}])


def _imdb(root):
    records = [{"version": 1}] + [
        {"image_id": 9, "image_name": "COCO_train2014_000000000009", "question_id": i, "question_str": f"é{i} ?",
         "answers": ["yes"] * 6 + ["2"] * 4}
        for i in range(3)
    ]  # fmt: skip
    np.save(root / "vqa2/imdb_train2017.npy", np.array(records, dtype=object), allow_pickle=True)


def _parquet(root):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (root / "glue/QQP/train.tsv").unlink()
    (root / "glue/qqp").mkdir(parents=True, exist_ok=True)
    table = {"question1": ["a b", "c"], "question2": ["d", ""], "label": [1, 0], "idx": [0, 1]}
    parquet.write_table(pyarrow.table(table), root / "glue/qqp/train-00000.parquet")


@pytest.mark.parametrize(
    ("task", "change"),
    [("vg", _vg_authors), ("vg", _vg_one_file), ("vg", _vg_objects), ("vqa2", _imdb), ("qqp", _parquet)],
)
def test_samples_of_the_other_formats(world, task, change, tmp_path, monkeypatch):
    change(world)
    keep = tmp_path / "cache"
    without = seen(small(world, task))
    assert seen(small(world, task, keep=keep)) == without
    monkeypatch.setattr(cache.Cache, "_write", lambda *_: pytest.fail("made again"))
    assert seen(small(world, task, keep=keep)) == without


def test_arrays_of_large_files_are_mapped_and_cannot_be_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MAPPED", 0)
    for task in ("coco", "qqp", "vqa2"):
        small(world, task, keep=tmp_path / "cache")
        dataset = small(world, task, keep=tmp_path / "cache")
        contents = [dataset.objects.content] if task == "coco" else [dataset.rows, dataset._tokens.content]
        for array in (a for content in contents for a in content.arrays.values() if a.size):
            base = array
            while isinstance(base, np.ndarray) and base.base is not None:
                base = base.base
            assert type(base).__name__ == "mmap"
            assert type(array) is np.ndarray
            with pytest.raises(ValueError, match="read-only"):
                array.reshape(-1)[0] = array.reshape(-1)[0]


def test_small_sources_are_read_directly(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", 2**20)
    for task in ALL:
        small(world, task, keep=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- stale entries


def test_another_content_of_the_same_size_and_time_is_seen(tmp_path):
    root, keep = coco_root(tmp_path / "r"), tmp_path / "cache"
    path = root / "coco/annotations/instances_train2017.json"
    assert small(root, "coco", keep=keep).get(0)["labels"].tolist() == [1, 90]
    before, when = path.read_text(), path.stat()
    path.write_text(before.replace('"category_id": 90', '"category_id": 89').replace('"id": 90', '"id": 89'))
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert path.stat().st_size == when.st_size
    assert small(root, "coco", keep=keep).get(0)["labels"].tolist() == [1, 89]
    path.write_text(before)
    assert small(root, "coco", keep=keep).get(0)["labels"].tolist() == [1, 90]


def test_a_file_just_written_is_read_when_its_next_change_must_show(tmp_path):
    path = write(tmp_path / "file", "x")
    (state,) = cache._settled({"file": [path]})
    assert time.time_ns() - path.stat().st_ctime_ns >= cache._SETTLED_S * 1e9
    os.utime(path, ns=(time.time_ns() + 10**12,) * 2)  # a clock that is ahead is not waited for
    (later,) = cache._settled({"file": [path]})
    assert later["mtime_ns"] > state["mtime_ns"]


def test_a_new_time_of_writing_makes_a_new_entry_in_place_of_the_old_one(world, tmp_path):
    keep = tmp_path / "cache"
    first = seen(small(world, "qqp", keep=keep))
    gc.collect()
    old = entries(keep)
    assert [name.split("-")[0] for name in old] == ["rows", "words"]
    os.utime(world / "glue/QQP/train.tsv", ns=(1, 1))
    assert seen(small(world, "qqp", keep=keep)) == first
    new = entries(keep)
    assert len(new) == 2
    assert not set(new) & set(old)


def test_an_entry_that_is_open_is_not_removed(world, tmp_path):
    keep = tmp_path / "cache"
    held = small(world, "sst2", keep=keep)
    old = entries(keep)
    os.utime(world / "glue/SST-2/train.tsv", ns=(1, 1))
    second = small(world, "sst2", keep=keep)
    assert set(old) < set(entries(keep))
    assert seen(held) == seen(second)
    del held, second
    gc.collect()
    os.utime(world / "glue/SST-2/train.tsv", ns=(2, 2))
    small(world, "sst2", keep=keep)
    assert len(entries(keep)) == 2
    assert not set(entries(keep)) & set(old)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    root, keep = coco_root(tmp_path / "r"), tmp_path / "cache"
    path = root / "coco/annotations/instances_train2017.json"
    real = files.read_json

    def read_json(name, *more, **options):
        content = real(name, *more, **options)
        path.write_text(path.read_text().replace('"category_id": 90', '"category_id": 80'))
        return content

    monkeypatch.setattr(files, "read_json", read_json)
    assert small(root, "coco", keep=keep).get(0)["labels"].tolist() == [1, 90]
    monkeypatch.undo()
    monkeypatch.setattr(cache, "SMALL", 0)
    assert not keep.exists()
    assert small(root, "coco", keep=keep).get(0)["labels"].tolist() == [1, 80]


@pytest.mark.parametrize("task", ["qqp", "vqa2", "snli_ve", "sst2"])
def test_another_vocabulary_gives_other_word_pieces(world, task, tmp_path):
    keep = tmp_path / "cache"
    first = small(world, task, keep=keep).get(0)["input_ids"].tolist()
    rows = [name for name in entries(keep) if name.startswith("rows")]
    write(world / "bert/vocab.txt", "\n".join([*VOCABULARY[:5], "is", "cat", "fine", "who", *VOCABULARY[5:]]) + "\n")
    second = small(world, task, keep=keep)
    assert second.get(0)["input_ids"].tolist() == small(world, task).get(0)["input_ids"].tolist() != first
    assert [name for name in entries(keep) if name.startswith("rows")] == rows  # the texts did not change


def test_splits_limits_and_answer_lists_have_their_own_entries(world, tmp_path):
    keep = tmp_path / "cache"
    small(world, "coco", keep=keep)
    with pytest.raises(UserError, match="category_id 90 is outside 1..50"):
        small(world, "coco", config=task_config("coco", outputs=52), keep=keep)
    assert [a["id"] for a in small(world, "coco", "val", keep=keep).coco_ground_truth()["images"]] == [100, 101]
    assert [a["id"] for a in small(world, "coco", "train", keep=keep).coco_ground_truth()["images"]] == [9, 25]

    small(world, "vg", keep=keep)
    with pytest.raises(UserError, match="3 attributes, but the model has 3 attribute outputs"):
        small(world, "vg", keep=keep, attribute_outputs=3)

    before = small(world, "vqa2", keep=keep).get(0)["answer_scores"].tolist()
    write(world / "vqa2/trainval_label2ans.json", ["", "no", "yes", "2"])
    after = small(world, "vqa2", keep=keep).get(0)["answer_scores"].tolist()
    assert after == [before[0], before[2], before[1], before[3]] != before


def test_one_folder_for_several_ways_of_naming_the_root(world, tmp_path, monkeypatch):
    keep = tmp_path / "cache"
    absolute = small(world, "vg", keep=keep)
    monkeypatch.chdir(tmp_path)
    relative = small("world", "vg", keep=keep)
    assert seen(relative) == seen(small("world", "vg"))
    assert relative.facts["file"] != absolute.facts["file"]
    (tmp_path / "other").mkdir()
    shutil.copytree(world, tmp_path / "other/world")
    write(tmp_path / "other/world/visual_genome/1600-400-20/objects_vocab.txt", "tree,trees\ncar\nyolk")
    monkeypatch.chdir(tmp_path / "other")
    assert small("world", "vg", keep=keep).get(0)["labels"].tolist() == [1]
    monkeypatch.chdir(tmp_path)
    assert small("world", "vg", keep=keep).get(0)["labels"].tolist() == [3]


def test_files_that_change_roles_are_another_entry(world, tmp_path):
    keep = tmp_path / "cache"
    vocabularies = [f"visual_genome/1600-400-20/{name}_vocab.txt" for name in ("objects", "attributes")]
    small(world, "vg", keep=keep)
    paths = dict(zip(("vg.attribute_vocab", "vg.object_vocab"), vocabularies))
    with pytest.raises(UserError, match="no object|none of"):
        small(world, "vg", keep=keep, data={"paths": paths})


@pytest.mark.parametrize("what", ["format", "code", "characters", "tokenizers"])
def test_other_code_makes_other_entries(world, what, tmp_path, monkeypatch):
    keep = tmp_path / "cache"
    small(world, "sst2", keep=keep)
    old = set(entries(keep))
    if what == "format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    elif what == "code":
        monkeypatch.setattr(cache, "code_hash", lambda: "another")
    elif what == "characters":
        monkeypatch.setattr(tokens, "MAX_CHARACTERS", 3)
        monkeypatch.setattr(text, "MAX_CHARACTERS", 3)
    else:
        monkeypatch.setattr("tokenizers.__version__", "another")
    dataset = small(world, "sst2", keep=keep)
    assert seen(dataset) == seen(small(world, "sst2"))
    new = set(entries(keep)) - old
    assert [name.split("-")[0] for name in sorted(new)] == (
        ["rows", "words"] if what in ("format", "code") else ["words"]
    )


def test_the_code_hash_covers_the_readers():
    names = {name.removesuffix(".py") for name in os.listdir(os.path.dirname(cache.__file__))}
    assert set(cache._MODULES) <= names
    assert {"coco", "visual_genome", "vqa2", "snli_ve", "glue", "files", "text", "tokens", "cache"} <= set(
        cache._MODULES
    )
    assert len(cache.code_hash()) == 64


def test_errors_are_the_same_each_time_and_nothing_is_kept(tmp_path):
    content = coco_file()
    content["annotations"][0]["bbox"] = [1, 2, 3]
    root, keep = coco_root(tmp_path / "r", content), tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(UserError, match=r"annotations\[0\]: bbox must have 4 numbers"):
            small(root, "coco", keep=keep)
    assert not keep.exists()


# -------------------------------------------------------------------------------------------------- damaged entries


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def _zero_the_end(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))


def _garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _empty(path):
    path.write_bytes(b"")


def _delete(path):
    path.unlink()


def _folder(path):
    path.unlink()
    path.mkdir()


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", [_truncate, _zero, _zero_the_end, _garbage, _empty, _delete, _folder, _flip])
@pytest.mark.parametrize("task", ["coco", "vg", "vqa2", "qqp"])
def test_damage_to_any_file_is_noticed_and_repaired(world, task, damage, tmp_path, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, task, keep=keep))
    for path in sorted(p for p in keep.rglob("*") if p.is_file()):
        before = path.read_bytes()
        damage(path)
        if path.is_file() and path.read_bytes() == before:
            continue  # e.g. the second half was zero
        caplog.clear()
        assert seen(small(world, task, keep=keep)) == expected, path
        assert [r.getMessage().count("is damaged") for r in caplog.records] == [1], path
        caplog.clear()
        assert seen(small(world, task, keep=keep)) == expected
        assert not caplog.records
        assert path.read_bytes() == before
    assert not [name for name in entries(keep) if name.startswith(".")]


def test_an_entry_that_is_something_else_is_replaced(world, tmp_path, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, "sst2", keep=keep))
    for name in entries(keep):
        shutil.rmtree(keep / name)
        (keep / name).write_text("not a folder")
    assert seen(small(world, "sst2", keep=keep)) == expected
    assert all((keep / name).is_dir() for name in entries(keep))
    shutil.rmtree(keep / entries(keep)[0])
    (keep / entries(keep)[-1] / "more").write_text("left alone")
    assert seen(small(world, "sst2", keep=keep)) == expected


def test_a_changed_fact_is_noticed(world, tmp_path, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, "vg", keep=keep))
    meta = keep / entries(keep)[0] / "meta.json"
    text = meta.read_text()
    assert text.count("object outside the vocabulary") == 1
    meta.write_text(text.replace("object outside the vocabulary", "object inside the vocabulary"))
    assert seen(small(world, "vg", keep=keep)) == expected
    assert "meta.json does not have its checksum" in caplog.text


def _forge(entry, change):
    """Change an entry and make all its checksums fit."""
    meta = json.loads((entry / "meta.json").read_text())["content"]
    change(meta)
    for name, stated in meta["arrays"].items():
        path = entry / f"{name}.npy"
        stated.update(bytes=path.stat().st_size, crc32=cache._crc32(path))
    (entry / "meta.json").write_text(json.dumps({"sha256": cache._hash(meta), "content": meta}))


class Opened:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_in_an_entry_are_never_run(world, tmp_path, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, "sst2", keep=keep))
    entry = keep / entries(keep)[0]

    def change(_):
        np.save(entry / "labels.npy", np.array([Opened(tmp_path / "ran")] * 2), allow_pickle=True)

    _forge(entry, change)
    assert seen(small(world, "sst2", keep=keep)) == expected
    assert not (tmp_path / "ran").exists()
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1)])
def test_an_array_of_another_shape_or_type_is_refused(world, shape, tmp_path, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, "sst2", keep=keep))
    entry = keep / entries(keep)[0]
    for array in (np.ones(shape, dtype=np.int8), np.ones(2, dtype=np.int16)):
        _forge(entry, lambda _, array=array: np.save(entry / "labels.npy", array))
        caplog.clear()
        assert seen(small(world, "sst2", keep=keep)) == expected
        assert "labels.npy is int" in caplog.text


def test_an_entry_under_a_wrong_name_is_refused(world, tmp_path, caplog):
    keep = tmp_path / "cache"
    small(world, "coco", keep=keep)
    expected = seen(small(world, "coco", "val", keep=keep))
    train, val = (next(keep / n for n in entries(keep) if n.startswith(f"rows-coco-{s}")) for s in ("train", "val"))
    shutil.rmtree(val)
    shutil.copytree(train, val)
    assert seen(small(world, "coco", "val", keep=keep)) == expected
    assert "of another entry" in caplog.text


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_an_entry_that_cannot_be_read_now_is_left_alone(world, code, tmp_path, monkeypatch, caplog):
    keep = tmp_path / "cache"
    expected = seen(small(world, "coco", keep=keep))
    names = entries(keep)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache, "_crc32", refuse)
    assert seen(small(world, "coco", keep=keep)) == expected
    assert entries(keep) == names
    assert [r.getMessage().count("cannot be read") for r in caplog.records] == [1]


# ------------------------------------------------------------------------------------------------------- the folder


def test_a_folder_that_cannot_be_written_is_one_line(world, tmp_path, caplog):
    blocked = write(tmp_path / "file", "x") / "cache"
    for task in ALL:
        assert seen(small(world, task, keep=blocked)) == seen(small(world, task))
    assert [r.getMessage().count("give a writable data.cache_dir") for r in caplog.records] == [1]


def test_a_full_disk_is_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    keep = tmp_path / "cache"
    for task in ("coco", "qqp"):
        assert seen(small(world, task, keep=keep)) == seen(small(world, task))
    assert entries(keep) == []
    assert [r.getMessage().count("No space left on device") for r in caplog.records] == [1]


def test_where_the_folder_is(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.open_cache(data(world)).folder == tmp_path / "xdg/unit_fast"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.open_cache(data(world)).folder == tmp_path / "home/.cache/unit_fast"
    assert cache.open_cache(data(world, cache_dir="")).folder is None
    assert cache.open_cache(data(world, cache_dir="~/x")).folder == tmp_path / "home/x"
    (tmp_path / "link").symlink_to(world)
    for inside in (world / "cache", world, tmp_path / "link/cache"):
        with pytest.raises(UserError, match=r"data.cache_dir: .* lies in the data root .*; give a folder outside"):
            small(world, "coco", keep=inside)
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    assert not caplog.records
    assert len(small(world, "coco", data={"cache_dir": None})) == 2
    assert not (world / "cache").exists()
    assert "lies in the data root" in caplog.text


def test_the_default_is_to_keep(world, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    small(world, "coco", data={"cache_dir": None})
    assert len(entries(tmp_path / "xdg/unit_fast")) == 1


def test_a_check_of_the_files_reads_the_files(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for task in ALL:
        small(world, task, data={"cache_dir": None})
    reads = Reads(monkeypatch)
    monkeypatch.setattr(cache.Cache, "_load", lambda *_: pytest.fail("cache read"))
    report = check(world)
    assert {"instances_train2017.json", "scene_graphs.json", "train.tsv", "snli_ve_train.jsonl"} <= set(reads.take())
    assert report.ok
    loose = Findings(strict=False)
    assert len(small(world, "coco", data={"cache_dir": None}, findings=loose)) == 2


def test_a_resumed_run_may_have_another_folder(tmp_path):
    old = RunConfig()
    new = dataclasses.replace(old, data=dataclasses.replace(old.data, cache_dir=str(tmp_path)))
    assert list(checkpoint.check_resumable(tmp_path, old, new)) == ["data.cache_dir"]


# ------------------------------------------------------------------------------------------------ several processes


def _open_at_once(barrier, results, root, keep):
    barrier.wait()
    results.put(pickle.dumps([seen(small(root, task, keep=keep)) for task in ("coco", "qqp")]))


def test_processes_that_write_at_once(world, tmp_path):
    keep, context = tmp_path / "cache", multiprocessing.get_context("fork")
    expected = pickle.dumps([seen(small(world, task)) for task in ("coco", "qqp")])
    for _ in range(5):
        shutil.rmtree(keep, ignore_errors=True)
        barrier, results = context.Barrier(3), context.Queue()
        workers = [context.Process(target=_open_at_once, args=(barrier, results, world, keep)) for _ in range(3)]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert found == [expected] * 3
        assert [name.split("-")[0] for name in entries(keep)] == ["rows", "rows", "words"]


def test_who_comes_second_takes_what_the_first_wrote(world, tmp_path, monkeypatch, caplog):
    keep, real = tmp_path / "cache", cache._write_files
    first = []

    def write_files(*arguments):
        real(*arguments)
        if not first:  # another process is done between our writing and our renaming
            first.append(None)
            first[0] = small(world, "coco", keep=keep)

    monkeypatch.setattr(cache, "_write_files", write_files)
    second = small(world, "coco", keep=keep)
    assert seen(second) == seen(first[0]) == seen(small(world, "coco"))
    assert second.objects.content.name == first[0].objects.content.name == entries(keep)[0]
    assert len(entries(keep)) == 1
    assert not caplog.records


def _die_while_writing(root, keep, task, call):
    left = [call]

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.chmod") and str(keep) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(hook)
    small(root, task, keep=keep)


@pytest.mark.parametrize("task", ["coco", "sst2"])
def test_a_death_while_writing_leaves_nothing_that_is_believed(world, task, tmp_path, caplog):
    keep, context = tmp_path / "cache", multiprocessing.get_context("fork")
    expected = seen(small(world, task))
    deaths = 0
    for call in range(1, 100):
        shutil.rmtree(keep, ignore_errors=True)
        process = context.Process(target=_die_while_writing, args=(world, keep, task, call))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        deaths += 1
        assert seen(small(world, task, keep=keep)) == expected
        assert seen(small(world, task, keep=keep)) == expected
    assert deaths > 15
    assert not caplog.records


def test_what_dead_processes_left_goes_after_a_day(world, tmp_path):
    keep = tmp_path / "cache"
    for name in (".tmp-old", ".tmp-new"):
        write(keep / name / "part.npy", "x")
    write(keep / "others", "not ours")
    os.utime(keep / ".tmp-old", (time.time() - 2 * 24 * 3600,) * 2)
    small(world, "coco", keep=keep)
    assert [name for name in entries(keep) if not name.startswith("rows")] == [".tmp-new", "others"]


def test_a_data_set_can_be_sent_to_another_process(world, tmp_path):
    dataset = small(world, "coco", keep=tmp_path / "cache")
    content = pickle.loads(pickle.dumps(dataset.objects.content))
    assert all(np.array_equal(content.arrays[n], a) for n, a in dataset.objects.content.arrays.items())


# ------------------------------------------------------------------------------------------------- texts and tokens

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["", " ", "[SEP]", "a[CLS] b", "[MASK][PAD]", "[unk] [UNK]", "\ud800", "a\udfffb", "\0", "\ufeff", "\u4e2d\u6587"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=8))
def test_strings_come_back_as_they_went_in(texts):
    content = cache.Content()
    content.put_strings("x", texts)
    strings = content.strings("x")
    assert list(strings) == texts
    assert [strings[i] for i in range(len(strings))] == texts
    for index in (-1, len(texts)):
        with pytest.raises(IndexError):
            strings[index]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return WordPieces(write(tmp_path_factory.mktemp("v") / "vocab.txt", "\n".join(VOCABULARY) + "\n"))


def _direct(words, row, length):
    try:
        return words.encode(row, length)
    except UserError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.integers(3, 20), st.booleans())
def test_word_pieces_are_those_of_the_direct_path(words, rows, length, single):
    content = cache.Content()
    columns = []
    for c in range(1 if single else 2):
        content.put_strings(f"c{c}", [row[c] for row in rows])
        columns.append(content.strings(f"c{c}"))
    made = tokens.Tokens(tokens.tokenise(words, tuple(columns), "x"), len(columns))
    found = tokens.lengths(made.counts(), length).tolist()
    for i, row in enumerate(rows):
        direct = _direct(words, row[0] if single else row, length)
        pieces = made.pieces(i)
        if isinstance(direct, str):
            assert pieces is None
            continue
        assert words.form(pieces[0], pieces[1] if len(pieces) > 1 else [], length) == direct
        assert found[i] == len(direct[0])


def test_a_text_that_cannot_be_tokenised_is_the_same_error(world, tmp_path, monkeypatch):
    from unit_fast.data.glue import Glue

    real = Glue._table

    def table(self, path):
        for where, row, label in real(self, path):
            yield where, (row[0] + "\ud800", *row[1:]), label

    monkeypatch.setattr(Glue, "_table", table)
    messages = []
    for keep in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = small(world, "qqp", keep=keep)
        with pytest.raises(UserError, match="cannot be tokenised") as info:
            dataset.get(0)
        messages.append(str(info.value))
    assert len(set(messages)) == 1
    assert dataset.text_lengths().tolist() == [1 + 5 + 3] * 2  # who? -> one piece; what? -> w ##h ##a ##t ?


def test_long_texts_are_kept_whole_and_cut_when_asked_for(world, tmp_path):
    long = "a " * 300
    write(world / "glue/SST-2/train.tsv", f"sentence\tlabel\n{long}\t1\nb c\t0\n")
    lengths = {}
    for limit in (8, 128, 20):
        config = task_config("sst2", text_length=limit)
        dataset = small(world, "sst2", config=config, keep=tmp_path / "cache")
        assert dataset.get(0)["input_ids"].tolist() == small(world, "sst2", config=config).get(0)["input_ids"].tolist()
        lengths[limit] = dataset.text_lengths().tolist()
        assert dataset.text_lengths().dtype == np.int64
        assert [dataset.text_tokens(i) for i in range(2)] == lengths[limit]
    assert lengths == {8: [8, 4], 128: [128, 4], 20: [20, 4]}
    assert len(entries(tmp_path / "cache")) == 2  # the limit is not in the key


def test_a_large_vocabulary_takes_wider_ids(tmp_path):
    vocabulary = [*VOCABULARY, *(f"word{i}" for i in range(70_000))]
    words = WordPieces(write(tmp_path / "vocab.txt", "\n".join(vocabulary) + "\n"))
    content = cache.Content()
    content.put_strings("c", ["word69999 a", ""])
    made = tokens.tokenise(words, (content.strings("c"),), "x")
    assert made.arrays["ids0"].dtype == np.uint32
    assert tokens.Tokens(made, 1).pieces(0) == [words.pieces("word69999 a")]
    assert tokens.Tokens(made, 1).pieces(1) == [[]]


def test_lengths_without_a_cache_are_made_once(world, monkeypatch):
    dataset = small(world, "qqp")
    expected = [len(dataset.get(i)["input_ids"]) for i in range(len(dataset))]
    assert dataset.text_lengths().tolist() == expected
    monkeypatch.setattr(WordPieces, "pieces", lambda *_: pytest.fail("tokenised again"))
    assert dataset.text_lengths().tolist() == expected
    assert len(dataset.get(0)["input_ids"]) == expected[0]


def test_a_bar_counts_every_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "LONG", 10)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    content = cache.Content()
    content.put_strings("c", ["a b"] * 2500)
    made = tokens.tokenise(words, (content.strings("c"),), "qqp train")
    assert made.arrays["ends0"][-1] == 5000
    assert "word pieces of qqp train" in capsys.readouterr().err


def test_log_lines_go_through_logging(world, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="unit_fast")
    small(world, "coco", keep=tmp_path / "cache")
    small(world, "coco", keep=tmp_path / "cache")
    assert not caplog.records  # nothing to tell about a cache that works
