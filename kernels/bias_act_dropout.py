"""Feed-forward epilogue: y = dropout(act(x + bias)), act = ReLU or erf-GELU.

Shapes: x [...,C], bias [C] or None, y as x; N rows. Replaces ``F.dropout(F.relu(x + bias), p)`` and
``F.dropout(F.gelu(x + bias), p)``. After ReLU the result itself says where the gradient flows (y > 0), so y alone is
saved, which the next product saves anyway; eager saves y twice and a mask. After GELU x is saved and the mask, never
stored, is drawn again.

Fused, one kernel each way and a small sum for the bias. Bytes an element of size s: forward 2 s (eager 6 s + 1, and 2 s
more with a bias), backward 3 s (eager 6 s + 1, and s more for the bias). FLOPs: 3 an element for ReLU, 22 forward and
26 backward for GELU; memory-bound. Limits of the fused path: float32, bfloat16, float16; fewer than 2^31 rows,
C <= 2^20.

``bias_act_dropout_cpu`` is the same on a CPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.dropout import drop, dropout_cpu, dropout_reference
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.philox import keep_elements, keep_rows, limit
from unit_fast_kernels.shared.random import keep_scale
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.sums import sum_partials
from unit_fast_kernels.shared.triton import cdiv, jit, power_of_two, tl, vector
from unit_fast_kernels.shared.tuned import candidates_of, launch_parameters, multiprocessors
from unit_fast_kernels.shared.validation import (
    check_dropout,
    check_floating,
    check_known,
    check_one_device,
    check_shape,
    unfit_dtype,
)

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
MAX_WIDTH = 2**20


def bias_act_dropout_reference(x, bias, act, dropout_p=0.0, seed=None, keep=None) -> Tensor:
    """The specification. x [...,C], bias [C] or None, act "relu" or "gelu"."""
    if bias is not None:
        x = x + bias
    return dropout_reference(ACTIVATIONS[act](x), dropout_p, seed, keep)


class _ReluDropoutCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        y = drop(x, dropout_p, seed, relu=True)
        ctx.save_for_backward(y)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        # ReLU then dropout: both stop the gradient exactly where the result is zero.
        return torch.ops.aten.threshold_backward(grad, y, 0.0).mul_(keep_scale(ctx.dropout_p)), None, None


def bias_act_dropout_cpu(x, bias, act, dropout_p=0.0, seed=None) -> Tensor:
    """The same result as ``bias_act_dropout_reference``, decisions included."""
    if bias is not None:
        x = x + bias
    if act == "relu" and dropout_p > 0.0:
        return _ReluDropoutCpu.apply(x, dropout_p, seed)
    return dropout_cpu(ACTIVATIONS[act](x), dropout_p, seed)


# --- Kernels --------------------------------------------------------------------------------------------------------


@jit
def _normal(z, ERF: tl.constexpr):
    """(distribution, density) of the standard normal at z, float32.

    ERF: by tl.erf; else by formula 7.1.26 of Abramowitz and Stegun, whose error in erf, 1.5e-7, is far below what
    bfloat16 and float16 keep. Its exponential is the density's: a third of the instructions of tl.erf.
    """
    weight = tl.exp2(z * z * -0.7213475204444817)  # exp(-z^2 / 2)
    if ERF:
        distribution = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    else:
        t = tl.rsqrt(1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
        t *= t  # a reciprocal without the scaling that a division does
        series = 1.061405429 * t - 1.453152027
        series = ((series * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
        tail = 0.5 * series * t * weight
        distribution = tl.where(z < 0.0, tail, 1.0 - tail)
    return distribution, weight * 0.3989422804014327


@jit
def _bias_act_dropout_fwd_kernel(
    x_ptr,  # [N,C]
    bias_ptr,  # [C], or None
    seed_ptr,  # int64 [2], or None
    y_ptr,  # [N,C]
    rows,  # N
    scale,
    limit,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ERF: tl.constexpr,
):
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    number = tl.program_id(0) * R + tl.arange(0, R)
    row = number.to(tl.int64)
    inside = (number < rows)[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    value = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += vector(bias_ptr, column, R, C, BLOCK)
    if GELU:
        distribution, _ = _normal(value, ERF)
        value *= distribution
    else:
        value = tl.where(value <= 0.0, 0.0, value)  # a NaN stays
    if seed_ptr is not None:
        value = tl.where(keep_rows(row, start, C, BLOCK, limit, seed_ptr), value * scale, 0.0)
    tl.store(y_ptr + offset, value.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _bias_act_dropout_bwd_kernel(
    dy_ptr,  # [N,C]
    saved_ptr,  # [N,C]: y of a ReLU, x of a GELU
    bias_ptr,  # [C], or None
    seed_ptr,  # int64 [2], or None; a ReLU's y holds the decisions
    dx_ptr,  # [N,C]
    partials_ptr,  # [1,programs,C] float32: sums over the rows of one program, or None without bias
    rows,  # N
    scale,
    limit,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    ERF: tl.constexpr,
):
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([R, BLOCK], tl.float32)
    for block in range(program, tl.cdiv(rows, R), programs):
        number = block * R + tl.arange(0, R)
        row = number.to(tl.int64)
        inside = (number < rows)[:, None] & (column < C)[None, :]
        offset = row[:, None] * C + column[None, :]
        grad = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32) * scale
        saved = tl.load(saved_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            if bias_ptr is not None:
                saved += vector(bias_ptr, column, R, C, BLOCK)
            distribution, density = _normal(saved, ERF)
            grad *= distribution + saved * density
            if seed_ptr is not None:
                grad = tl.where(keep_rows(row, start, C, BLOCK, limit, seed_ptr), grad, 0.0)
        else:
            grad = tl.where(saved <= 0.0, 0.0, grad)
        tl.store(dx_ptr + offset, grad.to(dx_ptr.dtype.element_ty), mask=inside)
        if partials_ptr is not None:
            total += grad
    if partials_ptr is not None:
        place = partials_ptr + program.to(tl.int64) * C + column
        tl.store(place, tl.sum(total, 0), mask=column < C)


# --- Launchers, their references and fakes --------------------------------------------------------------------------


def fwd_defaults(width: int) -> dict[str, int]:
    """Columns and rows of a program, warps: 16 elements to a thread, 8 neighbours at a time."""
    block = min(256, power_of_two(width))
    return {"columns": block, "rows": 2048 // block, "warps": 4}


def bwd_defaults(width: int) -> dict[str, int]:
    """The same, and with a bias how many programs share a multiprocessor."""
    return fwd_defaults(width) | {"programs": 6}


def _launch_parameters(op: str, x: Tensor, default: dict[str, int]) -> dict[str, int]:
    return launch_parameters(op, f"width{power_of_two(x.shape[-1])}", default, x.device)


def _output(x: Tensor, bias: Tensor | None, *_) -> Tensor:
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _fwd_launch(x, bias, seed, act, dropout_p):
    y = _output(x, bias)
    if y.numel() == 0:
        return y
    width = x.shape[-1]
    rows = x.numel() // width
    tune = _launch_parameters("bias_act_dropout_fwd", x, fwd_defaults(width))
    _bias_act_dropout_fwd_kernel[(cdiv(rows, tune["rows"]), cdiv(width, tune["columns"]))](
        x.contiguous(),
        None if bias is None else bias.contiguous(),
        seed.contiguous() if dropout_p > 0.0 else None,
        y,
        rows,
        keep_scale(dropout_p),
        limit(dropout_p),
        C=width,
        R=tune["rows"],
        BLOCK=tune["columns"],
        GELU=act == "gelu",
        ERF=y.dtype == torch.float32,
        num_warps=tune["warps"],
    )
    return y


def _kept(shape, dropout_p, seed):
    return keep_elements(shape, dropout_p, seed) * keep_scale(dropout_p) if dropout_p > 0.0 else 1.0


def _fwd_reference(x, bias, seed, act, dropout_p):
    value = ACTIVATIONS[act](x.float() if bias is None else x.float() + bias.float())
    return _output(x, bias).copy_(value * _kept(x.shape, dropout_p, seed))


def _bwd_outputs(dy: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dx, dbias; the second is empty without bias."""
    dx = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    if bias is None:
        return dx, torch.empty(0, dtype=torch.float32, device=dy.device)
    return dx, torch.empty(bias.shape, dtype=bias.dtype, device=dy.device)


