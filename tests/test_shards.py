"""Images from tar shards: the same samples as from files, read in any order by anybody, damage told with the path."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_roots import REAL, coco_root, data, needs_real, picture, task_config
from tests.small_runs import log_of, make_world, small_config, state_hash
from unit_fast import cli
from unit_fast.config import DataConfig
from unit_fast.data import BadImage, open_dataset, shard_writer
from unit_fast.data.check import check
from unit_fast.data.decode import load_image, read_bytes, stamp
from unit_fast.data.layout import Layout
from unit_fast.data.loader import Loader
from unit_fast.data.shard_writer import plan_shards, write_shards
from unit_fast.data.shards import INDEX, MARK, Member, Shards, opened, scan
from unit_fast.errors import UserError
from unit_fast.tasks import get_task
from unit_fast.train import train

TASKS = ("coco", "vg", "vqa2", "snli_ve")
KEYS = ("coco.train_images", "coco.val_images", "coco.train2014_images", "coco.val2014_images", "vg.images",
        "snli_ve.images")  # fmt: skip
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
engines = pytest.mark.parametrize(
    ("engine", "workers"),
    [("torchvision", 0), ("torchvision", 2), pytest.param("dali", 2, marks=needs_dali)],
)


def shard(root, out, *more, keys=KEYS, mib="0.03"):
    """What the command writes of a root; key -> shard folder."""
    arguments = ["data", "shard", str(root), "--images", *keys, "--out", str(out), "--shard-mib", mib, *more]
    assert cli.main(arguments) == 0
    return {key: str(Path(out) / key.replace(".", "_")) for key in keys}


def without_images(root, folder) -> Path:
    """A copy of a root that has no image."""
    return Path(shutil.copytree(root, folder, ignore=shutil.ignore_patterns("*.jpg")))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(root with images, root without, paths of the shards of the first, on two disks)."""
    folder = tmp_path_factory.mktemp("shards")
    root = make_world(folder / "world")
    paths = shard(root, folder / "disk1", "--out", str(folder / "disk2"))
    return root, without_images(root, folder / "bare"), paths


@pytest.fixture
def small(tmp_path):
    """(folder of 30 images in folders, shard folder of several tar files)."""
    folder = tmp_path / "images"
    for i in range(30):
        picture(folder / f"part{i % 2}/{i:03d}.jpg", 20 + i, 30, seed=i)
    return folder, written(folder, tmp_path / "out").index.parent


def written(folder, *out, **options):
    return write_shards(plan_shards(folder, out, shard_mib=options.pop("shard_mib", 0.02), **options))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def assert_same_samples(loose: DataConfig, sharded: DataConfig, configs) -> int:
    """Every sample of every split, with and without augmentation; the number of samples."""
    count = 0
    for short in TASKS:
        for split in ("train", "val"):
            sets = []
            for settings in (loose, sharded):
                try:
                    sets.append(open_dataset(short, split, settings, configs[short], augment=True))
                except UserError:
                    sets.append(None)
            files, shards = sets
            assert (files is None) == (shards is None)
            if files is None:
                continue
            assert len(files) == len(shards) > 0
            assert shards.shards
            assert not files.shards
            for index in range(len(files)):
                for key in (None, 5):
                    a, b = files.get(index, key), shards.get(index, key)
                    name = a.pop("image_path")
                    assert b.pop("image_path").partition("::")[2] in name
                    assert a.keys() == b.keys()
                    assert all(equal(a[field], b[field]) for field in a)
                    count += 1
                assert files.shape(index, 5) == shards.shape(index, 5)
    return count


def test_every_generated_sample_is_the_same_from_shards(world):
    root, bare, paths = world
    config = small_config(root, *TASKS)
    configs = {get_task(name).short: kind for name, kind in config.model.tasks.items()}
    loose = config.data
    count = assert_same_samples(loose, dataclasses.replace(loose, root=str(bare), paths=paths), configs)
    assert count > 400


