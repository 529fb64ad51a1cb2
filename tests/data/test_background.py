"""Reading ahead in a thread."""

import time

import pytest

from unit_fast.data.background import Background


def test_the_background_keeps_order_and_hands_errors_over():
    def items():
        yield from range(20)
        raise ValueError("after twenty")

    background = Background(items(), 3)
    assert [next(background) for _ in range(20)] == list(range(20))
    for _ in range(2):
        with pytest.raises(ValueError, match="after twenty"):
            next(background)
    background.close()
    assert list(Background(iter([1, 2]), 1)) == [1, 2]


def test_the_background_does_not_run_far_ahead_and_closes_its_iterator():
    taken, closed = [], []

    def items():
        try:
            for n in range(1000):
                taken.append(n)
                yield n
        finally:
            closed.append(True)

    background = Background(items(), 2)
    assert next(background) == 0
    time.sleep(0.3)
    assert len(taken) <= 5
    background.close()
    assert closed == [True]
