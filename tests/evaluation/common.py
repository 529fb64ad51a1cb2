"""A model that knows the answers, and a small one for the data sets of ``whole_root``."""

import dataclasses

import torch

from tests.data_roots import VOCABULARY
from tests.models import small_config
from unit_fast.batch import Output
from unit_fast.config import DataConfig, RunConfig
from unit_fast.tasks import get_task


def whole_config(root, *tasks, data: dict | None = None, **changes) -> RunConfig:
    """Evaluations of a small model whose outputs fit the root."""
    config = small_config(*tasks)
    kinds = {n: dataclasses.replace(t, outputs=4 if n == "vqa2" else t.outputs) for n, t in config.tasks.items()}
    text = dataclasses.replace(config.text, vocab_size=len(VOCABULARY))
    model = dataclasses.replace(config, tasks=kinds, text=text)
    data = {"short_side": 64, "max_side": 96} | (data or {})
    return RunConfig(model=model, data=DataConfig(root=str(root), **data), **changes)


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
