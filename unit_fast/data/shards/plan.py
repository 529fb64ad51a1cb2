"""What goes where when the images of a folder are written into shards.

The images are taken in an order drawn from the seed, so that a reader that takes the shards one after the other meets
them mixed, and cut into tar files of a size, which are spread over the out folders by free space.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unit_fast.data.sampler import order
from unit_fast.data.shards.index import MARK, VERSION, opened, read_mark
from unit_fast.data.shards.member import BLOCK
from unit_fast.data.store.files import describe, safe_path
from unit_fast.errors import UserError, printable

IMAGES = (".jpg", ".jpeg", ".png")
RESERVE = 64 * 2**20
"""Bytes left free on every disk."""
LARGEST_TIME = 8**11 - 1
"""Seconds that a tar header can hold."""

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""WebDataset's key of a sample and its extension: the name up to the first dot of its last part."""


@dataclass(frozen=True)
class Image:
    """An image file as it was when it was listed."""

    name: str
    size: int
    time_ns: int

    @property
    def seconds(self) -> int:
        """Its time as far as a tar header can hold it."""
        return min(max(0, self.time_ns // 10**9), LARGEST_TIME)


@dataclass
class Plan:
    """What is to be written. Made by ``plan_shards``."""

    folder: Path
    out: list[Path]
    name: str
    set: str
    """Hash of all that decides what is written."""
    shards: list[list[Image]]
    places: list[int]
    """For each shard the out folder it goes to."""
    skipped: list[tuple[str, str]]
    """Name and reason of the files that are no images or cannot be members."""

    def path(self, shard: int) -> Path:
        return self.out[self.places[shard]] / f"{self.name}-{shard:06d}.tar"


def plan_shards(
    folder: Path,
    out: Sequence[Path],
    *,
    name: str | None = None,
    shard_mib: float = 256,
    seed: int = 0,
    within: Path | None = None,
    used: dict[int, int] | None = None,
) -> Plan:
    """Look at a folder of images and decide what goes where. Writes nothing but the out folders themselves.

    Args:
        folder: images, also in folders below it.
        out: where the shards go; the index goes into the first. Empty, or begun by the same call.
        name: first part of the tar files' names; default the folder's.
        shard_mib: largest tar file, MiB; a larger image gets one of its own.
        seed: of the images' order.
        within: links may lead to anywhere in here; default ``folder``.
        used: bytes that plans not yet written will take from each disk (``st_dev``); this plan's are added.

    Raises:
        UserError: no images; two images of one WebDataset key; an out folder that holds something else, or shards of
            other images or settings; not enough free space.
    """
    folder, out = folder.absolute(), [path.absolute() for path in out]
    if not folder.is_dir():
        raise UserError(f"{printable(folder, 400)}: no such folder; give one with images")
    if opened(folder) is not None:
        raise UserError(f"{printable(folder, 400)}: holds shards already; give a folder of image files")
    if not shard_mib > 0:
        raise UserError(f"--shard-mib {shard_mib}: must be above 0")
    if not out:
        raise UserError("no folder for the shards; give --out DIR")
    resolved = [path.resolve() for path in out]
    for path in resolved:
        if path.is_relative_to(folder.resolve()):
            raise UserError(f"{printable(path, 400)}: lies in the image folder; give --out elsewhere")
        if resolved.count(path) > 1:
            raise UserError(f"{printable(path, 400)}: given twice as --out; name each folder once")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name if name is None else name) or "images"

    images, skipped = list_images(folder, within)
    if not images:
        raise UserError(f"{printable(folder, 400)}: no .jpg, .jpeg or .png file in it; correct the path")
    limit = int(shard_mib * 2**20)
    facts = [VERSION, name, seed, limit, [str(path) for path in resolved]]
    listed = [(image.name, image.size, image.time_ns) for image in images]
    set_ = hashlib.sha256(json.dumps([facts, listed]).encode()).hexdigest()[:32]
    shards = _cut([images[i] for i in order(seed, f"shards/{name}", 0, len(images))], limit)
    plan = Plan(folder, out, name, set_, shards, [], skipped)
    plan.places = _places(plan, {} if used is None else used)
    return plan


def list_images(folder: Path, within: Path | None = None) -> tuple[list[Image], list[tuple[str, str]]]:
    """The images in a folder and those below it, by name, and (name, reason) of all files that are left out.

    Raises:
        UserError: two names have one WebDataset key, so that readers would take them for one sample.
    """
    images: list[Image] = []
    skipped: list[tuple[str, str]] = []
    for name, path, linked in sorted(_walk(folder, "", False, {os.path.realpath(folder)}, skipped)):
        try:
            name.encode()
            if Path(name).suffix.lower() not in IMAGES:
                raise UserError(f"not one of {', '.join(IMAGES)}")
            if _KEY.fullmatch(name) is None:
                raise UserError("its name begins with a dot, which gives WebDataset no key")
            tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
            if linked:
                safe_path(folder, name, within)
            state = os.stat(path)
        except UnicodeEncodeError:
            skipped.append((name.encode("utf-8", "backslashreplace").decode(), "its name is not UTF-8"))
        except UserError as error:
            skipped.append((name, str(error)))
        except (OSError, ValueError) as error:  # ValueError: too long for a tar header
            skipped.append((name, describe(error)))
        else:
            images.append(Image(name, state.st_size, state.st_mtime_ns))
    keys: dict[str, str] = {}
    for image in images:
        first = keys.setdefault(_KEY.fullmatch(image.name)[1], image.name)
        if first is not image.name:
            raise UserError(
                f"{printable(folder, 400)}: {printable(first)} and {printable(image.name)} are the same up to the "
                "first dot, which is the key of a sample in shards; rename or remove one"
            )
    return images, skipped


def _walk(folder, prefix: str, linked: bool, seen: set[str], skipped) -> Iterator[tuple[str, str, bool]]:
    """(name in the folder, path, whether a link leads to it) of each file; links in a circle are not followed."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        skipped.append((prefix or str(folder), describe(error)))
        return
    for entry in entries:
        name, link = prefix + entry.name, linked or entry.is_symlink()
        if not entry.is_dir():
            yield name, entry.path, link
            continue
        real = os.path.realpath(entry.path)
        if real in seen:
            skipped.append((name, "a link to a folder that was read already"))
            continue
        seen.add(real)
        yield from _walk(entry.path, f"{name}/", link, seen, skipped)


def _blocks(size: int) -> int:
    """Bytes that a member takes, its header included."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def _whole(members: int) -> int:
    """Bytes of a tar file whose members take so many: two empty blocks end it, and it is whole records long."""
    return -(-(members + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _cut(images: list[Image], limit: int) -> list[list[Image]]:
    shards: list[list[Image]] = [[]]
    content = 0
    for image in images:
        if shards[-1] and _whole(content + _blocks(image.size)) > limit:
            shards.append([])
            content = 0
        shards[-1].append(image)
        content += _blocks(image.size)
    return shards


def _places(plan: Plan, used: dict[int, int]) -> list[int]:
    """The out folder of each shard: as begun, else where most space is left."""
    places = None
    for path in plan.out:
        try:
            path.mkdir(parents=True, exist_ok=True)
            mark = read_mark(path)
            others = sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(".unit-fast-tmp"))
        except OSError as error:
            raise UserError(f"{printable(path, 400)}: cannot be used for shards ({describe(error)})") from None
        if mark is None and others:
            raise UserError(
                f"{printable(path, 400)}: is not empty ({printable(others[0])}) and was not begun by `unit-fast data "
                "shard`; give an empty folder"
            )
        if mark is not None and mark.get("set") != plan.set:
            raise UserError(
                f"{printable(path, 400)}: holds shards of other images or other settings (--out, --seed, --shard-mib) "
                f"than {printable(plan.folder, 400)} has now; give an empty folder, or empty this one"
            )
        places = places or (mark and mark.get("places"))
    sizes = [_whole(sum(_blocks(image.size) for image in shard)) for shard in plan.shards]
    if places is not None and (len(places) != len(sizes) or not set(places) <= set(range(len(plan.out)))):
        raise UserError(f"{printable(plan.out[0] / MARK, 400)}: damaged; empty the folder")
    found = [_disk(path) for path in plan.out]
    disks = [disk for disk, _ in found]
    left = {disk: space - RESERVE - used.get(disk, 0) for disk, space in found}
    free = sum(left.values())
    chosen: list[int] = []
    needed = 0
    for n, size in enumerate(sizes):
        if places is None:
            place = max(range(len(disks)), key=lambda i: (left[disks[i]], -chosen.count(i), -i))
        else:
            place = places[n]
        chosen.append(place)
        if not plan.out[place].joinpath(f"{plan.name}-{n:06d}.tar").exists():
            left[disks[place]] -= size
            needed += size
            used[disks[place]] = used.get(disks[place], 0) + size
    if min(left.values()) < 0:
        folders = ", ".join(printable(path, 200) for path in plan.out)
        raise UserError(
            f"the shards of {printable(plan.folder, 400)} need {needed / 1e9:,.2f} GB, but {folders} have "
            f"{max(free, 0) / 1e9:,.2f} GB free (64 MiB are left over on each disk); free some, or give another --out"
        )
    return chosen


def _disk(path: Path) -> tuple[int, int]:
    """Which file system a folder is on, and the bytes free there."""
    return os.stat(path).st_dev, shutil.disk_usage(path).free
