"""Runs the programs of a launch in another order, which Triton's interpreter otherwise takes by their numbers."""

import random

from unit_fast_kernels.shared.triton import INTERPRETING

ORDERS = ["reversed", 0]


def permute_programs(monkeypatch, order: str | int) -> None:
    """From here on launches run "reversed", or shuffled by a seed; no change where kernels are not interpreted."""
    if not INTERPRETING:
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    original = builder.set_grid_idx
    orders: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}

    def other(x, y, z):
        size = tuple(builder.grid_dim)
        if size not in orders:
            a, b, c = size
            programs = [(i, j, k) for i in range(a) for j in range(b) for k in range(c)]
            orders[size] = (
                programs[::-1] if order == "reversed" else random.Random(order).sample(programs, len(programs))
            )
        _, b, c = size
        original(*orders[size][(x * b + y) * c + z])

    monkeypatch.setattr(builder, "set_grid_idx", other)
