"""What ``bench_data`` measures, opened: our loader's engines, and the peers in torch's DataLoader.

All read the same batches in the same order: the peers are given ours, which groups images of a size.
"""

import dataclasses
import time
from collections.abc import Iterator

import torch

from benchmarks.data.peers import PeerData, pad_collate
from benchmarks.runner.timing import synchronize
from unit_fast.config import DataConfig, ModelConfig, RunConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.data.layout import Layout
from unit_fast.data.loader import Loader, sort_keys
from unit_fast.data.readers.vqa2 import read_answers
from unit_fast.data.sampler import requests

TASKS = {"detection_train": "coco", "vqa": "vqa2"}
"""Case -> data set."""
FOREVER = 10**9
"""Steps of a loader that is measured for as long as it takes."""
QUICK = {
    "short_side": 200, "max_side": 333, "train_short_sides": (120, 160, 200), "crop_short_sides": (100, 125, 150),
    "crop_min": 96, "crop_max": 150,
}  # fmt: skip
"""Image sizes of quick mode: a quarter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a provider is opened with."""

    provider: str
    """A name of ``OURS`` or ``peers.PEERS``."""
    case: str
    """A name of ``TASKS``."""
    root: str
    cache_dir: str
    workers: int
    """Processes, or threads of DALI."""
    prefetch: int = 2
    batch: int = 8
    quick: bool = False
    device: str = "cpu"


OURS = {
    "ours": {"engine": "auto", "dali_graph": "decode"},
    "ours_whole": {"engine": "dali", "dali_graph": "whole"},
    "ours_torchvision": {"engine": "torchvision"},
}
"""Provider -> its settings of ``unit_fast.config.DataConfig``."""


def settings(spec: Spec) -> RunConfig:
    """The configuration of a run that reads what ``spec`` says; the peers take sizes, order and seed from it."""
    engine = OURS.get(spec.provider, {"engine": "torchvision"})
    data = DataConfig(
        root=spec.root, cache_dir=spec.cache_dir, workers=spec.workers, prefetch=spec.prefetch, **engine,
        **(QUICK if spec.quick else {}),
    )  # fmt: skip
    tasks = default_tasks(TASKS[spec.case])
    if spec.case == "vqa":
        answers = read_answers(Layout(data).find("vqa2.answers"), None)
        tasks = {name: dataclasses.replace(task, outputs=len(answers)) for name, task in tasks.items()}
    return RunConfig(
        data=data, model=ModelConfig(tasks=tasks), batch_per_process=spec.batch, ratios=dict.fromkeys(tasks, 1.0)
    )


def open_data(config: RunConfig) -> dict:
    """The data set of the case, by its key."""
    return {
        name: open_dataset(name, "train", config.data, task, augment=True) for name, task in config.model.tasks.items()
    }


def order_of(config: RunConfig, datasets: dict) -> Iterator[list[tuple[int, int]]]:
    """(index, key) of each sample of each batch, without end: what our loader reads."""
    sizes = {name: len(dataset) for name, dataset in datasets.items()}
    for request in requests(config, sizes, 0, {}, FOREVER, shapes=sort_keys(datasets, config)):
        yield [(visit.index, visit.key) for visit in request.micro[0]]


class Opened:
    """A provider at work: an iterator over batches as dicts of tensors, on the device."""

    def __init__(self, spec: Spec):
        self.spec, self.device = spec, torch.device(spec.device)
        self.config = settings(spec)
        self.datasets = open_data(self.config)
        (self.dataset,) = self.datasets.values()
        self.loader = None
        begun = time.monotonic()
        if spec.provider in OURS:
            self.loader = Loader(self.datasets, self.config, 0, FOREVER, {}, device=self.device)
            self.batches = (step.batches[0].tensors() for step in self.loader)
        else:
            workers = {"num_workers": spec.workers}
            if spec.workers:
                workers["prefetch_factor"] = spec.prefetch
            loader = torch.utils.data.DataLoader(
                PeerData(self.dataset, spec.provider),
                batch_sampler=_Endless(order_of(self.config, self.datasets)),
                collate_fn=pad_collate,
                pin_memory=self.device.type == "cuda",
                **workers,
            )
            self.iterator = iter(loader)
            self.batches = (
                {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
                for batch in self.iterator
            )
        self.seconds = time.monotonic() - begun
        """What making the loader took."""

    def take(self, count: int) -> int:
        """Read ``count`` batches and drop them; the number of images."""
        images = 0
        for _ in range(count):
            images += len(next(self.batches)["image"])
        synchronize(self.device)
        return images

    @property
    def checked(self) -> int | None:
        """Images that our loader decoded only to see whether they are sound."""
        found = getattr(getattr(self.loader, "reader", None), "checked", None)
        return None if found is None else found.decoded

    def describe(self) -> str:
        if self.loader is not None:
            return self.loader.describe()
        return f"{self.spec.provider}, DataLoader with {self.spec.workers} workers, prefetch {self.spec.prefetch}"

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        else:
            del self.batches, self.iterator  # ends the workers


class _Endless:
    """Batches of visits as torch's DataLoader wants them."""

    def __init__(self, batches: Iterator):
        self.batches = batches

    def __iter__(self):
        return self.batches
