"""Folders of other formats made into one in COCO's: ``prepare(kind, source, target)``."""

from pathlib import Path

from unit_fast.data.prepare.labelled import Labelled
from unit_fast.data.prepare.write import Written, write
from unit_fast.errors import UserError, nearest, printable

KINDS = ("yolo", "voc")


def prepare(kind: str, source: str | Path, target: str | Path, *, copy: bool = False) -> Written:
    """Write the images and boxes of ``source`` as a folder in COCO's format.

    Args:
        kind: ``yolo`` (``data.yaml`` or ``classes.txt``, text files of boxes or polygons) or ``voc`` (an XML file an
            image).
        source: the folder; it is only read.
        target: a folder that does not exist or is empty. It appears when it is whole.
        copy: copy the images; otherwise they are hard links, or copies where the file system has no links.

    Raises:
        UserError: what is wrong with the files, naming file and line; nothing is left of ``target`` then.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if kind not in KINDS:
        raise UserError(f"--from {printable(kind, 60)}: not a format; {nearest(kind, KINDS)}")
    if not source.is_dir():
        raise UserError(f"{printable(source, 400)}: no such folder; give one in {kind.upper()} format")
    return write(_read(kind, source), target, copy=copy)


def _read(kind: str, source: Path) -> Labelled:
    if kind == "yolo":
        from unit_fast.data.prepare.yolo import read_yolo

        return read_yolo(source)
    from unit_fast.data.prepare.voc import read_voc

    return read_voc(source)
