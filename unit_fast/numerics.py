"""How a device computes: the precision of products and convolutions, and whether two runs give the same bits.

On a CPU two runs give the same bits at the same number of threads. On a CUDA device everything in a step does too, save
for one thing: the gradients of convolution weights, for which cuDNN takes faster algorithms that add up in an order of
their own (``tests/run/test_numerics.py`` lists the operators of a step that may, and why the others do not count here).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from unit_fast.batch import Output
from unit_fast.errors import UserError


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs under bfloat16 autocast with ``RunConfig.precision``."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def repeatable(deterministic: str, device: torch.device) -> bool:
    """Whether two runs on ``device`` give the same bits with ``RunConfig.deterministic``."""
    return device.type != "cuda" or deterministic == "on"


def promise(deterministic: str, device: torch.device) -> str:
    """What a resumed run equals, in a few words."""
    if device.type != "cuda":
        return "a resumed run is the uninterrupted one bit for bit, at one number of threads"
    if repeatable(deterministic, device):
        return "deterministic: a resumed run is the uninterrupted one bit for bit, on the same kind of card"
    return (
        "not deterministic: a resumed run sees the same data, dropout and rates, and differs in the last bits as any "
        "two runs do (gradients of convolutions; --deterministic on)"
    )


def check(precision: str, device: torch.device) -> None:
    """``UserError`` on a precision that ``device`` does not have."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32: the run is on {device}, TF32 is CUDA's; take fp32, or --device cuda")


def full_precision(x: Tensor) -> Tensor:
    """At least single precision."""
    return x if x.dtype == torch.float64 else x.float()


def in_full_precision(output: Output) -> Output:
    """``output`` with tensors of at least single precision, as losses want them after autocast."""
    return Output(**{k: full_precision(v) for k, v in vars(output).items() if isinstance(v, Tensor)})


@contextlib.contextmanager
def arithmetic(precision: str, deterministic: str, device: torch.device) -> Iterator[None]:
    """Within the block ``device`` computes as ``RunConfig.precision`` and ``deterministic`` say.

    ``fp32`` is single precision in every product and convolution; ``tf32`` rounds their inputs to TF32. (Our own
    kernels take full single precision in both.) What was set before is set again afterwards.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        if deterministic != "auto":
            cudnn.deterministic = deterministic == "on"
        if deterministic == "on":
            cudnn.benchmark = False  # which algorithm is fastest differs from run to run
        if precision in ("fp32", "tf32"):
            cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