def _bwd_launch(dy, saved, bias, seed, act, dropout_p, dtype):
    dx, dbias = outputs = _bwd_outputs(dy, bias, dtype)
    if dx.numel() == 0:
        dbias.zero_()
        return outputs
    width = dy.shape[-1]
    rows = dy.numel() // width
    tune = _launch_parameters("bias_act_dropout_bwd", dy, bwd_defaults(width))
    tiles, programs = cdiv(width, tune["columns"]), cdiv(rows, tune["rows"])
    partials = None
    if bias is not None:
        programs = min(programs, cdiv(tune["programs"] * multiprocessors(dy.device), tiles))
        partials = torch.empty((1, programs, width), dtype=torch.float32, device=dy.device)
    _bias_act_dropout_bwd_kernel[(programs, tiles)](
        dy.contiguous(),
        saved.contiguous(),
        None if bias is None or act == "relu" else bias.contiguous(),
        seed.contiguous() if dropout_p > 0.0 and act == "gelu" else None,
        dx,
        partials,
        rows,
        keep_scale(dropout_p),
        limit(dropout_p),
        C=width,
        R=tune["rows"],
        BLOCK=tune["columns"],
        GELU=act == "gelu",
        ERF=dx.dtype == torch.float32,
        num_warps=tune["warps"],
    )
    if partials is not None:
        sum_partials(partials, dbias)
    return outputs


