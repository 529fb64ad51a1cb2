"""The runner of the blocks of README and ``docs/``, and rules for these pages."""

import re
from pathlib import Path

import pytest

from tests import readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TEXT = """
```sh
echo one > a.txt
```
<!-- ci: instead cp a.txt b.txt -->
```sh
exit 7
```
<!-- ci: skip, it takes an hour -->
```sh
exit 8
```
```python
assert open("b.txt").read() == "one\\n"
```
```text
not code
```
"""


def test_blocks_share_a_folder_and_obey_their_notes(tmp_path, capsys):
    (tmp_path / "X.md").write_text(TEXT)
    (tmp_path / "Y.md").write_text("```sh\ncat b.txt\n```\n")
    assert readme.run(tmp_path / "X.md", tmp_path / "Y.md") == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 4
    assert out.count("not run") == 2
    assert not (tmp_path / "a.txt").exists()


def test_a_failing_block_fails_the_run(tmp_path, capsys):
    (tmp_path / "X.md").write_text("```python\nraise SystemExit('boom')\n```\n")
    assert readme.run(tmp_path / "X.md") == 1
    assert "boom" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page):
    for block in readme.blocks(page.read_text(encoding="utf-8")):
        assert block.language in ("sh", "python", "text"), f"{page.name}:{block.line}"
        if block.note.startswith("skip"):
            assert len(block.note) > len("skip, a reason"), f"{page.name}:{block.line}: say why"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]
        assert not heading or heading in slugs, f"{page.name}: {target}"


def test_a_step_of_coco_is_read_in_under_1500_lines():
    (block,) = [b for b in readme.blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")) if "wc -l" in b.code]
    files = re.findall(r"[\w/]+\.py", block.code)
    assert len(files) >= 10
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files) < 1500
