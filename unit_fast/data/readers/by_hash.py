"""Validation samples of a file that has none set aside: chosen by a hash, so that the choice is always the same."""

import hashlib

SHARE = 10
"""One sample in this many is held out."""


def held_out(keys: list[str]) -> list[bool]:
    """Which of the samples called ``keys`` are for validation: a tenth, by the SHA-256 of the key.

    What else is in the file does not matter, so that samples can be added; equal keys stay together. Of two different
    keys or more at least one is held out, and one is not; a single one is not.
    """
    hashes = {key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in keys}
    chosen = {key for key, digest in hashes.items() if int.from_bytes(digest[:8], "big") % SHARE == 0}
    order = sorted(hashes, key=hashes.__getitem__)
    if len(chosen) in (0, len(order)):
        chosen = set(order[:1]) if len(order) > 1 else set()
    return [key in chosen for key in keys]
