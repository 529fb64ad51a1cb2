"""What ``bench_data`` measures: our loader's engines, and two loaders as people write them with torchvision and Pillow.

All read the same batches in the same order. Annotations, sizes, crops, flips and boxes come from our data sets and
``Geometry`` in all of them (so the peers have our cached annotations and cheap boxes for free), and the peers are given
our order too, which groups images of a size; how pixels are made and batches put together is their own.

Run as a program (``bench_data`` does) this is one provider in a process of its own, told what to do line by line.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks._processes import cpu_seconds
from unit_fast.config import DataConfig, ModelConfig, RunConfig, default_tasks
from unit_fast.data import open_dataset
from unit_fast.data.images.transforms import MEAN, STD
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
    """A name of ``OURS`` or ``PEERS``."""
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


# --------------------------------------------------------------------------------------------------------- the peers


def torchvision_v2(path: str):
    """torchvision's decoder and transforms v2 on uint8 tensors, laid out so that each kernel takes its fast path."""
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms.v2 import functional as F

    image = decode_image(read_file(path), mode=ImageReadMode.RGB)

    def change(g) -> Tensor:
        x = image
        if g.flip:
            x = F.horizontal_flip(x)
        if g.first is not None:
            x = F.resize(x, list(g.first), antialias=True)
        if g.crop is not None:
            x = F.crop(x, *g.crop)
        x = F.resize(x, list(g.size), antialias=True)
        # the resize is fast on channels last, what follows on the usual layout
        return F.normalize(F.to_dtype(x.contiguous(), torch.float32, scale=True), MEAN, STD, inplace=True)

    return (image.shape[1], image.shape[2]), change


def pil_detr(path: str):
    """Pillow and torchvision's functional transforms, as DETR's ``datasets/transforms.py`` has them."""
    from PIL import Image
    from torchvision.transforms import functional as F

    image = Image.open(path).convert("RGB")

    def change(g) -> Tensor:
        x = image
        if g.flip:
            x = F.hflip(x)
        if g.first is not None:
            x = F.resize(x, list(g.first))
        if g.crop is not None:
            x = F.crop(x, *g.crop)
        return F.normalize(F.to_tensor(F.resize(x, list(g.size))), MEAN, STD)

    return (image.height, image.width), change


PEERS = {"torchvision_v2": torchvision_v2, "pil_detr": pil_detr}
"""Provider -> path to ((height, width), function of the geometry to [3,h,w] float32)."""


class PeerData(torch.utils.data.Dataset):
    """Samples by (index, key), pixels made by a peer."""

    def __init__(self, dataset, peer: str):
        self.dataset, self.peer = dataset, peer

    def __getitem__(self, visit: tuple[int, int]) -> dict:
        index, key = visit
        path = self.dataset.image_path(index)
        size, change = PEERS[self.peer](str(path))
        return self.dataset.sample(index, key, path, size, lambda geometry: {"image": change(geometry)})


def pad_collate(samples: list[dict]) -> dict:
    """Images padded at the bottom and right with their mask, as DETR does it; texts and targets padded."""
    images = [sample["image"] for sample in samples]
    height, width = (max(x.shape[side] for x in images) for side in (1, 2))
    out = {
        "image": torch.zeros(len(images), 3, height, width),
        "pixel_mask": torch.ones(len(images), height, width, dtype=torch.bool),
        "orig_size": torch.tensor([sample["orig_size"] for sample in samples]),
    }
    for x, image, mask in zip(images, out["image"], out["pixel_mask"]):
        image[:, : x.shape[1], : x.shape[2]].copy_(x)
        mask[: x.shape[1], : x.shape[2]] = False
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("token_type_ids", 0), ("labels", -1), ("boxes", 0)):
        if name in samples[0]:
            out[name] = pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
    if "boxes" in samples[0]:
        out["counts"] = torch.tensor([len(sample["labels"]) for sample in samples], dtype=torch.int32)
    if "answer_scores" in samples[0]:
        out["answer_scores"] = torch.stack([sample["answer_scores"] for sample in samples])
    return out


# ----------------------------------------------------------------------------------------------------------- opened


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
        if self.device.type == "cuda":
            torch.cuda.synchronize()
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


# ------------------------------------------------------------------------------------------------------ the process


class Server:
    """Does what ``bench_data`` asks for; each method's result is the answer, a dict for JSON."""

    opened: Opened | None = None

    def open(self, **spec) -> dict:
        """Open a provider (``Spec``), after closing the one before."""
        self.close()
        self.opened = Opened(Spec(**spec))
        return {"who": self.opened.describe()}

    def run(self, settle: int, count: int) -> dict:
        """Read ``settle`` batches, then ``count`` that are timed. CPU seconds are those of the whole process tree."""
        opened = self.opened
        opened.take(settle)
        checked, cpu, begun = opened.checked, cpu_seconds(os.getpid()), time.perf_counter()
        images = opened.take(count)
        seconds = time.perf_counter() - begun
        cpu = cpu_seconds(os.getpid()) - cpu
        found = opened.checked
        return {
            "seconds": seconds, "images": images, "cpu_seconds": cpu, "checked": found and found - checked,
        }  # fmt: skip

    def first(self, count: int, **spec) -> dict:
        """Open a provider and read ``count`` batches at once: nothing is left out of the time but the annotations."""
        self.open(**spec)
        begun = time.monotonic() - self.opened.seconds
        images = self.opened.take(count)
        return {"seconds": time.monotonic() - begun, "images": images, "checked": self.opened.checked}

    def save(self, count: int, path: str) -> dict:
        """The next ``count`` batches to a file."""
        batches = [{name: x.cpu().clone() for name, x in next(self.opened.batches).items()} for _ in range(count)]
        torch.save(batches, path)
        return {"batches": count}

    def train(self, settle: int, count: int) -> dict:
        """Real updates on the batches: how long the loop waits for them, the device being idle by then."""
        from benchmarks.data.step import Updates

        opened = self.opened
        update = Updates(opened.dataset.task.name, opened.device, opened.spec.quick)
        for _ in range(settle):
            update(next(opened.batches))
        waited, images, begun = 0.0, 0, time.perf_counter()
        for _ in range(count):
            update.finish()
            asked = time.perf_counter()
            batch = next(opened.batches)
            waited += time.perf_counter() - asked
            images += len(batch["image"])
            update(batch)
        update.finish()
        return {"seconds": time.perf_counter() - begun, "waited": waited, "images": images}

    def close(self) -> dict:
        """End the provider's workers; what it found out about images is written."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None
        return {}


def main() -> None:
    """Answer requests (a JSON object a line: ``do``, and arguments) on the standard streams until they end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    cores = int(sys.argv[1])
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:cores])
    torch.set_num_threads(min(cores, len(allowed)))
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(server, request.pop("do"))(**request)) + "\n")
        answers.flush()
    server.close()


if __name__ == "__main__":
    main()


__all__ = ["OURS", "PEERS", "TASKS", "Opened", "Server", "Spec", "open_data", "order_of", "settings"]
