"""The breaks of ``tests.mutations``: each operator has them, each can be made, and (long) each is noticed."""

import pytest

from tests import mutations
from unit_fast import ops


def test_every_part_of_every_operator_is_broken_once():
    parts = {op: {m.part for m in mutations.MUTATIONS if m.op == op} for op in ops.OPERATORS}
    without_backward = {"dropout", "match_cost", "assignment", "adamw"}  # dropout's backward is its forward
    shared = {"cross_attention": {"reference"}}  # it is attention's
    for op, found in parts.items():
        wanted = {"reference", "kernel"} - shared.get(op, set())
        assert wanted | (set() if op in without_backward else {"backward kernel"}) <= found, op


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.op}-{m.part}")
def test_can_be_made(mutation):
    assert mutation.old != mutation.new
    mutations.place_of(mutation, mutations.ROOT / "kernels")


@pytest.mark.long
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.op}-{m.part}")
def test_is_noticed(mutation):
    assert mutations.run(mutation).outcome == "caught"
