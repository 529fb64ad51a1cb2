"""Checkpoints: whole or absent, checked when read, and never executing code.

A checkpoint is a folder::

    model.safetensors   weights and buffers         config.json   the RunConfig
    state.safetensors   training state: tensors     state.json    training state: everything else
    ema.safetensors     averaged weights, if kept   manifest.json sizes and SHA-256 of the others

It is written under another name, made durable, and renamed. Beside the numbered folders of a run, ``last`` and ``best``
are relative symbolic links to two of them, replaced by rename too, so that ``checkpoints/best/model.safetensors`` is a
path any tool can open. Each safetensors file also carries a digest of its tensors in its own metadata, so that damage
is seen where the manifest is lost. Older numbered folders are deleted only afterwards, and never one that is pointed
to.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unit_fast import faults
from unit_fast.config import RunConfig, load_config, to_json
from unit_fast.data.store.files import sync_folder
from unit_fast.digest import DIGEST, digest
from unit_fast.errors import UserError, printable
from unit_fast.model import UniT
from unit_fast.weights.files import has_digest, load_weights, read_json

WEIGHTS, EMA, CONFIG = "model.safetensors", "ema.safetensors", "config.json"
STATE, STATE_JSON, MANIFEST = "state.safetensors", "state.json", "manifest.json"
LINKS = ("last", "best", "best_ema")

_log = logging.getLogger("unit_fast.checkpoint")


class SaveError(UserError):
    """A checkpoint could not be written; what was there before is untouched."""


# ------------------------------------------------------------------------------------------------------- writing


def save(
    parent: str | Path,
    name: str,
    weights: Mapping[str, Tensor],
    config: RunConfig,
    state: dict | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoint ``parent/name``, replacing one of that name. ``SaveError`` if the disk refuses.

    ``state`` is any nesting of dicts with string keys, lists, tensors and JSON values.
    """
    parent = Path(parent)
    files: dict[str, Mapping[str, Tensor] | bytes] = {WEIGHTS: weights, CONFIG: to_json(config).encode()}
    if state is not None:
        tensors: dict[str, Tensor] = {}
        plain = _pack(state, "", tensors)
        files |= {STATE: tensors, STATE_JSON: (json.dumps(plain, indent=1) + "\n").encode()}
    if ema is not None:
        files[EMA] = ema
    folder, final = parent / f"{name}.tmp-{uuid.uuid4().hex[:8]}", parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _check_space(parent, files)
        folder.mkdir()
        manifest = {}
        for file, content in files.items():
            faults.point(f"save.before.{file}")
            _write(folder / file, content)
            manifest[file] = {"bytes": (folder / file).stat().st_size, "sha256": _sha256(folder / file)}
        faults.point("save.before.manifest")
        _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        sync_folder(folder)
        faults.point("save.before.rename")
        if final.exists():
            old = parent / f"{name}.old-{uuid.uuid4().hex[:8]}"
            final.rename(old)
            faults.point("save.between.renames")
            folder.rename(final)
            shutil.rmtree(old)
        else:
            folder.rename(final)
        sync_folder(parent)
        faults.point("save.after.rename")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(
            f"{final}: could not be written ({error.strerror or error}); the earlier checkpoints are untouched. "
            "Free space or make the folder writable"
        ) from error
    return final


def save_weights(folder: str | Path, model: torch.nn.Module, config: RunConfig) -> Path:
    """A checkpoint folder with weights and configuration alone, as ``convert`` writes it."""
    folder = Path(folder)
    return save(folder.parent, folder.name, model.state_dict(), config)


def _check_space(parent: Path, files: dict) -> None:
    need = sum(len(c) if isinstance(c, bytes) else sum(t.nbytes for t in c.values()) for c in files.values())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise OSError(None, f"{need / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")


