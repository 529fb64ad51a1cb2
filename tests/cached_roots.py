"""Small data roots read with and without a cache, and everything that can be seen of a data set."""

import dataclasses
import os

import torch

from tests.data_roots import opened
from unit_fast.data.store import files, pickles


def small(root, task, split="train", config=None, keep=None, **more):
    """A split of a small root; ``keep``: the cache folder, None for no cache."""
    return opened(task, root, split, config, **{"cache_dir": str(keep or ""), **more})


def plain(value):
    """A sample, or a list of them, for ``==``."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return type(value).__name__, value


def seen(dataset, images=True):
    """Everything that a user of a data set can see of it."""
    count = len(dataset)
    found = {
        "samples": [plain(dataset.get(i)) for i in range(count)] if images else None,
        "ids": [plain(dataset.sample_id(i)) for i in range(count)],
        "facts": list(dataset.facts.items()),
        "findings": [dataclasses.asdict(f) for f in dataset.findings.found.values()],
        "images": [(str(path), size) for path, size in dataset.image_paths()],
    }
    if dataset.task.has_text:
        found["texts"] = [dataset.text(i) for i in range(count)]
        found["lengths"] = dataset.text_lengths().tolist()
        found["tokens"] = [dataset.text_tokens(i) for i in range(count)]
    if dataset.task.is_detection:
        found["names"] = list(dataset.class_names.items())
        found["truth"] = dataset.coco_ground_truth() if dataset.has_targets else None
    return found


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


class Reads:
    """Which files were opened by readers, besides vocabulary and answer list."""

    def __init__(self, monkeypatch):
        self.names, real = [], files.open_file

        def open_file(path, *more):
            if "label2ans" not in str(path):
                self.names.append(os.path.basename(path))
            return real(path, *more)

        for module in (files, pickles):
            monkeypatch.setattr(module, "open_file", open_file)

    def take(self):
        names, self.names[:] = list(self.names), []
        return names


def about_the_cache(caplog):
    """What was logged, but for what the readers found in the files."""
    return [record for record in caplog.records if record.name != "unit_fast.data.readers"]
