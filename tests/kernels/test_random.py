"""The random decisions behind dropout: shares, independence, replay, the same stream however it is cut."""

import pytest
import torch
from unit_fast_kernels.shared.random import RandomBits, SavedBits, cut, draw, keep_mask, keep_scale, threshold

from tests.kernels.common import SEED, within_sigmas

MANY = 5 << 18  # decisions that pass the generator's lanes several times


def test_stream_does_not_depend_on_how_it_is_cut():
    whole = draw(SEED, MANY)
    bits, saved = RandomBits(SEED, MANY), SavedBits(whole)
    for size in (1, 3, 262143, 1, 262145, 500001):
        a, b = bits.fill(torch.empty(size)), saved.fill(torch.empty(size))
        assert torch.equal(a, b)
        start = saved._used - size
        assert torch.equal(a, whole[start : start + size].float())


def test_stream_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(SEED, MANY)
        torch.set_num_threads(2)
        assert torch.equal(one, draw(SEED, MANY))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_share_is_p_and_the_cut_agrees_with_the_mask(p):
    kept = keep_mask((MANY,), p, SEED)
    assert within_sigmas(int(kept.sum()), MANY, 1 - p)
    assert torch.equal(kept, RandomBits(SEED, MANY).fill(torch.empty(MANY)) > cut(p))
    assert abs(threshold(p) / 65536 - p) <= 2**-17
    assert keep_scale(p) == pytest.approx(1 / (1 - threshold(p) / 65536), rel=1e-15)


def test_numbers_are_uniform():
    counts = torch.bincount(draw(SEED, 1 << 22).int() + 32768, minlength=65536).double()
    expected = (1 << 22) / 65536
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 65535) < 4 * (2 * 65535) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 4 << 14, (4 << 14) + 1, 4 << 16, (4 << 16) + 2, 8 << 16])
def test_decisions_are_independent(distance):
    """Neighbours, the words a mixing step apart (the lanes are 2^14 or 2^16 words), and three of them at once."""
    dropped = ~keep_mask((1 << 22,), 0.1, SEED)
    p = threshold(0.1) / 65536
    pairs = dropped[distance:] & dropped[:-distance]
    assert within_sigmas(int(pairs.sum()), pairs.numel(), p * p)
    triples = pairs[distance:] & dropped[: -2 * distance]
    assert within_sigmas(int(triples.sum()), triples.numel(), p**3)


def test_seeds_decide():
    first = keep_mask((1 << 20,), 0.1, SEED)
    assert torch.equal(first, keep_mask((1 << 20,), 0.1, SEED.clone()))
    p = threshold(0.1) / 65536
    for step in ([0, 1], [1, 0], [1, -1], [2**40, 0]):
        both = ~first & ~keep_mask((1 << 20,), 0.1, SEED + torch.tensor(step))
        assert within_sigmas(int(both.sum()), both.numel(), p * p)


def test_probability_out_of_range():
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout probability must be in \[0, 1\), not"):
            threshold(p)
