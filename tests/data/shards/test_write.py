"""Writing shards: what goes where, nothing lost, nothing overwritten, a kill costs one shard."""

import contextlib
import errno
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from tests.data_roots import coco_root, picture
from tests.shard_folders import bytes_of, small_folder, written
from unit_fast.commands import main as cli
from unit_fast.data.shards import plan as shard_plan
from unit_fast.data.shards.index import INDEX, MARK, Shards, opened, scan
from unit_fast.data.shards.plan import plan_shards
from unit_fast.data.shards.write import write_shards
from unit_fast.errors import UserError


@pytest.fixture
def small(tmp_path):
    return small_folder(tmp_path)


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
    free = {0: 10**9, 1: shard_plan.RESERVE + 25_000}
    monkeypatch.setattr(shard_plan, "_disk", lambda path: (disks[path], free[disks[path]]))
    plan = plan_shards(folder, list(disks), shard_mib=0.02)
    assert plan.places.count(1) <= 1 < plan.places.count(0)


def test_too_little_space_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "_disk", lambda path: (0, shard_plan.RESERVE + 20_000))
    with pytest.raises(UserError, match=r"need 0\.\d+ GB, but .*GB free .*another --out"):
        plan_shards(small[0], [tmp_path / "new"])
    assert list((tmp_path / "new").iterdir()) == []


def test_plans_made_together_share_the_space(small, tmp_path, monkeypatch):
    need = sum(p.stat().st_size for p in small[1].glob("*.tar"))
    free = shard_plan.RESERVE + int(1.5 * need)
    monkeypatch.setattr(shard_plan, "_disk", lambda path: (0, free))
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

    monkeypatch.setattr(os, "fsync", full)
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
