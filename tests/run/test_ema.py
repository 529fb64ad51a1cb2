"""The average of a run's weights: its formula, its bits, and the pieces it is taken in."""

import pytest
import torch

from unit_fast.run.ema import Ema, lerp_in_few_launches, pieces_of


def test_the_average_is_what_it_says(root):
    model = torch.nn.Linear(3, 2)
    ema = Ema(model, 0.75)
    expected = model.weight.detach().clone()
    for refused in (0, 0, 1, 0):
        with torch.no_grad():
            model.weight += 1.0
        before = ema.model.weight.clone()
        ema.update(torch.tensor(refused, dtype=torch.int32))
        if refused:
            assert torch.equal(ema.model.weight, before)
        else:
            expected = 0.75 * expected + 0.25 * model.weight.detach()
    assert torch.allclose(ema.model.weight, expected)


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.9, 0.9999])
def test_the_average_has_the_bits_of_a_weight_known_to_the_host(decay):
    model = torch.nn.Linear(37, 29)
    ema = Ema(model, decay)
    with torch.no_grad():
        model.weight.normal_()
        expected = torch.lerp(ema.model.weight, model.weight, 1 - decay)
    ema.update(torch.zeros((), dtype=torch.int32))
    assert torch.equal(ema.model.weight, expected)


@pytest.mark.parametrize("decay", [0.51, 0.9, 0.9999])
def test_the_average_in_few_launches_is_the_same_to_a_rounding(decay):
    """torch's lerp multiplies and adds with one rounding, these with two."""
    torch.manual_seed(0)
    averages, weights = ([torch.randn(n) for n in (1, 7, 1025)] for _ in range(2))
    expected = [torch.lerp(a, w, 1 - decay) for a, w in zip(averages, weights)]
    before = [a.clone() for a in averages]
    lerp_in_few_launches(averages, weights, torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(averages, before))
    lerp_in_few_launches(averages, weights, torch.tensor(1 - decay))
    for average, weight, old, exact in zip(averages, weights, before, expected):
        assert ((average - exact).abs() <= 2**-23 * (old.abs() + weight.abs())).all()


def test_an_average_is_taken_inpieces_of():
    pairs = [(torch.zeros(n), torch.ones(n)) for n in (3, 4, 9, 1, 1)]
    found = pieces_of(pairs, 7)
    assert [[len(a) for a in averages] for averages, _ in found] == [[3, 4], [9], [1, 1]]
    assert [pair for piece in found for pair in zip(*piece)] == pairs
    assert len(pieces_of(pairs, float("inf"))) == 1
