"""The cache when its files are damaged, several processes write it, or one dies."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import time

import numpy as np
import pytest

from tests.cached_roots import about_the_cache, entries, seen, small
from tests.data_roots import write
from unit_fast.data.store import cache

pytestmark = pytest.mark.usefixtures("small_files_too")


def _rewritten(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "truncated": _rewritten(lambda raw: raw[:-1]),
    "zero": _rewritten(lambda raw: bytes(len(raw))),
    "zero at the end": _rewritten(lambda raw: raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)),
    "garbage": _rewritten(lambda raw: np.random.default_rng(0).bytes(len(raw))),
    "empty": _rewritten(lambda raw: b""),
    "one bit": _rewritten(lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]),
    "gone": lambda path: path.unlink(),
    "a folder": _folder,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
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
        assert [r.getMessage().count("is damaged") for r in about_the_cache(caplog)] == [1], path
        caplog.clear()
        assert seen(small(world, task, keep=keep)) == expected
        assert not about_the_cache(caplog)
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
    (entry / "meta.json").write_text(json.dumps({"sha256": cache.hash_of(meta), "content": meta}))


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
    assert [r.getMessage().count("cannot be read") for r in about_the_cache(caplog)] == [1]


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
    assert not about_the_cache(caplog)


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
    assert not about_the_cache(caplog)


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
