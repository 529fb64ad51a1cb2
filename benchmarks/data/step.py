"""Real updates on the batches of a loader, for the share of time that training waits for its data."""

import torch
from torch import Tensor

from benchmarks.step.problems import LR, LR_BACKBONE, MAX_NORM, mmf_config
from unit_fast.batch import Batch
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.setup import used_masks
from unit_fast.run.train import train_step
from unit_fast.weights import convert


class Updates:
    """Updates of the published model (quick: of a small one) on one task, eager, bfloat16 autocast on CUDA."""

    def __init__(self, task: str, device: torch.device, quick: bool):
        torch.manual_seed(0)
        self.task, self.device = task, device
        self.model = UniT(convert.model_config_from_mmf(mmf_config(quick))).train()
        self.model.to(device, memory_format=self.model.backbone.memory_format)
        groups = self.model.parameter_groups(LR, LR_BACKBONE)
        self.optimizer = MaskedAdamW(groups, unused="skip", max_norm=MAX_NORM, clip_gradients_in_place=False)
        self.used = used_masks(self.model, self.optimizer, [task])[task]

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """One update; on CUDA only begun when this returns."""
        bf16 = self.device.type == "cuda"
        train_step(
            self.model, self.optimizer, self.task, Batch(task=self.task, **batch), used=self.used, bf16=bf16
        )  # fmt: skip

    def finish(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
