"""A model that knows the answers, and a small one for the data sets of ``whole_root``."""

import dataclasses

import torch

from tests.data_roots import VOCABULARY, box, coco_file, picture, write
from tests.models import small_config
from unit_fast.batch import Output
from unit_fast.config import DataConfig, RunConfig
from unit_fast.tasks import get_task
from unit_fast.weights import checkpoint


def whole_config(root, *tasks, data: dict | None = None, **changes) -> RunConfig:
    """Evaluations of a small model whose outputs fit the root."""
    config = small_config(*tasks)
    kinds = {n: dataclasses.replace(t, outputs=4 if n == "vqa2" else t.outputs) for n, t in config.tasks.items()}
    text = dataclasses.replace(config.text, vocab_size=len(VOCABULARY))
    model = dataclasses.replace(config, tasks=kinds, text=text)
    data = {"short_side": 64, "max_side": 96} | (data or {})
    return RunConfig(model=model, data=DataConfig(root=str(root), **data), **changes)


def coco_images(root, sizes, objects=lambda number: 0, first: int = 0):
    """COCO's validation split as images of these sizes (width, height), ``objects(number)`` boxes on each."""
    content = {**coco_file(), "images": [], "annotations": []}
    for number, (width, height) in enumerate(sizes):
        name, key = f"{first + number:012d}.jpg", first + number
        picture(root / "coco/images/val2017" / name, width, height, seed=number)
        content["images"].append({"id": key, "file_name": name, "width": width, "height": height})
        content["annotations"] += [
            box(key, 10 * number + k, 1 + k, [k * 10, 5, 12 + k, 15], area=180.0) for k in range(objects(number))
        ]
    write(root / "coco/annotations/instances_val2017.json", content)
    return root


def save_run(folder, weights, config, step: int = 1):
    """A run folder whose last checkpoint has these weights."""
    name = f"step_{step:06d}"
    checkpoint.save(folder / "checkpoints", name, weights, config)
    checkpoint.point(folder / "checkpoints", "last", name)
    return folder


class Oracle(torch.nn.Module):
    """Answers with the batch's own truth; what has none gets class 1."""

    def __init__(self, config, fail_on=None):
        super().__init__()
        self.config, self.weight, self.fail_on = config, torch.nn.Parameter(torch.zeros(1)), fail_on
        self.seen = []

    def forward(self, batch):
        if batch.task == self.fail_on:
            raise RuntimeError("out of ideas")
        self.seen.append(len(batch))
        task, settings = get_task(batch.task), self.config.tasks[batch.task]
        hidden = torch.zeros(1, len(batch), settings.queries, 4)
        if task.is_detection:
            logits = torch.zeros(1, len(batch), settings.queries, settings.outputs)
            logits[..., -1] = 5.0
            boxes = torch.full((1, len(batch), settings.queries, 4), 0.9)
            for row, count in enumerate(batch.counts.tolist()):
                logits[0, row, torch.arange(count), batch.labels[row, :count]] = 20.0
                boxes[0, row, :count] = batch.boxes[row, :count]
            return Output(hidden_states=hidden, logits=logits, boxes=boxes)
        if task.loss == "bce":
            return Output(hidden_states=hidden, scores=batch.answer_scores * 5)
        scores = torch.zeros(len(batch), settings.outputs)
        scores[torch.arange(len(batch)), torch.ones(len(batch)).long() if batch.label is None else batch.label] = 3.0
        return Output(hidden_states=hidden, scores=scores)

    def match(self, output, batch):
        return torch.zeros(1, len(batch), batch.labels.shape[1], dtype=torch.int64)

    def losses(self, output, batch, matching=None, split="train"):
        return {
            f"{split}/{batch.task}/loss_ce": torch.tensor(2.0),
            f"{split}/{batch.task}/loss_bbox": torch.tensor(1.0),
        }
