"""Images from tar shards: the same samples as from files, read in any order by anybody, damage told with the path."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.cached_roots import plain
from tests.data.image_roots import content, needs_dali, steps_of
from tests.data_roots import REAL, coco_root, needs_real, picture, task_config
from tests.data_roots import opened as opened_set
from tests.shard_folders import KEYS, bytes_of, shard, small_folder, without_images, written
from tests.small_runs import log_of, make_world, small_config, state_hash
from unit_fast.config import DataConfig
from unit_fast.data import BadImage, open_dataset
from unit_fast.data.check import check
from unit_fast.data.images.decode import load_image, read_bytes, stamp
from unit_fast.data.layout import Layout
from unit_fast.data.shards.index import INDEX, MARK, Member, Shards, opened, scan
from unit_fast.errors import UserError
from unit_fast.run.train import train
from unit_fast.tasks import get_task

TASKS = ("coco", "vg", "vqa2", "snli_ve")
engines = pytest.mark.parametrize(
    ("engine", "workers"),
    [("torchvision", 0), ("torchvision", 2), pytest.param("dali", 2, marks=needs_dali)],
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(root with images, root without, paths of the shards of the first, on two disks)."""
    folder = tmp_path_factory.mktemp("shards")
    root = make_world(folder / "world")
    paths = shard(root, folder / "disk1", "--out", str(folder / "disk2"))
    return root, without_images(root, folder / "bare"), paths


@pytest.fixture
def small(tmp_path):
    return small_folder(tmp_path)


def samples_of(task, split, settings, config):
    """Every sample with and without augmentation, but for where its image lies; None where there is no such split."""
    try:
        dataset = open_dataset(task, split, settings, config, augment=True)
    except UserError:
        return None
    assert bool(dataset.shards) == bool(settings.paths)
    found = []
    for index, key in itertools.product(range(len(dataset)), (None, 5)):
        sample = dataset.get(index, key)
        name = Path(sample.pop("image_path").rpartition("::")[2]).name
        found.append((name, plain(sample), dataset.shape(index, key)))
    return found


def assert_same_samples(loose: DataConfig, sharded: DataConfig, configs) -> int:
    """Of every split; the number of samples."""
    count = 0
    for short, split in itertools.product(TASKS, ("train", "val")):
        files, shards = (samples_of(short, split, settings, configs[short]) for settings in (loose, sharded))
        assert files == shards != []
        count += len(files or ())
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


@engines
def test_the_loader_reads_the_same_batches_from_shards_and_resumes(world, engine, workers):
    root, bare, paths = world
    options = {"engine": engine, "workers": workers, "group": 2}
    loose = content(steps_of(small_config(root, *TASKS, data=options), stop=30))
    sharded = small_config(root, *TASKS, data={**options, "root": str(bare), "paths": paths})
    whole = steps_of(sharded, stop=30)
    assert content(whole) == loose
    assert {task for task, *_ in loose} == set(sharded.model.tasks)
    counts = {}
    for step in whole[:11]:
        counts[step.task] = counts.get(step.task, 0) + step.request.samples
    assert content(steps_of(sharded, 11, 30, counts)) == loose[11:]


