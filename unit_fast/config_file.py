"""Reading a configuration file: JSON, YAML or TOML by its ending."""

import json
import re
import tomllib
from pathlib import Path

from unit_fast.errors import UserError

MOST_BYTES = 16 * 2**20
"""A larger file is no configuration; ``config.json`` of eight tasks has 6 kB."""

_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


def read_config_file(path: str | Path) -> dict:
    """What the file holds, as plain values. ``UserError`` names the file and what is wrong with it."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be read (not a plain file); give another run or file")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES >> 20} MiB and is no configuration")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a run folder's config.json") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another run or file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    kind = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}.get(path.suffix.lower(), "JSON")
    try:
        return {"YAML": _yaml, "TOML": tomllib.loads, "JSON": json.loads}[kind](text)
    except (ValueError, RecursionError) as error:  # also json's and tomllib's own errors
        raise UserError(f"{path}: not valid {kind} ({' '.join(str(error).split())})") from None


def _yaml(text: str):
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers (PyYAML reads 1e-4 as text), no key twice, and no aliases, by which a short file can
        stand for gigabytes."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not taken")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"line {node.start_mark.line + 1}: the key {name!r} stands twice")
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader) or {}  # an empty file says nothing
    except yaml.YAMLError as error:
        raise ValueError(error) from None
