"""Reading weights files of any origin without executing code from them."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unit_fast.digest import DIGEST, digest
from unit_fast.errors import UserError, printable

MAX_HEADER = 4 * 2**20
"""Bytes of a safetensors header that we read; the full model's is 0.2 MB."""
MAX_TENSORS = 10_000
MAX_JSON = 64 * 2**20


def read_json(path: Path):
    """The JSON value in ``path``; ``UserError`` names the file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path}: {path.stat().st_size} bytes; a checkpoint's are below {MAX_JSON}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a whole checkpoint folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); take another checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); take another checkpoint") from None


def has_digest(path: str | Path) -> bool | None:
    """Whether a safetensors file carries a digest of its tensors, which ``load_weights`` then compares; None for files
    of other kinds (PyTorch's have checksums of their own)."""
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    return DIGEST in _header(path, start[:8])[1] if _is_safetensors(start) else None


def _is_safetensors(start: bytes) -> bool:
    # A safetensors file begins with the length of its header and "{": the length may look like a pickle's or a zip's
    # first bytes, but theirs are never such a length.
    return int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:] == b"{"


def load_weights(path: str | Path, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by name: safetensors, or a PyTorch file read with ``weights_only=True``.

    A PyTorch file that holds anything but tensors and plain containers is refused; there is no other way to read it
    here. A state dict inside ``{"model": ...}`` or ``{"state_dict": ...}`` is unwrapped. ``expected``: names, shapes
    and dtypes that must match, compared before any data is read (safetensors). ``UserError`` also where the file
    carries a digest and its tensors have another.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not _is_safetensors(start) and (start[:2] == b"PK" or start[:1] == b"\x80"):
        weights = _load_torch(path)
        if expected is not None:
            _compare(path, {k: (list(v.shape), v.dtype) for k, v in weights.items()}, expected)
        return weights
    header, metadata = _header(path, start[:8])
    if expected is not None:
        _compare(path, {k: (v.get("shape"), _DTYPES.get(v.get("dtype"))) for k, v in header.items()}, expected)
    try:
        if str(path).isprintable():
            weights = safetensors.torch.load_file(path)
        else:  # the library takes no path that is not UTF-8
            weights = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file, or not readable ({printable(error)})") from None
    if DIGEST in metadata and digest(weights) != metadata[DIGEST]:
        raise UserError(f"{path}: its tensors differ from the checksum inside it: it is damaged; take another file")
    return weights


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _header(path: Path, start: bytes) -> tuple[dict[str, dict], dict]:
    """Entries of the tensors by name, and the metadata."""
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > min(MAX_HEADER, path.stat().st_size - 8):
        raise UserError(f"{path}: neither a safetensors nor a PyTorch file, or cut short")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(size))
        if not isinstance(header, dict):
            raise ValueError(type(header).__name__)
        metadata = header.pop("__metadata__", {})
        if len(header) > MAX_TENSORS or not all(isinstance(v, dict) for v in [*header.values(), metadata]):
            raise ValueError(f"{len(header)} entries")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file (header: {printable(error)})") from None
    return header, metadata


def _compare(path: Path, found: dict[str, tuple], expected: Mapping[str, Tensor]) -> None:
    for kind, names in (("missing", expected.keys() - found), ("not the model's", found.keys() - expected)):
        if names:
            first = ", ".join(printable(n, 80) for n in sorted(names)[:3])
            raise UserError(f"{path}: {len(names)} tensors {kind} (first: {first}); it belongs to another config")
    for name, (shape, dtype) in found.items():
        wanted = expected[name]
        if list(shape) != list(wanted.shape) or dtype != wanted.dtype:
            raise UserError(
                f"{path}: {name} is {dtype} {list(shape)}, the model's is {wanted.dtype} {list(wanted.shape)}; "
                "it belongs to another config"
            )


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file makes the unpickler raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = printable(
            next((line for line in said if "GLOBAL" in line or "Unsupported" in line), said[0])
        )  # names what it wanted
        raise UserError(
            f"{path}: refused: it is damaged, or holds more than tensors and would have to execute code to be read "
            f"({first}). Ask for a safetensors file or one that holds only tensors"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no state dict but {type(content).__name__}")
    other = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if other:
        raise UserError(f"{path}: {printable(other[0], 80)} is not a tensor; expected a state dict of tensors")
    return dict(content)
