"""What the kernels of ``adamw`` know of an optimiser's tensors, on the device."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from unit_fast_kernels.adamw.kernels import CHUNK, GRADIENT_ROW
from unit_fast_kernels.adamw.step import upload
from unit_fast_kernels.shared import capture
from unit_fast_kernels.shared.triton import cdiv


def addresses_of(rows: Sequence[Sequence[Tensor | None]]) -> list[list[int]]:
    """[rows][n] addresses, 0 where there is no tensor; of an empty one, which nothing looks at, any other number.

    The one place that asks for an address, outside the operator, which must not depend on where its arguments are. Fake
    tensors have none: zeros, and nothing is ever launched with them."""
    if any(isinstance(t, FakeTensor) for t in rows[0]):
        return [[0] * len(row) for row in rows]
    return [[0 if t is None else t.data_ptr() or 16 for t in row] for row in rows]


class Tables:
    """What the kernels know of an optimiser's tensors: sizes, chunks, groups; learning rates and other numbers; where
    the tensors are. What may change is compared with the last call on the host, and copied when it differs.

    Within the capture of a CUDA graph nothing is copied from the host: what an eager call or ``prepare`` left must do,
    and is kept for the graph. Only the gradients are elsewhere, in the graph's own memory. Where, is written by the
    graph itself in front of each update, from numbers that its launches carry: such a table is right in every replay
    and there is nothing to be done after the capture. Eager steps in the graphs' memory do the same, so that no table
    of theirs lies there when a replay comes.
    """

    def __init__(self, sizes: Sequence[int], groups: Sequence[int], device: torch.device):
        self.device = torch.device(device)
        counts = [cdiv(size, CHUNK) for size in sizes]
        firsts = [0, *itertools.accumulate(counts)]
        self.layout = upload([list(sizes), firsts[:-1], list(groups)], torch.int64, device)
        chunks = [[i for i, c in enumerate(counts) for _ in range(c)], [j for c in counts for j in range(c)]]
        self.chunks = upload(chunks, torch.int32, device)
        self._hosts: dict[str, object] = {}
        self._tensors: dict[str, Tensor] = {}
        self._held: list[Tensor] = []  # what graphs read, also when it has been replaced here

    def _real(self, question) -> bool:
        return not isinstance(self.layout, FakeTensor) and question(self.device)

    def kept(self, name: str, values, dtype: torch.dtype) -> Tensor:
        """``values`` on the device. ``RuntimeError`` within a capture if they are not there yet."""
        if self._hosts.get(name) != values:
            if not isinstance(self.layout, FakeTensor):
                capture.refuse(self.device, f"AdamW's {name} would be copied to the device")
            self._hosts[name], self._tensors[name] = values, upload(values, dtype, self.device)
        if self._real(capture.capturing):
            self._held.append(self._tensors[name])
        return self._tensors[name]

    def addresses(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """The table [ROWS,n] of where the tensors are."""
        values = addresses_of(rows)
        homes = self._homes(values)
        if not self._real(capture.in_graph_memory):
            return self.kept("addresses", values, torch.int64)
        table = homes.clone()
        present = [i for i, address in enumerate(values[GRADIENT_ROW]) if address]
        if present:
            places = table[GRADIENT_ROW].unbind()
            # Adds to zero: the scalars of a foreach launch travel with it, so that a graph holds them.
            torch._foreach_add_([places[i] for i in present], [values[GRADIENT_ROW][i] for i in present])
        return table

    def _homes(self, values: list[list[int]]) -> Tensor:
        """The table of what stays where it is, without gradients."""
        return self.kept(
            "table of addresses",
            [[0] * len(row) if i == GRADIENT_ROW else row for i, row in enumerate(values)],
            torch.int64,
        )