@engines
def test_unreadable_images_are_replaced_alike(tmp_path, engine, workers):
    root = make_world(tmp_path / "world")
    images = sorted((root / "coco/images/train2017").glob("*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:300])
    images[4].write_bytes(b"")
    images[5].unlink()
    paths = shard(root, tmp_path / "out", keys=["coco.train_images"])
    options = {"engine": engine, "workers": workers, "cache_dir": str(tmp_path / "cache")}
    loose = steps_of(small_config(root, "coco", data=options), stop=30)
    found = steps_of(small_config(root, "coco", data={**options, "paths": paths}), stop=30)
    assert content(found) == content(loose)

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


def tar_of(place, name="000000000009.jpg"):
    return Path(Shards(place).get(name).shard)


def test_shards_may_stand_at_the_place_of_the_folder(coco):
    root, _ = coco
    dataset = opened_set("coco", root)
    assert len(dataset.shards) == 1
    assert dataset.get(0)["image_path"].endswith("::000000000009.jpg")
    report = check(root, decode=True)
    assert report.ok
    assert next(s for s in report.splits if s.task == "coco").facts["shards"] > 2


def refilled(tar, members):
    """These (name, size) instead, the same length."""
    length = tar.stat().st_size
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as made:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            made.addfile(info, io.BytesIO(bytes(size)))
    os.truncate(tar, length)


def huge(tar):
    """A first header of a valid sum that tells of more bytes than a number of the disk's holds."""
    content = bytearray(tar.read_bytes())
    content[124:136] = b"\x80" + b"\x7f" * 11
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    tar.write_bytes(content)


DAMAGE = {
    "cut": lambda tar: os.truncate(tar, tar.stat().st_size - 600),
    "grown": lambda tar: os.truncate(tar, tar.stat().st_size + 512),
    "gone": lambda tar: tar.unlink(),
    "noise": lambda tar: tar.write_bytes(np.random.default_rng(0).bytes(tar.stat().st_size)),
    "another": lambda tar: refilled(tar, [("stranger.jpg", tar.stat().st_size - 10240)]),
    "renamed": lambda tar: refilled(
        tar, [("stranger.jpg".rjust(len(name), "x"), size) for name, _, size, _ in scan(tar)]
    ),
    "huge": huge,
}


@pytest.mark.parametrize(
    ("damage", "message"), [("cut", "cut off or replaced"), ("grown", "cut off or replaced"), ("gone", "no such file")]
)
def test_damage_before_training_is_told_at_its_start(coco, damage, message):
    root, place = coco
    tar = tar_of(place)
    DAMAGE[damage](tar)
    with pytest.raises(UserError, match=message) as found:
        opened_set("coco", root)
    assert str(found.value).startswith(str(tar))
    assert "copy it anew" in str(found.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "bytes, index.json says"), ("grown", "bytes, index.json says"), ("gone", "does not exist any more"),
     ("another", "no member at this place"), ("renamed", "stranger.jpg at this place"),
     ("noise", "no member at this place")],
)  # fmt: skip
def test_damage_while_training_is_a_bad_image_with_the_path(coco, damage, message):
    root, place = coco
    dataset = opened_set("coco", root)
    member = dataset.image_path(0)
    assert isinstance(member, Member)
    assert load_image(member, 10**6).size == (60, 40)
    DAMAGE[damage](Path(member.shard))
    with pytest.raises(BadImage, match=message) as found:
        dataset.get(0)
    assert found.value.path == f"{member.shard}::000000000009.jpg"
    with pytest.raises(BadImage, match=message):
        read_bytes(member)
    if damage not in ("another", "renamed", "noise"):  # the stamp is of the file alone
        with pytest.raises(BadImage, match=message):
            stamp(member)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_check_of_a_root_finds_each_damaged_shard(coco, damage):
    root, place = coco
    tars = [tar_of(place), tar_of(place, "000000000025.jpg")]
    for tar in tars:
        DAMAGE[damage](tar)
    report = check(root, examples=100)
    assert not report.ok
    messages = [message for *_, examples in report.problems() for message in examples]
    for tar in set(tars):
        assert any(message.startswith(f"{tar}: ") for message in messages)
        assert any(message.startswith(f"{tar}::") for message in messages) or damage == "huge"


def test_the_stamp_changes_with_the_tar_file(coco):
    root, _ = coco
    member = opened_set("coco", root).image_path(0)
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
    dataset = opened_set("coco", root)
    with pytest.raises(BadImage, match="leaves its folder"):
        dataset.get(0)
    with pytest.raises(BadImage, match="not in the shards") as found:
        dataset.get(1)
    assert found.value.path == f"{place}::absent.jpg"
    kinds = {title for *_, title, _ in check(root).problems()}
    assert {"1 x image missing", "1 x file name outside the data root"} <= kinds
