"""Writing a file so that a reader, or a machine that stops, finds the old one or the new one."""

import uuid
from pathlib import Path


def replace(path: Path, content: str | bytes) -> None:
    """Replace the file ``path``, whole or not at all; text as UTF-8. ``OSError`` where it cannot be."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
