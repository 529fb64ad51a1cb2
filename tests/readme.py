"""Execute every fenced ``sh`` and ``python`` block of Markdown files: ``python -m tests.readme README.md docs/*.md``.

Blocks run in order, each in a process of its own, all in one scratch folder that sees the files beside the first
file, with this environment's programs first on the path. A comment before a block changes it for CI and is invisible on
the page:

    <!-- ci: skip, REASON -->            the block is not run
    <!-- ci: instead COMMAND -->         COMMAND runs in its place

The exit code is 1 when a block fails; blocks in other languages are not run and are listed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:<!-- ci: (?P<note>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)


@dataclass
class Block:
    language: str
    code: str
    note: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of ``text`` with their CI notes, in order."""
    return [
        Block(m["language"], m["code"], m["note"] or "", text.count("\n", 0, m.start("language")) + 1)
        for m in _BLOCK.finditer(text)
    ]


def command_of(block: Block) -> list[str] | None:
    """What to execute for a block; None when it is not run."""
    if block.note.startswith("skip"):
        return None
    if block.note.startswith("instead "):
        return ["bash", "-euo", "pipefail", "-c", block.note.removeprefix("instead ")]
    if block.language in ("sh", "bash"):
        return ["bash", "-euo", "pipefail", "-c", block.code]
    return [sys.executable, "-c", block.code] if block.language == "python" else None


def run(*paths: Path) -> int:
    """Run all blocks of ``paths``; the number of failures."""
    failures, root = 0, paths[0].resolve().parent
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as scratch:
        for entry in root.iterdir():
            if entry.name not in ("runs", ".git"):
                (Path(scratch) / entry.name).symlink_to(entry)
        found = [(page, block) for page in paths for block in blocks(page.read_text(encoding="utf-8"))]
        for page, block in found:
            command, start = command_of(block), time.monotonic()
            title = f"{page.name}:{block.line} {(block.code.strip().splitlines() or [''])[0]}"
            if command is None:
                print(f"not run  {title}  ({block.note or block.language or 'plain text'})", flush=True)
                continue
            result = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
            verdict = "ok     " if result.returncode == 0 else "FAILED "
            print(f"{verdict}  {title}  ({time.monotonic() - start:.0f} s)", flush=True)
            if result.returncode != 0:
                failures += 1
                print(result.stdout[-3000:], result.stderr[-3000:], sep="\n", flush=True)
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.readme", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    sys.exit(int(run(*parser.parse_args().files) > 0))