def real_keys():
    layout = Layout(DataConfig(root=str(REAL)))
    return [key for key in KEYS if layout.find(key) is not None]


@needs_real
def test_every_real_sample_is_the_same_from_shards(tmp_path):
    paths = shard(REAL, tmp_path / "out", "--out", str(tmp_path / "out2"), keys=real_keys(), mib="2")
    bare = without_images(REAL, tmp_path / "bare")
    loose = DataConfig(root=str(REAL), short_side=64, max_side=96, train_short_sides=(48, 64), crop_short_sides=(56,),
                       crop_min=32, crop_max=48)  # fmt: skip
    configs = {short: task_config(short) for short in TASKS}
    assert assert_same_samples(loose, dataclasses.replace(loose, root=str(bare), paths=paths), configs) > 100


def steps(config, start=0, stop=30, counts=None, **more):
    sets = {name: open_dataset(name, "train", config.data, task, augment=True)
            for name, task in config.model.tasks.items()}  # fmt: skip
    with Loader(sets, config, start, stop, counts or {}, **more) as loader:
        return list(loader)


def content(found):
    return [
        (s.task, [(b.sample_ids, {k: v.tolist() for k, v in b.tensors().items()}) for b in s.batches]) for s in found
    ]


@engines
def test_the_loader_reads_the_same_batches_from_shards_and_resumes(world, engine, workers):
    root, bare, paths = world
    options = {"engine": engine, "workers": workers, "group": 2}
    loose = content(steps(small_config(root, *TASKS, data=options)))
    sharded = small_config(root, *TASKS, data={**options, "root": str(bare), "paths": paths})
    whole = steps(sharded)
    assert content(whole) == loose
    assert {task for task, _ in loose} == set(sharded.model.tasks)
    counts = {}
    for step in whole[:11]:
        counts[step.task] = counts.get(step.task, 0) + step.request.samples
    assert content(steps(sharded, 11, 30, counts)) == loose[11:]


