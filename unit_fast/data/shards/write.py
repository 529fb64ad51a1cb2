"""Writes planned shards.

A tar file is written under a temporary name and renamed when it is whole, ``index.json`` comes last, from the tar
files' own headers. So a run that was killed is resumed by giving the same command again: whole tar files are kept.
"""

import contextlib
import fcntl
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from unit_fast.data.progress import progress_bar
from unit_fast.data.shards.index import KIND, MARK, OURS, VERSION, scan
from unit_fast.data.shards.member import INDEX
from unit_fast.data.shards.plan import Image, Plan
from unit_fast.data.store.files import describe, sync_folder
from unit_fast.errors import UserError, printable


@dataclass
class Written:
    """What ``write_shards`` did."""

    index: Path
    images: int = 0
    bytes: int = 0
    """Of the tar files."""
    shards: int = 0
    kept: int = 0
    """Shards that were whole already."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of the files that are no images."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of the images that could not be read or have a name that cannot be used."""


def write_shards(plan: Plan, progress: bool = False) -> Written:
    """Write the shards that are not there yet, then the index.

    Raises:
        UserError: another process writes here, the disk is full, or an image changes while it is written.
    """
    content = {
        "kind": "unit_fast shards", "version": VERSION, "set": plan.set, "source": str(plan.folder),
        "folders": [str(path) for path in plan.out], "places": plan.places,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        try:
            for path in plan.out:
                if not (path / MARK).exists():
                    _write_json(path / MARK, content)
            lock = stack.enter_context(open(plan.out[0] / MARK, "rb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{printable(plan.out[0], 400)}: another process writes these shards; wait for it"
            ) from None
        except OSError as error:
            raise UserError(f"{printable(plan.out[0], 400)}: cannot be written ({describe(error)})") from None
        for path in plan.out:  # of a run that was killed
            for left in path.glob(".*.unit-fast-tmp"):
                left.unlink()
        written = Written(plan.out[0] / INDEX, skipped=plan.skipped)
        total = sum(image.size for shard in plan.shards for image in shard)
        bar = stack.enter_context(progress_bar(f"shards of {plan.name}", total, progress, of_bytes=True))
        entries = [_entry(plan, shard, written, bar) for shard in range(len(plan.shards))]
        _write_index(plan, [entry for entry in entries if entry is not None], written)
    return written


def _entry(plan: Plan, number: int, written: Written, bar) -> dict | None:
    """The index's entry of a shard, which is written if it is not there; None where none of its images is readable."""
    path, images = plan.path(number), plan.shards[number]
    wanted = [(image.name, image.size, image.seconds) for image in images]
    found = None
    with contextlib.suppress(OSError, UserError):
        found = scan(path)
    if found is not None and [(name, size, seconds) for name, _, size, seconds in found] == wanted:
        written.kept += 1
        bar(sum(image.size for image in images))
    else:
        if not _write_tar(plan.folder, path, images, written, bar):
            path.unlink(missing_ok=True)
            return None
        found = scan(path)
    state = os.stat(path)
    written.shards += 1
    written.images += len(found)
    written.bytes += state.st_size
    home = plan.places[number] == 0
    return {
        "url": path.name if home else str(path), "nsamples": len(found), "filesize": state.st_size,
        "time_ns": state.st_mtime_ns, "members": [[name, offset, size] for name, offset, size, _ in found],
    }  # fmt: skip


def _write_tar(folder: Path, path: Path, images: list[Image], written: Written, bar) -> int:
    """Write one tar file; the number of its members."""
    members = 0
    try:
        with (
            _replacing(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar,
        ):
            for image in images:
                bar(image.size)
                try:
                    content = (folder / image.name).read_bytes()
                except OSError as error:
                    written.unreadable.append((image.name, describe(error)))
                    continue
                if len(content) != image.size:
                    raise UserError(
                        f"{printable(folder / image.name, 400)}: changed while the shards were written; give the "
                        "same command again when it is at rest, with an empty --out"
                    )
                header = tarfile.TarInfo(image.name)
                header.size, header.mode, header.mtime = len(content), 0o644, image.seconds
                tar.addfile(header, io.BytesIO(content))
                members += 1
    except OSError as error:
        raise UserError(
            f"{printable(path, 400)}: cannot be written ({describe(error)}); free some space or give another --out, "
            "then the same command again: whole shards are kept"
        ) from None
    return members


def _write_index(plan: Plan, entries: list[dict], written: Written) -> None:
    left_out = [list(pair) for pair in (*written.unreadable, *written.skipped)]
    # small things first: what kind of index it is is read off the beginning
    content = {
        "__kind__": KIND, "wids_version": 1, "name": plan.name,
        OURS: {"version": VERSION, "set": plan.set, "source": str(plan.folder), "left_out": left_out},
        "shardlist": entries,
    }  # fmt: skip
    _write_json(written.index, content)


def _write_json(path: Path, content) -> None:
    with _replacing(path) as file:
        file.write(json.dumps(content, separators=(",", ":")).encode())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` once it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.unit-fast-tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
