"""The losses in two processes over gloo: each normalises its boxes by the mean number of objects of both."""

import json
from pathlib import Path

import pytest
import torch

from tests.model.test_criterion import Head, gradients, make, naive, run
from tests.model.two_ranks import meet, run_both
from unit_fast.config import LossConfig
from unit_fast.detection import criterion

COUNTS = {  # objects of the images of each rank -> the mean number of objects, at least 1
    "uneven": (((3, 5), (1,)), 4.5),
    "one_without": (((0, 0), (7, 2)), 4.5),
    "both_without": (((0,), (0, 0)), 1.0),
    "less_than_one": (((0,), (1,)), 1.0),
    "more_than_queries": (((9, 2), (4, 4)), 9.5),
}


def compare(counts: tuple, mean: float) -> dict[str, float]:
    """This rank's worst relative error of a term, and of a gradient, against the loops with the number replaced."""
    given, loss, head = make(counts, seed=sum(counts)), LossConfig(ce_normalisation="per_process"), Head()
    assert criterion.num_boxes(given.batch.counts, torch.float64).item() == mean
    terms, query = run(given, loss, head)
    expected = naive(given.logits, given.boxes, given.hidden, query, given.batch, loss, head)
    leaves = [given.logits, given.boxes, given.hidden, *head.parameters()]
    errors = {"term": 0.0, "gradient": 0.0}
    for name, value in terms.items():
        # The loops divide by the number of this rank.
        factor = max(1, sum(counts)) / mean if "bbox" in name or "giou" in name else 1.0
        wanted = factor * torch.as_tensor(expected[name], dtype=torch.float64)
        errors["term"] = max(errors["term"], float((value - wanted).abs() / wanted.abs().clamp(min=1e-12)))
        for ours, theirs in zip(gradients(value, leaves), gradients(wanted, leaves), strict=True):
            errors["gradient"] = max(errors["gradient"], float((ours - theirs).abs().max()))
    return errors


def worker(rank: int, folder: str) -> None:
    """What each process runs: every case, the errors into ``<rank>.json``."""
    meet(rank, folder)
    found = {name: compare(of_ranks[rank], mean) for name, (of_ranks, mean) in COUNTS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Case -> errors, a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_both(__name__, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", COUNTS)
def test_losses_are_the_authors_with_the_mean_number_of_boxes(errors, name, rank):
    assert errors[rank][name]["term"] < 1e-11
    assert errors[rank][name]["gradient"] < 1e-11
