"""The runner of the README's blocks, and rules for the README itself."""

from pathlib import Path

from tests import readme

ROOT = Path(__file__).resolve().parents[1]

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
    assert readme.run(tmp_path / "X.md") == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 3
    assert out.count("not run") == 2
    assert not (tmp_path / "a.txt").exists()


def test_a_failing_block_fails_the_run(tmp_path, capsys):
    (tmp_path / "X.md").write_text("```python\nraise SystemExit('boom')\n```\n")
    assert readme.run(tmp_path / "X.md") == 1
    assert "boom" in capsys.readouterr().out


def test_every_block_of_the_readme_is_run_or_says_why_not():
    for block in readme.blocks((ROOT / "README.md").read_text(encoding="utf-8")):
        assert block.language in ("sh", "python", "text"), f"README.md:{block.line}"
        if block.note.startswith("skip"):
            assert len(block.note) > len("skip, a reason"), f"README.md:{block.line}: say why"
