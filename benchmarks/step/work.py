"""What a step has to compute and to move at least, and the time that a card's peaks give for it.

The step is run on fake tensors, so that a machine of any size counts the full-size problem: every product,
convolution and operator of ours that it calls is seen with its shapes. Counted are

- FLOPs, by the dtype of the operands: matrix products and convolutions (torch's formulas), attention (two products
  forward, five backward); the arithmetic of everything else does not show beside them;
- bytes: what these operators read and write, each operand once, as if every pass over memory between them were fused
  into them; for the optimiser a gradient read once, and p, m and v read and written.

``bound_ms`` is the longer of FLOPs over the arithmetic peak (dtypes added up) and bytes over the bandwidth.
"""

import dataclasses
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.runner.machine import peak_of
from benchmarks.step.problems import LR, LR_BACKBONE, MAX_NORM, make_batch, mmf_config
from unit_fast import ops
from unit_fast.model import UniT
from unit_fast.optim.masked_adamw import MaskedAdamW
from unit_fast.run.train import train_step
from unit_fast.weights import convert

_PRODUCTS = {"attention_fwd": 2, "attention_bwd": 5}
"""Operators of ours with matrix products inside -> how many of 2 B H Sq Sk D FLOPs."""
_BYTES_A_PARAMETER = 28
"""float32: gradient read, p, m and v read and written."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one step computes and moves."""

    flops: dict[str, float]
    """dtype -> floating point operations, a multiply-add as two."""
    bytes: float

    def bound_ms(self, gpu: str) -> float | None:
        """Milliseconds at the peaks of a card, by its name; None for a card whose peaks are not known."""
        peak = peak_of(gpu)
        if peak is None:
            return None
        return 1e3 * max(sum(n / peak[dtype] for dtype, n in self.flops.items()), self.bytes / peak["bytes"])


class Counting(TorchDispatchMode):
    """Counts what is called under it."""

    def __init__(self):
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        space, _, name = packet._qualified_op_name.partition("::")
        if packet in flop_registry:
            found = flop_registry[packet](*args, **kwargs, out_val=out)
        elif space == "unit_fast" and name in _PRODUCTS:
            found = _products(name, args)
        else:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        dtype = next(t.dtype for t in tensors if t.is_floating_point())
        self.flops[str(dtype).removeprefix("torch.")] += found
        self.bytes += sum(t.numel() * t.itemsize for t in tensors)
        return out


def _products(name: str, args: tuple) -> int:
    """FLOPs of an operator of ours; q [B,Sq,H,D] and k [B,Sk,H,D] are its first tensors, behind the gradient."""
    q, k = args[1:3] if name.endswith("_bwd") else args[:2]
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    return _PRODUCTS[name] * 2 * batch * heads * queries * keys * width


def count(case: tuple, *, quick: bool = False, bf16: bool = True) -> Work:
    """The work of one update of ours on ``case``, under bfloat16 autocast or in float32. Takes seconds on a CPU."""
    with FakeTensorMode(allow_non_fake_inputs=False), ops.kernels("fused"):
        model = UniT(convert.model_config_from_mmf(mmf_config(quick))).train()
        for module in model.backbone.modules():  # Module.to does not work on fake tensors
            if isinstance(module, nn.Conv2d):
                weight = module.weight.detach().contiguous(memory_format=model.backbone.memory_format)
                module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        optimizer = MaskedAdamW(model.parameter_groups(LR, LR_BACKBONE), unused="skip", max_norm=MAX_NORM)
        used = model.used_parameters(case[0])
        updated = sum(p.numel() for name, p in model.named_parameters() if used[name] and p.requires_grad)
        batch = make_batch(*case[:4])
        with Counting() as counted:
            train_step(model, optimizer, case[0], batch, bf16=bf16)
    return Work(dict(counted.flops), float(counted.bytes + _BYTES_A_PARAMETER * updated))


def count_all(cases: dict[str, tuple], *, quick: bool, bf16: bool, processes: int) -> dict[str, Future]:
    """``count`` of every case in processes of their own, begun at once: name -> what will be its ``Work``."""
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    found = {name: pool.submit(count, case, quick=quick, bf16=bf16) for name, case in cases.items()}
    pool.shutdown(wait=False)
    return found
