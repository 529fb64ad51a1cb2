"""The cache of annotations and word pieces: the same samples with and without it, and never stale ones."""

import dataclasses
import errno
import functools
import gc
import logging
import os
import shutil
import time

import numpy as np
import pytest

from tests.cached_roots import Reads, about_the_cache, entries, seen, small
from tests.data_roots import REAL, VOCABULARY, coco_file, coco_root, data, needs_real, task_config, write
from tests.small_runs import ALL
from unit_fast.config import RunConfig
from unit_fast.config_check import check_resumable
from unit_fast.data import MissingSplit
from unit_fast.data.check import check
from unit_fast.data.errors import Findings
from unit_fast.data.readers import sources
from unit_fast.data.store import cache, files
from unit_fast.data.text import tokens
from unit_fast.data.text import wordpieces as text
from unit_fast.errors import UserError
from unit_fast.tasks import get_task

pytestmark = pytest.mark.usefixtures("small_files_too")


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
        return small(REAL, task, keep=keep, config=task_config(task), short_side=48, max_side=64)

    # not every image of the sample of real data is in it
    same_three_ways(open_with, tmp_path / "cache", monkeypatch, images=get_task(task).kind == "glue")


def _vg_instances(name, root):
    content = coco_file()
    for image, name in zip(content["images"], ("VG_100K/1.jpg", "2.jpg")):
        image.update(file_name=name, width=60, height=40)
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["attribute_ids_max16"] = [3, 1] + [-1] * 14
    write(root / f"visual_genome/annotations/instances_{name}.json", content)


_vg_authors = functools.partial(_vg_instances, "train_split_by_coco_2017")
_vg_one_file = functools.partial(_vg_instances, "from_scene_graphs")


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
    monkeypatch.setattr(sources, "SMALL", 2**20)
    for task in ALL:
        small(world, task, keep=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


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
    (state,) = sources._settled({"file": [path]})
    assert time.time_ns() - path.stat().st_ctime_ns >= sources._SETTLED_S * 1e9
    os.utime(path, ns=(time.time_ns() + 10**12,) * 2)  # a clock that is ahead is not waited for
    (later,) = sources._settled({"file": [path]})
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
    monkeypatch.setattr(sources, "SMALL", 0)
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
        small(world, "vg", keep=keep, paths=paths)


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
    read = {name.split("/")[-1] for name in cache._MODULES}
    assert {"coco", "visual_genome", "vqa2", "snli_ve", "glue", "files", "wordpieces", "tokens", "cache"} <= read
    assert len(cache.code_hash()) == 64


def test_errors_are_the_same_each_time_and_nothing_is_kept(tmp_path):
    content = coco_file()
    content["annotations"][0]["bbox"] = [1, 2, 3]
    root, keep = coco_root(tmp_path / "r", content), tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(UserError, match=r"annotations\[0\]: bbox must have 4 numbers"):
            small(root, "coco", keep=keep)
    assert not keep.exists()


def test_a_folder_that_cannot_be_written_is_one_line(world, tmp_path, caplog):
    blocked = write(tmp_path / "file", "x") / "cache"
    for task in ALL:
        assert seen(small(world, task, keep=blocked)) == seen(small(world, task))
    assert [r.getMessage().count("give a writable data.cache_dir") for r in about_the_cache(caplog)] == [1]


def test_a_full_disk_is_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    keep = tmp_path / "cache"
    for task in ("coco", "qqp"):
        assert seen(small(world, task, keep=keep)) == seen(small(world, task))
    assert entries(keep) == []
    assert [r.getMessage().count("No space left on device") for r in about_the_cache(caplog)] == [1]


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
    assert len(small(world, "coco", cache_dir=None)) == 2
    assert not (world / "cache").exists()
    assert "lies in the data root" in caplog.text


def test_the_default_is_to_keep(world, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    small(world, "coco", cache_dir=None)
    assert len(entries(tmp_path / "xdg/unit_fast")) == 1


def test_a_check_of_the_files_reads_the_files(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for task in ALL:
        small(world, task, cache_dir=None)
    reads = Reads(monkeypatch)
    monkeypatch.setattr(cache.Cache, "_load", lambda *_: pytest.fail("cache read"))
    report = check(world)
    assert {"instances_train2017.json", "scene_graphs.json", "train.tsv", "snli_ve_train.jsonl"} <= set(reads.take())
    assert report.ok
    loose = Findings(strict=False)
    assert len(small(world, "coco", cache_dir=None, findings=loose)) == 2


def test_a_resumed_run_may_have_another_folder(tmp_path):
    old = RunConfig()
    new = dataclasses.replace(old, data=dataclasses.replace(old.data, cache_dir=str(tmp_path)))
    assert list(check_resumable(tmp_path, old, new)) == ["data.cache_dir"]


def test_log_lines_go_through_logging(world, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="unit_fast")
    small(world, "coco", keep=tmp_path / "cache")
    small(world, "coco", keep=tmp_path / "cache")
    assert not about_the_cache(caplog)  # nothing to tell about a cache that works