def _bwd_reference(dy, saved, bias, seed, act, dropout_p, dtype):
    grad, value = dy.float(), saved.float()
    if act == "relu":
        grad = torch.where(value <= 0.0, 0.0, grad * keep_scale(dropout_p))
    else:
        value = value if bias is None else value + bias.float()
        grad = grad * _kept(dy.shape, dropout_p, seed)
        density = torch.exp(value * value * -0.5) * (2 * math.pi) ** -0.5
        grad = grad * (0.5 + 0.5 * torch.erf(value * 0.5**0.5) + value * density)
    dx, dbias = _bwd_outputs(dy, bias, dtype)
    if bias is not None:
        dbias.copy_(grad.reshape(grad.shape[:-1].numel(), bias.numel()).sum(0))
    return dx.copy_(grad), dbias


_forward = register(
    "bias_act_dropout_fwd",
    "(Tensor x, Tensor? bias, Tensor? seed, str act, float dropout_p) -> Tensor",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=_output,
)
_backward = register(
    "bias_act_dropout_bwd",
    "(Tensor dy, Tensor saved, Tensor? bias, Tensor? seed, str act, float dropout_p, ScalarType dtype) "
    "-> (Tensor dx, Tensor dbias)",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=lambda dy, saved, bias, seed, act, dropout_p, dtype: _bwd_outputs(dy, bias, dtype),
)


# --- The fused operator ---------------------------------------------------------------------------------------------


class _BiasActDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, act, dropout_p, seed):
        y = _forward(x, bias, seed, act, dropout_p)
        ctx.save_for_backward(y if act == "relu" else x, bias, seed)
        ctx.act, ctx.dropout_p, ctx.dtype = act, dropout_p, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, bias, seed = ctx.saved_tensors
        dx, dbias = _backward(dy, saved, bias, seed, ctx.act, ctx.dropout_p, ctx.dtype)
        return dx, None if bias is None else dbias, None, None, None


def why_not(x: Tensor, bias: Tensor | None = None, *_) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if reason := unfit_dtype(x=x, bias=bias):
        return reason
    if x.dim() == 0:
        return "x has no dimension: give it one"
    if x.shape[-1] > MAX_WIDTH:
        return f"the width is {x.shape[-1]}: kernels exist for up to {MAX_WIDTH}"
    if x.shape[:-1].numel() >= 2**31:
        return "x has 2^31 rows or more: split it"
    return None


def bias_act_dropout_fused(x, bias, act, dropout_p=0.0, seed=None) -> Tensor:
    """``bias_act_dropout_reference`` in one pass each way, with the decisions of ``keep_elements``.

    x [...,C] and bias [C] of DTYPES; the result has the wider of their dtypes, as the reference's. What does not fit:
    ``why_not``.
    """
    return _BiasActDropout.apply(x, bias, act, dropout_p, seed if dropout_p > 0.0 else None)