@engines
def test_unreadable_images_are_replaced_alike(tmp_path, engine, workers):
    root = make_world(tmp_path / "world")
    images = sorted((root / "coco/images/train2017").glob("*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:300])
    images[4].write_bytes(b"")
    images[5].unlink()
    paths = shard(root, tmp_path / "out", keys=["coco.train_images"])
    options = {"engine": engine, "workers": workers, "cache_dir": str(tmp_path / "cache")}
    loose = steps(small_config(root, "coco", data=options))
    found = steps(small_config(root, "coco", data={**options, "paths": paths}))
    assert content(found) == content(loose)
    assert [len(s.bad) for s in found] == [len(s.bad) for s in loose]

    def reasons(of):
        return {Path(path.rpartition("::")[2] or path).name: message.removeprefix(path) for s in of
                for path, message in s.bad}  # fmt: skip

    here, there = reasons(loose), reasons(found)
    assert set(here) == {path.name for path in images[3:6]} == set(there)
    assert "no such file" in here.pop(images[5].name)
    assert "not in the shards" in there.pop(images[5].name)
    assert here == there


def test_training_on_shards_gives_the_same_weights_and_pictures(world, tmp_path):
    root, bare, paths = world
    runs = []
    for name, options in (("files", {}), ("shards", {"root": str(bare), "paths": paths})):
        config = small_config(root, "coco", "vqa2", data=options, steps=8, eval_every=8)
        runs.append(train(config, out=tmp_path / name).folder)
    assert state_hash(runs[0]) == state_hash(runs[1])
    pictures = [sorted((p.name, p.read_bytes()) for p in run.rglob("examples/*.jpg")) for run in runs]
    assert pictures[0] == pictures[1] != []
    assert "unreadable" not in log_of(runs[1])


# ------------------------------------------------------------------------------------------------------ other readers


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_webdatasets_own_reader_finds_the_same_bytes(small):
    webdataset = pytest.importorskip("webdataset")
    folder, out = small
    tars = sorted(map(str, out.glob("*.tar")))
    found = {f"{s['__key__']}.jpg": s["jpg"] for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert found == bytes_of(folder)


@needs_dali
def test_dalis_sequential_reader_finds_the_same_bytes(small):
    from nvidia.dali import fn, pipeline_def

    folder, out = small
    tars = sorted(map(str, out.glob("*.tar")))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def define():
        return fn.readers.webdataset(paths=tars, ext=["jpg"], missing_component_behavior="error", name="reader")

    pipeline = define()
    pipeline.build()
    count = pipeline.reader_meta("reader")["epoch_size"]
    found = [pipeline.run()[0].as_array()[0].tobytes() for _ in range(count)]
    assert sorted(found) == sorted(bytes_of(folder).values())


# --------------------------------------------------------------------------------------------------------- the writer


def test_the_bytes_are_untouched_and_the_order_is_the_seeds(small, tmp_path):
    folder, out = small
    original = bytes_of(folder)
    found = Shards(out)
    assert {member.name: member.read() for member in found} == original
    assert len(found) == 30

    def order_in(folder):
        return [name for tar in sorted(folder.glob("*.tar")) for name, *_ in scan(tar)]

    order = order_in(out)
    assert sorted(order) == sorted(original) != order
    again, other = written(folder, tmp_path / "again"), written(folder, tmp_path / "other", seed=1)
    assert [p.read_bytes() for p in sorted(out.glob("*.tar"))] == [
        p.read_bytes() for p in sorted(again.index.parent.glob("*.tar"))
    ]
    assert order_in(other.index.parent) != order


@pytest.mark.parametrize("mib", [0.011, 0.02, 0.05, 256])
def test_no_shard_is_larger_than_asked(small, tmp_path, mib):
    made = written(small[0], tmp_path / "new", shard_mib=mib)
    sizes = [p.stat().st_size for p in made.index.parent.glob("*.tar")]
    assert max(sizes) <= max(mib * 2**20, 10240)
    assert made.shards == len(sizes)
    assert (made.images, made.bytes) == (30, sum(sizes))


def test_an_image_larger_than_a_shard_has_one_of_its_own(tmp_path):
    picture(tmp_path / "images/a.jpg", 200, 200)
    picture(tmp_path / "images/b.jpg", 20, 20)
    made = written(tmp_path / "images", tmp_path / "out", shard_mib=0.01)
    assert made.shards == 2
    assert len(Shards(tmp_path / "out")) == 2


def test_shards_are_spread_by_free_space_and_found_on_all_disks(small, tmp_path, monkeypatch):
    folder = small[0]
    a, b, c = (tmp_path / name for name in "abc")
    made = written(folder, a, b, c)
    counts = [len(list(p.glob("*.tar"))) for p in (a, b, c)]
    assert min(counts) >= 1
    assert sum(counts) == made.shards
    assert max(counts) - min(counts) <= 1  # one disk: in turn
    assert {m.name: m.read() for m in Shards(a)} == bytes_of(folder)
    with pytest.raises(UserError, match="not the first of several folders"):
        opened(b)

    disks = {p: i for i, p in enumerate((tmp_path / "large", tmp_path / "little"))}
    free = {0: 10**9, 1: shard_writer.RESERVE + 25_000}
    monkeypatch.setattr(shard_writer, "_disk", lambda path: (disks[path], free[disks[path]]))
    plan = plan_shards(folder, list(disks), shard_mib=0.02)
    assert plan.places.count(1) <= 1 < plan.places.count(0)


def test_too_little_space_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_disk", lambda path: (0, shard_writer.RESERVE + 20_000))
    with pytest.raises(UserError, match=r"need 0\.\d+ GB, but .*GB free .*another --out"):
        plan_shards(small[0], [tmp_path / "new"])
    assert list((tmp_path / "new").iterdir()) == []


def test_plans_made_together_share_the_space(small, tmp_path, monkeypatch):
    need = sum(p.stat().st_size for p in small[1].glob("*.tar"))
    free = shard_writer.RESERVE + int(1.5 * need)
    monkeypatch.setattr(shard_writer, "_disk", lambda path: (0, free))
    used: dict = {}
    plan_shards(small[0], [tmp_path / "one"], shard_mib=0.02, used=used)
    assert sum(used.values()) == need
    with pytest.raises(UserError, match="another --out"):
        plan_shards(small[0], [tmp_path / "two"], shard_mib=0.02, used=used)


def test_nothing_is_left_out_silently(tmp_path, capsys, monkeypatch):
    root = coco_root(tmp_path / "root")
    folder = root / "coco/images/train2017"
    (folder / "notes.txt").write_text("x")
    picture(folder / ".hidden.jpg", 5, 5)
    picture(folder / ("x" * 120 + ".jpg"), 5, 5)
    picture(tmp_path / "secret.jpg", 5, 5)
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "in.jpg").symlink_to(folder / "000000000009.jpg")
    (folder / "circle").symlink_to(folder)
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb"):
        pass
    read = Path.read_bytes

    def broken(path):
        if path.name == "000000000025.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    command = ["data", "shard", str(root), "--images", "coco.train_images", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "2 images in 1 shards" in out
    assert "7 files that are no images left out" in out
    assert "1 UNREADABLE images" in out
    index = json.loads((tmp_path / "out/coco_train_images" / INDEX).read_text())
    reasons = dict(index["unit_fast"]["left_out"])
    assert "Input/output" in reasons.pop("000000000025.jpg")
    assert "no key" in reasons.pop(".hidden.jpg")
    assert "not one of" in reasons.pop("notes.txt")
    assert "too long" in reasons.pop("x" * 120 + ".jpg")
    assert "link out" in reasons.pop("out.jpg")
    assert "FileNotFound" in reasons.pop("gone.jpg")
    assert "read already" in reasons.pop("circle")
    assert [("not UTF-8" in reason) for reason in reasons.values()] == [True]
    assert {m.name for m in Shards(tmp_path / "out/coco_train_images")} == {"000000000009.jpg", "in.jpg"}
    monkeypatch.undo()  # the disk is well again: the same command adds the image
    assert cli.main(command) == 0
    assert len(Shards(tmp_path / "out/coco_train_images")) == 3


def test_names_with_folders_dots_and_other_letters(tmp_path):
    names = ["a/b/c.jpg", "a.b.c.jpg", "größe.jpg", "日本.png", "two words.JPG", "d" * 60 + "/" + "e" * 90 + ".jpeg"]
    for i, name in enumerate(names):
        picture(tmp_path / "images" / name, 10 + i, 10)
    written(tmp_path / "images", tmp_path / "out")
    shards = Shards(tmp_path / "out")
    assert sorted(m.name for m in shards) == sorted(names)
    for name in names:
        assert shards.get(name).read() == (tmp_path / "images" / name).read_bytes()
        assert load_image(shards.get(name), 1000).width == 10 + names.index(name)
    assert shards.get("a//b/./c.jpg") == shards.get("a/b/c.jpg")
    for absent in ("c.jpg", "a.b.c", "a/b/c.jp", "a/b/c.jpgg", "z" * 200, "\ud800.jpg"):
        with contextlib.suppress(UserError):
            assert not shards.get(absent).exists()
    for bad in ("../images/a.b.c.jpg", "/etc/passwd", "", "a\0b", "~/x.jpg"):
        with pytest.raises(UserError, match="file name"):
            shards.get(bad)


def test_one_key_twice_is_refused(tmp_path):
    picture(tmp_path / "images/a.jpg", 5, 5)
    picture(tmp_path / "images/a.png", 5, 5)
    with pytest.raises(UserError, match=r"a\.jpg and a\.png .*key of a sample.*rename"):
        plan_shards(tmp_path / "images", [tmp_path / "out"])


def test_folders_that_hold_something_else_are_refused(small, tmp_path):
    folder, out = small
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    for place, message in (
        (tmp_path / "full", "not empty .thesis.tex."),
        (folder / "inside", "lies in the image folder"),
        (tmp_path / "full/thesis.tex", "cannot be used for shards"),
    ):
        with pytest.raises(UserError, match=message):
            plan_shards(folder, [place])
    assert (tmp_path / "full/thesis.tex").read_text() == "x"
    with pytest.raises(UserError, match="holds shards of other images or other settings"):
        plan_shards(folder, [out], seed=3, shard_mib=0.02)
    with pytest.raises(UserError, match="given twice"):
        plan_shards(folder, [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(UserError, match="holds shards already"):
        plan_shards(out, [tmp_path / "b"])
    with pytest.raises(UserError, match="must be above 0"):
        plan_shards(folder, [tmp_path / "b"], shard_mib=0)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \.jpg, \.jpeg or \.png"):
        plan_shards(tmp_path / "none", [tmp_path / "b"])
    picture(folder / "new.jpg", 5, 5)
    with pytest.raises(UserError, match="other images"):
        plan_shards(folder, [out], shard_mib=0.02)


def test_a_full_disk_is_one_message_and_whole_shards_are_kept(small, tmp_path, monkeypatch):
    calls, sync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(shard_writer.os, "fsync", full)
    plan = plan_shards(small[0], [tmp_path / "new"], shard_mib=0.02)
    with pytest.raises(UserError, match=r"-\d{6}\.tar: cannot be written .*No space left.*whole shards are kept"):
        write_shards(plan)
    monkeypatch.undo()
    assert not list((tmp_path / "new").glob(".*"))
    whole = len(list((tmp_path / "new").glob("*.tar")))
    made = written(small[0], tmp_path / "new")
    assert made.kept == whole > 0


def test_two_writers_do_not_meet(small, tmp_path):
    import fcntl

    folder, out = small
    with open(out / MARK, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes"):
            written(folder, out)
    assert written(folder, out).kept > 1


def normal(index):
    """An index without the times of the tar files."""
    made = json.loads(index.read_text())
    for entry in made["shardlist"]:
        del entry["time_ns"]
    del made["unit_fast"]["set"]  # depends on the out folder
    return made


@pytest.mark.parametrize(
    ("deadly", "at"),
    [*(("addfile", at) for at in (1, 2, 9, 30)), *((f, at) for f in ("fsync", "replace") for at in (1, 2, 5, -2, -1))],
)
def test_a_writer_killed_anywhere_is_resumed(small, tmp_path, deadly, at):
    folder, whole = small
    out = tmp_path / "killed"
    renamed = len(list(whole.glob("*.tar"))) + 2  # the mark before, the index after
    if at < 0:
        at += 1 + (renamed if deadly == "replace" else 2 * renamed)  # the last ones
    child = os.fork()
    if child == 0:
        owner = tarfile.TarFile if deadly == "addfile" else os
        original, calls = getattr(owner, deadly), []

        def kill(*arguments, **options):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, deadly, kill)
        with contextlib.suppress(BaseException):
            written(folder, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "armed"
    if (out / MARK).exists() and not (out / INDEX).exists():
        with pytest.raises(UserError, match="not all written.*same `unit-fast data shard` again"):
            opened(out)
    names = {p.name for p in out.glob("*.tar")}
    made = written(folder, out)
    assert made.kept == len(names)
    assert normal(made.index) == normal(whole / INDEX)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    assert {m.name: m.read() for m in Shards(out)} == bytes_of(folder)


def test_a_shard_that_is_not_whole_is_written_again(small):
    folder, out = small
    tars = sorted(out.glob("*.tar"))
    before = [tar.read_bytes() for tar in tars]
    os.truncate(tars[0], tars[0].stat().st_size // 2)
    tars[1].write_bytes(before[2])
    tars[2].unlink()
    made = written(folder, out)
    assert made.kept == len(tars) - 3
    assert [tar.read_bytes() for tar in tars] == before


# --------------------------------------------------------------------------------------------------------- the reader


def test_members_travel_between_processes(small):
    folder, out = small
    for member in Shards(out):
        copy = pickle.loads(pickle.dumps(member))
        assert copy == member
        assert str(copy) == f"{member.shard}::{member.name}"
        assert copy.read() == (folder / member.name).read_bytes()
        assert copy.stamp() == (len(copy.read()), os.stat(member.shard).st_mtime_ns)
    absent = Shards(out).get("no.jpg")
    assert str(pickle.loads(pickle.dumps(absent))) == f"{out}::no.jpg"


def test_threads_and_forks_read_the_right_bytes(small):
    """Two forked processes of four threads each read the same tar files at once, as does this one."""
    folder, out = small
    members = list(Shards(out))
    expected = {name: hashlib.md5(value).digest() for name, value in bytes_of(folder).items()}

    def wrong() -> int:
        found = []

        def read(seed):
            draw = random.Random(seed)
            for _ in range(300):
                member = draw.choice(members)
                if hashlib.md5(member.read()).digest() != expected[member.name]:
                    found.append(member)

        threads = [threading.Thread(target=read, args=(os.getpid() * 10 + i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return min(len(found), 100)

    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 101
            with contextlib.suppress(BaseException):
                code = wrong()
            os._exit(code)
        children.append(child)
    assert wrong() == 0
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_nothing_stays_open(small):
    before = len(os.listdir("/proc/self/fd"))
    held = [(member, member.read(), member.stamp()) for member in Shards(small[1])]
    assert len(held) == 30
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_moved_shard_folder_and_shards_on_another_disk_are_read(small, tmp_path):
    folder, out = small
    moved = tmp_path / "moved"
    out.rename(moved)
    assert {m.name: m.read() for m in Shards(moved)} == bytes_of(folder)

    elsewhere = tmp_path / "disk3"
    elsewhere.mkdir()
    tar = sorted(moved.glob("*.tar"))[1]
    shutil.move(tar, elsewhere / tar.name)
    for url in (str(elsewhere / tar.name), f"../disk3/{tar.name}", (elsewhere / tar.name).as_uri()):
        edit(moved, lambda index, url=url: index["shardlist"][1].update(url=url))
        (elsewhere / MARK).unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"leads out of the shard folder.*{MARK}"):
            Shards(moved)
        (elsewhere / MARK).write_text(json.dumps({"version": 1, "set": "of another"}))
        with pytest.raises(UserError, match="leads out of the shard folder"):
            Shards(moved)
        shutil.copy(moved / MARK, elsewhere / MARK)
        assert {m.name: m.read() for m in Shards(moved)} == bytes_of(folder)


def edit(out, change):
    index = json.loads((out / INDEX).read_text())
    change(index)
    (out / INDEX).write_text(json.dumps(index))


def member(index):
    return index["shardlist"][0]["members"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: member(i).__setitem__(0, "../../etc/passwd.jpg"), "leaves its folder"),
        (lambda i: member(i).__setitem__(0, "/etc/passwd.jpg"), "leaves its folder"),
        (lambda i: member(i).__setitem__(0, ""), "leaves its folder"),
        (lambda i: member(i).__setitem__(0, "a\0.jpg"), "leaves its folder"),
        (lambda i: member(i).__setitem__(0, i["shardlist"][1]["members"][0][0]), "stands twice"),
        (lambda i: member(i).__setitem__(1, -512), "cannot be in a tar file"),
        (lambda i: member(i).__setitem__(1, 513), "cannot be in a tar file"),
        (lambda i: member(i).__setitem__(2, 10**9), "cannot be in a tar file"),
        (lambda i: member(i).__setitem__(2, True), "expected .name, offset, bytes."),
        (lambda i: member(i).append(1), "expected .name, offset, bytes."),
        (lambda i: i["shardlist"][0].update(url="s3://bucket/a.tar"), "remote stores are not read"),
        (lambda i: i["shardlist"][0].update(url="pipe:cat a.tar"), "remote stores are not read"),
        (lambda i: i["shardlist"][0].update(url="file://host/a.tar"), "remote stores are not read"),
        (lambda i: i["shardlist"][0].update(url="/etc/hostname"), "leads out of the shard folder"),
        (lambda i: i["shardlist"][0].update(url=""), "no file name"),
        (lambda i: i["shardlist"][0].pop("filesize"), "filesize"),
        (lambda i: i["shardlist"][0].pop("members"), "members"),
        (lambda i: i.update(shardlist={}), "shardlist must be a list"),
        (lambda i: i["unit_fast"].update(version=99), "not an index of this version"),
        (lambda i: i["unit_fast"].pop("set"), "set"),
    ],
)
def test_an_index_that_is_not_ours_is_one_clear_error(small, change, message):
    edit(small[1], change)
    with pytest.raises(UserError, match=message) as found:
        opened(small[1])
    assert str(small[1] / INDEX) in str(found.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"unit_fast": NaN}', b"null"])
def test_a_damaged_index_is_one_clear_error(small, content):
    (small[1] / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=INDEX):
        opened(small[1])


def test_what_is_a_shard_folder_and_what_is_not(small, tmp_path):
    folder, out = small
    assert opened(folder) is None
    (folder / INDEX).write_text('{"images": []}')
    assert opened(folder) is None
    assert isinstance(opened(out), Shards)
    assert opened(out) is opened(out)
    edit(out, lambda index: index.pop("unit_fast"))
    with pytest.raises(UserError, match="not an index of this version"):
        opened(out)
    (out / MARK).unlink()
    with pytest.raises(UserError, match="another writer.*unpack them"):
        opened(out)
    (out / INDEX).unlink()
    assert opened(out) is None


@pytest.fixture
def coco(tmp_path):
    """(root whose training images are shards at the usual place, those)."""
    root = coco_root(tmp_path / "root")
    for i in range(20):
        picture(root / f"coco/images/train2017/more{i}.jpg", 40, 30, seed=i)
    out = Path(shard(root, tmp_path / "out", keys=["coco.train_images"], mib="0.011")["coco.train_images"])
    shutil.rmtree(root / "coco/images/train2017")
    place = root / "coco/images/train2017"
    shutil.move(out, place)
    return root, place


def open_coco(root):
    return open_dataset("coco", "train", data(root), task_config("coco"), augment=False)


def tar_of(place, name="000000000009.jpg"):
    return Path(Shards(place).get(name).shard)


def test_shards_may_stand_at_the_place_of_the_folder(coco):
    root, _ = coco
    dataset = open_coco(root)
    assert len(dataset.shards) == 1
    assert dataset.get(0)["image_path"].endswith("::000000000009.jpg")
    report = check(root, decode=True)
    assert report.ok
    assert next(s for s in report.splits if s.task == "coco").facts["shards"] > 2


def cut(tar):
    os.truncate(tar, tar.stat().st_size - 600)


def grow(tar):
    with open(tar, "ab") as file:
        file.write(bytes(512))


def another(tar):
    """Other members, the same size."""
    size = tar.stat().st_size
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as made:
        info = tarfile.TarInfo("stranger.jpg")
        info.size = size - 10240
        made.addfile(info, io.BytesIO(bytes(info.size)))
    os.truncate(tar, size)


def noise(tar):
    tar.write_bytes(np.random.default_rng(0).bytes(tar.stat().st_size))


def gone(tar):
    tar.unlink()


@pytest.mark.parametrize(
    ("damage", "message"), [(cut, "cut off or replaced"), (grow, "cut off or replaced"), (gone, "no such file")]
)
def test_damage_before_training_is_told_at_its_start(coco, damage, message):
    root, place = coco
    tar = tar_of(place)
    damage(tar)
    with pytest.raises(UserError, match=message) as found:
        open_coco(root)
    assert str(found.value).startswith(str(tar))
    assert "copy it anew" in str(found.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes, index.json says"), (grow, "bytes, index.json says"), (gone, "does not exist any more"),
     (another, "stranger.jpg at this place|no member at this place"), (noise, "no member at this place")],
)  # fmt: skip
def test_damage_while_training_is_a_bad_image_with_the_path(coco, damage, message):
    root, place = coco
    dataset = open_coco(root)
    member = dataset.image_path(0)
    assert isinstance(member, Member)
    assert load_image(member, 10**6).size == (60, 40)
    damage(Path(member.shard))
    with pytest.raises(BadImage, match=message) as found:
        dataset.get(0)
    assert found.value.path == f"{member.shard}::000000000009.jpg"
    with pytest.raises(BadImage, match=message):
        read_bytes(member)
    if damage not in (another, noise):  # the stamp is of the file alone
        with pytest.raises(BadImage, match=message):
            stamp(member)


@pytest.mark.parametrize("damage", [cut, grow, another, noise, gone])
def test_the_check_of_a_root_finds_each_damaged_shard(coco, damage):
    root, place = coco
    tars = [tar_of(place), tar_of(place, "000000000025.jpg")]
    for tar in tars:
        damage(tar)
    report = check(root, examples=100)
    assert not report.ok
    messages = [message for *_, examples in report.problems() for message in examples]
    for tar in set(tars):
        assert any(message.startswith(f"{tar}: ") for message in messages)
        assert any(message.startswith(f"{tar}::") for message in messages)


def test_the_stamp_changes_with_the_tar_file(coco):
    root, _ = coco
    member = open_coco(root).image_path(0)
    before = stamp(member)
    os.utime(member.shard, ns=(1, 1))
    assert stamp(member) != before
    assert stamp(member).bytes == before.bytes


def test_names_from_annotations_cannot_leave_the_shards(coco):
    root, place = coco
    path = root / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../val2017/000000000100.jpg"
    content["images"][1]["file_name"] = "absent.jpg"
    path.write_text(json.dumps(content))
    dataset = open_coco(root)
    with pytest.raises(BadImage, match="leaves its folder"):
        dataset.get(0)
    with pytest.raises(BadImage, match="not in the shards") as found:
        dataset.get(1)
    assert found.value.path == f"{place}::absent.jpg"
    kinds = {title for *_, title, _ in check(root).problems()}
    assert {"1 x image missing", "1 x file name outside the data root"} <= kinds


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_says_how_to_train_and_refuses_wrong_kinds(tmp_path, capsys):
    root = coco_root(tmp_path / "root")
    out = tmp_path / "o ut"
    assert cli.main(["data", "shard", str(root), "--images", "all", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "coco.val_images: not there, left out" in said
    assert f"to train from them: --data.paths 'coco.train_images={out}/coco_train_images'" in said
    assert cli.main(["data", "shard", str(root), "--images", "all", "--out", str(out)]) == 0
    assert "1 shards (1 were there)" in capsys.readouterr().out
    flags = ["--paths", f"coco.train_images={out}/coco_train_images"]
    shutil.rmtree(root / "coco/images")
    assert cli.main(["data", "check", str(root), *flags]) in (0, 1)
    assert "coco train ok 2" in capsys.readouterr().out
    for images, message in (
        ("coco.train_image", "no kind of images; nearest: coco.train_images"),
        ("coco.train_annotations", "no kind of images"),
        ("coco.test_images", "not found"),
    ):
        assert cli.main(["data", "shard", str(root), "--images", images, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
