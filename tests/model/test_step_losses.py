"""Two processes over gloo train with DistributedDataParallel, task after task, without find_unused_parameters."""

import copy

import pytest
import torch

from tests.model.two_ranks import meet, run_both
from tests.models import random_batch, small_config
from unit_fast import MaskedAdamW, StepLosses, UniT

TASKS = ("coco", "sst2", "vg", "coco")


def worker(rank: int, folder: str) -> None:
    """Four steps; each against gradients that are averaged by hand."""
    meet(rank, folder)
    torch.manual_seed(rank)  # DDP makes the weights equal
    model = UniT(small_config("coco", "vg", "sst2", dropout=0.0))
    wrapped = torch.nn.parallel.DistributedDataParallel(StepLosses(model))
    optimizer = MaskedAdamW(model.parameters(), lr=1e-3, max_norm=0.1)
    for number, task in enumerate(TASKS):
        batch = random_batch(task, model.config, seed=10 * number + rank)
        alone = copy.deepcopy(model)
        alone.zero_grad()
        sum(alone.losses(alone(batch), batch).values()).backward()
        optimizer.zero_grad()
        sum(wrapped(batch).values()).backward()
        used = model.used_parameters(batch.task)
        for (name, parameter), by_hand in zip(model.named_parameters(), alone.parameters()):
            if by_hand.grad is None:
                assert not parameter.grad.any(), name
                continue
            torch.distributed.all_reduce(by_hand.grad)
            close = 1e-6 * max(1.0, by_hand.grad.abs().max().item())
            wrong = (parameter.grad - by_hand.grad / 2).abs().max().item()
            assert wrong <= close, f"{task} {name}: {wrong} > {close}"
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert used[name] or torch.equal(p, before[name]), name
        assert not torch.equal(model.decoder.norm.weight, before["decoder.norm.weight"])
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(both, flat)
    assert torch.equal(*both)
    del wrapped  # before its process group
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_take_the_steps_of_averaged_gradients(tmp_path):
    run_both(__name__, tmp_path)