def validate(x: Tensor, bias: Tensor | None, act: str, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple:
    """dropout(act(x + bias)); act is ``relu`` or ``gelu`` (erf).

    x [...,C], floating; bias [C] or None; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not
    fit.
    """
    op = "bias_act_dropout"
    check_known(op, "act", act, ACTIVATIONS)
    check_floating(op, x=x)
    if bias is not None:
        check_shape(op, "bias", bias, tuple(x.shape[-1:]), "[C]")
        check_one_device(op, x, bias=bias)
    check_dropout(op, dropout_p, seed)
    return x, bias, act, dropout_p, seed


BIAS_ACT_DROPOUT = Operator(
    name="bias_act_dropout",
    validate=validate,
    reference=bias_act_dropout_reference,
    cpu=bias_act_dropout_cpu,
    fused=bias_act_dropout_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, str, bool, float]] = {
    "unit_encoder_800x1344": (2, 4201, 2048, "relu", False, 0.1),
    "unit_encoder_bias_800x1344": (2, 4201, 2048, "relu", True, 0.1),
    "unit_decoder": (2, 100, 2048, "relu", False, 0.1),
    "detr_r50_800x1344": (2, 1050, 2048, "relu", False, 0.1),
    "bert_base": (32, 128, 3072, "gelu", False, 0.0),
    "bert_base_bias": (32, 128, 3072, "gelu", True, 0.0),
    "gelu_dropout": (32, 128, 3072, "gelu", True, 0.1),
}
"""(B, S, C, act, with bias, dropout_p); the last has no model: it is the longest path through the kernels."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``bias_act_dropout_fused``, all of ``dtype``."""
    batch, length, width, act, with_bias, dropout_p = shape
    return {
        "x": torch.randn(batch, length, width, dtype=dtype, device=device),
        "bias": torch.randn(width, dtype=dtype, device=device) if with_bias else None,
        "act": act,
        "dropout_p": dropout_p,
        "seed": torch.tensor([1234567890123, -42], device=device),
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    a = make(shape, dtype, device)
    x, bias, seed, act, p = a["x"], a["bias"], a["seed"], a["act"], a["dropout_p"]
    backward = (torch.empty_like(x), x, bias, seed, act, p, dtype)
    return [("bias_act_dropout_fwd", (x, bias, seed, act, p)), ("bias_act_dropout_bwd", backward)]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    width, with_bias = shape[2], shape[4]
    bucket = f"width{power_of_two(width)}"
    tiles = [
        {"columns": columns, "rows": rows, "warps": warps}
        for columns in (128, 256, 512, 1024)
        for rows in (1, 2, 4, 8, 16)
        for warps in (2, 4, 8)
        if columns < 2 * width and 8 <= rows * columns // (32 * warps) <= 32
    ]
    fwd = [fwd_defaults(width), *tiles]
    bwd = [bwd_defaults(width), *(t | {"programs": n} for t in tiles for n in ((2, 4, 8) if with_bias else (6,)))]
    return candidates_of(["bias_act_dropout_fwd"], bucket, fwd) + candidates_of(["bias_act_dropout_bwd"], bucket, bwd)


def _elements(shape: tuple) -> int:
    return shape[0] * shape[1] * shape[2]


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: x and bias read, y written."""
    return (2 * _elements(shape) + shape[4] * shape[2]) * dtype.itemsize


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the gradient and y or x (with its bias) read, the gradients of x and bias written."""
    return (3 * _elements(shape) + shape[4] * shape[2] * (2 if shape[3] == "gelu" else 1)) * dtype.itemsize


def flops(shape: tuple) -> int:
    """Forward: 1 for the bias, 1 for ReLU or 20 for GELU, 1 for dropout."""
    return _elements(shape) * (shape[4] + (20 if shape[3] == "gelu" else 1) + (shape[5] > 0))


def flops_bwd(shape: tuple) -> int:
    """Backward: 1 or 24 for the activation, 1 each for dropout and the sum for the bias."""
    return _elements(shape) * (shape[4] + (24 if shape[3] == "gelu" else 1) + (shape[5] > 0))