def _write(path: Path, content: Mapping[str, Tensor] | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors = {k: v.detach().to("cpu").contiguous() for k, v in content.items()}
        try:
            safetensors.torch.save_file(tensors, path, metadata={DIGEST: digest(tensors)})
        except safetensors.SafetensorError as error:  # its text is the system's, e.g. "No space left on device"
            raise OSError(None, str(error)) from error
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # the library makes it private
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point(parent: Path, link: str, target: str) -> None:
    """Make ``parent/link`` point to ``parent/target``, in one step."""
    aside = parent / f"{link}.tmp-{uuid.uuid4().hex[:8]}"
    aside.symlink_to(target, target_is_directory=True)
    faults.point(f"point.{link}")
    aside.replace(parent / link)
    sync_folder(parent)


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` numbered checkpoints and those that a link points to."""
    pointed = {os.readlink(parent / link) for link in LINKS if (parent / link).is_symlink()}
    for folder in numbered(parent)[keep:]:
        if folder.name not in pointed:
            faults.point("prune.before.delete")
            # Under another name first: a deletion cut short must not leave a folder that looks like a checkpoint.
            shutil.rmtree(folder.rename(parent / f"{folder.name}.old-{uuid.uuid4().hex[:8]}"))


def sweep(parent: Path) -> None:
    """Remove what a killed save left behind; a checkpoint caught between its two renames is put back."""
    if not parent.is_dir():
        return
    for path in list(parent.iterdir()):
        name, mark, _ = path.name.partition(".tmp-")
        if mark:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
            continue
        name, mark, _ = path.name.partition(".old-")
        if mark and not (parent / name).exists() and _intact(path):
            path.rename(parent / name)
        elif mark:
            shutil.rmtree(path)


def numbered(parent: Path) -> list[Path]:
    """The numbered checkpoints of a run, newest first."""
    found = [p for p in parent.glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


# ------------------------------------------------------------------------------------------------------- reading


def verify(folder: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest. ``UserError`` names the first that differs, is missing or
    cannot be read."""
    folder = Path(folder)
    manifest = _manifest(folder)
    for name in manifest:
        _verify_file(folder, name, manifest)
    for name in (WEIGHTS, CONFIG):
        if name not in manifest:
            raise UserError(f"{folder / MANIFEST}: does not list {name}; take another checkpoint")


def verify_weights(path: str | Path) -> None:
    """Compare one weights file of any origin with the manifest beside it, where that lists it. A warning where nothing
    tells whether a safetensors file is whole: neither such a manifest nor a digest inside it."""
    path = Path(path)
    manifest = _manifest(path.parent) if (path.parent / MANIFEST).exists() else {}
    if path.name in manifest:
        _verify_file(path.parent, path.name, manifest)
    elif has_digest(path) is False:
        _log.warning("%s: has no checksum, neither inside nor in a manifest: damage would not be noticed", path)


def _manifest(folder: Path) -> dict[str, dict]:
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        raise UserError(f"{folder / MANIFEST}: not a checkpoint's manifest; take another checkpoint")
    return manifest


def _verify_file(folder: Path, name: str, manifest: dict[str, dict]) -> None:
    path, entry = folder / name, manifest[name]
    if path.name != name:
        raise UserError(f"{folder / MANIFEST}: names a file elsewhere ({printable(name)}); take another checkpoint")
    try:
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint; take another one of the run")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise UserError(f"{path}: {size} bytes, the manifest says {entry.get('bytes')}; take another checkpoint")
        if _sha256(path) != entry.get("sha256"):
            raise UserError(f"{path}: its content differs from the checksum in the manifest; take another checkpoint")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); take another checkpoint") from None


def _intact(folder: Path) -> bool:
    try:
        verify(folder)
    except UserError:
        return False
    return True


def load_state(folder: str | Path) -> dict:
    """The training state that ``save`` was given. Call ``verify`` first."""
    folder = Path(folder)
    if STATE not in read_json(folder / MANIFEST):
        raise UserError(f"{folder}: holds weights without a training state; start a new run with --init-from {folder}")
    tensors = load_weights(folder / STATE)
    used: set[str] = set()
    state = _unpack(read_json(folder / STATE_JSON), tensors, used, folder)
    if left := sorted(set(tensors) - used):
        raise UserError(
            f"{folder / STATE}: {len(left)} tensors not named in {STATE_JSON} (first: {printable(left[0])})"
        )
    return state


def find(path: str | Path, prefer: Iterable[str] = ("best", "last")) -> Path:
    """The checkpoint folder meant by a run folder, its ``checkpoints`` folder, a checkpoint or its weights file."""
    path = Path(path)
    if path.name == WEIGHTS and path.is_file():
        return path.parent
    if (path / WEIGHTS).is_file():
        return path
    for parent in (path / "checkpoints", path):
        for link in prefer:
            if (parent / link / WEIGHTS).is_file():
                return parent / link
        if found := numbered(parent):
            return found[0]
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    raise UserError(f"{path}: holds no checkpoint; give a run folder, a checkpoint folder or a {WEIGHTS}")


def load_model(path: str | Path, *, ema: bool = False, device="cpu"):
    """``(UniT, RunConfig)`` of a run folder (its best checkpoint, else the last), a checkpoint or a weights file.

    ema: take the averaged weights. The files are compared with their checksums, of the manifest or of their own;
    names and shapes must be the model's. Nothing in them is executed.
    """
    folder = find(path, ("best_ema", "last") if ema else ("best", "last"))
    if (folder / MANIFEST).exists():
        verify(folder)
    else:
        verify_weights(folder / (EMA if ema and (folder / EMA).is_file() else WEIGHTS))
    config = load_config(folder / CONFIG)
    if ema and not (folder / EMA).is_file():
        raise UserError(f"{folder}: has no averaged weights; the run needs --ema-decay above 0")
    model = UniT(config.model)
    fill(model, load_weights(folder / (EMA if ema else WEIGHTS), expected=model.state_dict()))
    return model.to(device), config


def run_of(path: str | Path) -> Path | None:
    """The run folder of a checkpoint, of anything in one, or of a run itself; None where there is none."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return path
    return next((p.parent for p in path.absolute().parents if p.name == "checkpoints"), None)


@torch.no_grad()
def fill(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into the model; names and shapes must have been compared."""
    for name, value in model.state_dict().items():
        value.copy_(weights[name])


# ----------------------------------------------------------------------------------------- state <-> JSON and tensors


def _pack(value, name: str, tensors: dict[str, Tensor]):
    """``value`` with every tensor replaced by ``{"tensor": its name}`` and put into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        if "tensor" in value or not all(isinstance(key, str) for key in value):
            raise TypeError(f"state {name}: keys must be strings other than 'tensor', found {list(value)[:3]}")
        return {key: _pack(v, f"{name}/{key}" if name else key, tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(value, tensors: dict[str, Tensor], used: set[str], folder: Path):
    if isinstance(value, list):
        return [_unpack(v, tensors, used, folder) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        if value["tensor"] not in tensors:
            raise UserError(f"{folder / STATE}: lacks tensor {printable(value['tensor'])}; take another checkpoint")
        used.add(value["tensor"])
        return tensors[value["tensor"]]
    return {key: _unpack(v, tensors, used, folder) for key, v in value.items()}


def config_of(folder: Path) -> RunConfig:
    """The configuration stored in a checkpoint."""
    return load_config(folder / CONFIG)
