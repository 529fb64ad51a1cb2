"""Reading annotation files through the cache: what tells one version of them from another.

The key of an entry holds each file's path as given, real path, size and times of change, the task, the split and what
else the reader depends on. Files below ``SMALL`` bytes in all are read directly: nothing would be gained.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from unit_fast.data.errors import Finding, Findings
from unit_fast.data.layout import Layout
from unit_fast.data.store.cache import Cache
from unit_fast.data.store.content import Content, hash_of
from unit_fast.errors import UserError

SMALL = 2**20
"""Bytes of all source files together below which nothing is cached."""
_SETTLED_S = 0.02
"""Two changes of a file closer together than this may have the same time of change."""


def existing(layout: Layout, *keys: str) -> dict[str, list[Path]]:
    """Layout key -> its files. None for an overridden path that does not exist: a reader that needs it says so."""
    found = {}
    for key in keys:
        try:
            found[key] = layout.files(key)
        except UserError:
            found[key] = []
    return found


def _state_of(sources: dict[str, list[Path]]) -> list[dict]:
    """What tells one version of the files from another. ``OSError`` when one cannot be looked at."""
    out = []
    for role, path in ((role, path) for role, paths in sources.items() for path in paths):
        real = os.path.realpath(path)
        stat = os.stat(real)
        out.append(
            {
                "role": role,
                "given": str(path),  # it stands in facts and findings
                "real": real,
                "bytes": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "ctime_ns": stat.st_ctime_ns,  # a file put in place of another may keep the time of writing
            }
        )
    return out


def _settled(sources: dict[str, list[Path]]) -> list[dict]:
    """``_state_of`` files whose next change will have another time of change."""
    while True:
        state = _state_of(sources)
        newest = max((max(s["mtime_ns"], s["ctime_ns"]) for s in state), default=0)
        if not 0 <= time.time_ns() - newest < _SETTLED_S * 1e9:
            return state
        time.sleep(_SETTLED_S)


def cached(
    cache: Cache, name: str, sources: dict[str, list[Path]], depends: dict, build: Callable[[], Content]
) -> Content:
    """``build()``, or what it gave when it last read the same files.

    Args:
        name: what is made of them.
        sources: all files that ``build`` reads, by what they are taken for.
        depends: JSON values of everything else that the content depends on.
    """
    try:
        fits = cache.folder is not None
        fits = fits and sum(os.path.getsize(path) for paths in sources.values() for path in paths) >= SMALL
        state = _settled(sources) if fits else None
    except OSError:  # the reader says what is wrong with the file
        state = None
    if state is None:
        return build()

    def still() -> bool:
        try:
            return _state_of(sources) == state
        except OSError:
            return False

    where = hash_of([[s["role"], s["given"], s["real"]] for s in state])[:12]
    return cache.open(f"{name}-{where}", {"sources": state, **depends}, build, still)


def read_through(dataset, sources: dict[str, list[Path]], depends: dict, build: Callable[[], Content]) -> Content:
    """``cached`` for a ``Dataset``, whose facts and findings are kept with the content.

    Args:
        dataset: the ``Dataset`` that reads; ``build`` fills its ``facts`` and ``findings``.
        sources, depends: see ``cached``; task and split are among what it depends on.
    """
    findings: Findings = dataset.findings
    if findings.found:
        return build()

    def with_notes() -> Content:
        content = build()
        content.values = {
            "facts": dict(dataset.facts),
            "findings": [[f.kind, f.severity, f.count, f.examples] for f in findings.found.values()],
            **content.values,
        }
        return content

    key = {"task": repr(dataset.task), "split": dataset.split, "examples": findings.limit, **depends}
    name = f"rows-{dataset.task.short}-{dataset.split}"
    content = cached(dataset.cache, name, sources, key, with_notes)
    if content.name is not None and not findings.found:
        dataset.facts.update(content.values["facts"])
        for kind, severity, count, examples in content.values["findings"]:
            findings.found[kind] = Finding(kind, severity, count, list(examples))
    return content
