"""Post-norm residual: y = LayerNorm(x + dropout(branch)); optionally y + pos as well, for the next layer's query/key.

Shapes: x, branch, y [...,C]; weight, bias [C]; pos broadcasts to x. N = B S rows. Replaces
``F.layer_norm(x + F.dropout(branch, p), (C,), weight, bias, eps)`` and ``y + pos``. Under bf16 autocast x may be
float32 and the branch bfloat16: the sum is float32, and so is y where autocast runs layer_norm in float32 (CUDA).

Fused, one kernel forward, one backward and a small sum: the sum is not written but computed again from x and branch,
the dropout mask is drawn again from the seed, so that float32 mean and rstd, 8 bytes a row, are all that is added to
what is saved. Bytes an element, one dtype of size s: forward 3 s (5 s with pos) against eager's 9 s + 2 (12 s + 2),
backward 5 s (6 s) against 9 s + 1 (12 s + 1). FLOPs: about 10 an element forward, 15 backward; memory-bound.
Limits of the fused path: float32, bfloat16, float16; C <= 4096; fewer than 2^31 rows.

``residual_norm_cpu`` saves the sum, its row statistics and what ``dropout_cpu`` saves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.dropout import FEW, drop, dropout_reference, numbers_to_save
from unit_fast_kernels.residual_norm.kernels import _residual_norm_bwd_kernel, _residual_norm_fwd_kernel
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.philox import keep_elements, limit
from unit_fast_kernels.shared.random import keep_scale
from unit_fast_kernels.shared.registration import register
from unit_fast_kernels.shared.sums import sum_partials
from unit_fast_kernels.shared.triton import cdiv, power_of_two
from unit_fast_kernels.shared.tuned import launch_parameters, multiprocessors
from unit_fast_kernels.shared.validation import (
    check_dropout,
    check_floating,
    check_one_device,
    check_shape,
    refuse,
    unfit_dtype,
)

MAX_WIDTH = 4096


def residual_norm_reference(
    x, branch, weight, bias, eps, dropout_p=0.0, pos=None, seed=None, keep=None
) -> tuple[Tensor, Tensor | None]:
    """The specification: (y, y + pos or None). x, branch [...,C]; weight, bias [C]; pos broadcasts to x."""
    y = F.layer_norm(x + dropout_reference(branch, dropout_p, seed, keep), weight.shape, weight, bias, eps)
    return y, None if pos is None else y + pos


# --- On a CPU -------------------------------------------------------------------------------------------------------


class _AddDroppedCpu(torch.autograd.Function):
    """x + dropout(branch)."""

    @staticmethod
    def forward(ctx, x, branch, dropout_p, seed):
        numbers = numbers_to_save(ctx, branch.numel(), seed)
        ctx.save_for_backward(seed, numbers)
        ctx.dropout_p, ctx.dtypes = dropout_p, (x.dtype, branch.dtype)
        return drop(branch, dropout_p, seed, numbers, base=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_dtype, branch_dtype = ctx.dtypes
        return grad.to(x_dtype), drop(grad, ctx.dropout_p, *ctx.saved_tensors).to(branch_dtype), None, None


def residual_norm_cpu(x, branch, weight, bias, eps, dropout_p=0.0, pos=None, seed=None) -> tuple[Tensor, Tensor | None]:
    """The same result as ``residual_norm_reference``, decisions included."""
    if dropout_p == 0.0 or branch.numel() < FEW:
        total = x + dropout_reference(branch, dropout_p, seed)
    else:
        total = _AddDroppedCpu.apply(x, branch, dropout_p, seed)
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y, None if pos is None else y + pos


# --- Launchers, their references and fakes ---------------------------------------------------------------------------


def fwd_defaults(width: int) -> dict[str, int]:
    """Rows of a program and warps: whole rows to a warp up to 1024 columns, 16 to 32 elements to a thread."""
    block = power_of_two(width)
    if block > 1024:
        return {"rows": 1, "warps": block // 512}
    return {"rows": 1, "warps": 1} if block > 256 else {"rows": 2048 // block, "warps": 4}


def bwd_defaults(width: int) -> dict[str, int]:
    """The same, and how many programs share a multiprocessor."""
    block = power_of_two(width)
    if block > 2048:  # 16 elements to a thread would spill
        return {"rows": 1, "warps": 16, "programs": 1}
    return {"rows": max(1, 2048 // block), "warps": 8, "programs": 3}


def _launch_parameters(op: str, x: Tensor, default: dict[str, int]) -> dict[str, int]:
    return launch_parameters(op, f"width{power_of_two(x.shape[-1])}", default, x.device)


def _positions(pos: Tensor, x: Tensor) -> Tensor:
    """pos as [B,S,C], expanded to x by strides."""
    pos = pos.expand(x.shape)
    return pos.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else pos.reshape(1, -1, x.shape[-1])


def _fwd_outputs(x: Tensor, pos: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if pos is None:
        y_pos = torch.empty(0, dtype=dtype, device=x.device)
    else:
        y_pos = torch.empty(x.shape, dtype=torch.promote_types(dtype, pos.dtype), device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device) for _ in range(2))
    return y, y_pos, mean, rstd


def _fwd_launch(x, branch, weight, bias, pos, seed, eps, dropout_p, dtype):
    y, y_pos, mean, rstd = outputs = _fwd_outputs(x, pos, dtype)
    if y.numel() == 0:
        return outputs
    positions = None if pos is None else _positions(pos, x)
    width, rows = x.shape[-1], mean.numel()
    tune = _launch_parameters("residual_norm_fwd", x, fwd_defaults(width))
    _residual_norm_fwd_kernel[(cdiv(rows, tune["rows"]),)](
        x.contiguous(),
        branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        positions,
        seed.contiguous() if dropout_p > 0.0 else None,
        y,
        None if pos is None else y_pos,
        mean,
        rstd,
        rows,
        1 if pos is None else positions.shape[1],
        *((0, 0, 0) if pos is None else positions.stride()),
        eps,
        keep_scale(dropout_p),
        limit(dropout_p),
        C=width,
        R=tune["rows"],
        BLOCK=power_of_two(width),
        num_warps=tune["warps"],
    )
    return outputs


def _sum(x, branch, dropout_p, seed):
    """(x + dropout(branch), what the branch is multiplied with) in float32, with the decisions of the kernels."""
    kept = keep_elements(branch.shape, dropout_p, seed) * keep_scale(dropout_p) if dropout_p > 0.0 else 1.0
    return x.float() + branch.float() * kept, kept


def _fwd_reference(x, branch, weight, bias, pos, seed, eps, dropout_p, dtype):
    total, _ = _sum(x, branch, dropout_p, seed)
    mean = total.mean(-1, keepdim=True)
    rstd = ((total - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (total - mean) * rstd * weight.float() + bias.float()
    outputs = _fwd_outputs(x, pos, dtype)
    values = (y, y.new_empty(0) if pos is None else y + pos.float(), mean.flatten(), rstd.flatten())
    return tuple(out.copy_(value) for out, value in zip(outputs, values))


def _bwd_outputs(x, branch, weight, dropout_p) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch, dweight, dbias. dbranch is empty where it would equal dx."""
    shared = dropout_p == 0.0 and x.dtype == branch.dtype
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = torch.empty(0 if shared else x.shape, dtype=branch.dtype, device=x.device)
    dweight, dbias = (torch.empty(weight.shape, dtype=weight.dtype, device=x.device) for _ in range(2))
    return dx, dbranch, dweight, dbias


def _bwd_launch(dy, dy_pos, x, branch, weight, mean, rstd, seed, dropout_p):
    dx, dbranch, dweight, dbias = outputs = _bwd_outputs(x, branch, weight, dropout_p)
    if dx.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return outputs
    width, rows = x.shape[-1], mean.numel()
    tune = _launch_parameters("residual_norm_bwd", x, bwd_defaults(width))
    programs = min(cdiv(rows, tune["rows"]), tune["programs"] * multiprocessors(x.device))
    partials = torch.empty((2, programs, width), dtype=torch.float32, device=x.device)
    _residual_norm_bwd_kernel[(programs,)](
        None if dy is None else dy.contiguous(),
        None if dy_pos is None else dy_pos.contiguous(),
        x.contiguous(),
        branch.contiguous(),
        weight.contiguous(),
        mean,
        rstd,
        seed.contiguous() if dropout_p > 0.0 else None,
        dx,
        dbranch if dbranch.numel() else None,
        partials,
        rows,
        keep_scale(dropout_p),
        limit(dropout_p),
        C=width,
        R=tune["rows"],
        BLOCK=power_of_two(width),
        num_warps=tune["warps"],
    )
    sum_partials(partials, dweight, dbias)
    return outputs


def _bwd_reference(dy, dy_pos, x, branch, weight, mean, rstd, seed, dropout_p):
    total, kept = _sum(x, branch, dropout_p, seed)
    mean, rstd = mean.view(*x.shape[:-1], 1), rstd.view(*x.shape[:-1], 1)
    grad = sum(g.float() for g in (dy, dy_pos) if g is not None)
    normalised = (total - mean) * rstd
    rows = tuple(range(x.dim() - 1))
    dweight, dbias = ((grad * n).sum(rows) if rows else grad * n for n in (normalised, 1.0))
    grad = grad * weight.float()
    along, level = (grad * normalised).mean(-1, keepdim=True), grad.mean(-1, keepdim=True)
    dx = (grad - level - normalised * along) * rstd
    outputs = _bwd_outputs(x, branch, weight, dropout_p)
    values = (dx, dx * kept if outputs[1].shape == dx.shape else dx.new_empty(0), dweight, dbias)
    return tuple(out.copy_(value) for out, value in zip(outputs, values))


_forward = register(
    "residual_norm_fwd",
    "(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? pos, Tensor? seed, float eps, float dropout_p, "
    "ScalarType dtype) -> (Tensor y, Tensor y_pos, Tensor mean, Tensor rstd)",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=lambda x, branch, weight, bias, pos, seed, eps, dropout_p, dtype: _fwd_outputs(x, pos, dtype),
)
_backward = register(
    "residual_norm_bwd",
    "(Tensor? dy, Tensor? dy_pos, Tensor x, Tensor branch, Tensor weight, Tensor mean, Tensor rstd, Tensor? seed, "
    "float dropout_p) -> (Tensor dx, Tensor dbranch, Tensor dweight, Tensor dbias)",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=lambda dy, dy_pos, x, branch, weight, mean, rstd, seed, dropout_p: _bwd_outputs(x, branch, weight, dropout_p),
)


# --- The fused operator ---------------------------------------------------------------------------------------------


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, pos, seed, eps, dropout_p, dtype):
        y, y_pos, mean, rstd = _forward(x, branch, weight, bias, pos, seed, eps, dropout_p, dtype)
        ctx.save_for_backward(x, branch, weight, mean, rstd, seed)
        ctx.dropout_p = dropout_p
        ctx.pos_shape, ctx.pos_dtype = (None, None) if pos is None else (pos.shape, pos.dtype)
        ctx.set_materialize_grads(False)
        return y if pos is None else (y, y_pos)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dy_pos=None):
        if dy is None and dy_pos is None:
            return (None,) * 9
        x, branch, weight, mean, rstd, seed = ctx.saved_tensors
        dx, dbranch, dweight, dbias = _backward(dy, dy_pos, x, branch, weight, mean, rstd, seed, ctx.dropout_p)
        if dbranch.shape != x.shape:
            dbranch = dx
        dpos = None
        if dy_pos is not None and ctx.needs_input_grad[4]:
            dpos = dy_pos.sum_to_size(ctx.pos_shape).to(ctx.pos_dtype)
        return dx, dbranch, dweight, dbias, dpos, None, None, None, None


def why_not(x, branch, weight, bias, eps, dropout_p=0.0, pos=None, seed=None) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if reason := unfit_dtype(x=x, branch=branch, weight=weight, bias=bias, pos=pos):
        return reason
    if weight.dtype != bias.dtype:
        return f"weight is {weight.dtype} and bias {bias.dtype}: give them one dtype"
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        return f"the width is {x.shape[-1]}: kernels exist for 1 to {MAX_WIDTH}"
    if x.shape[:-1].numel() >= 2**31:
        return "x has 2^31 rows or more: split it"
    return None


def residual_norm_fused(
    x, branch, weight, bias, eps, dropout_p=0.0, pos=None, seed=None
) -> tuple[Tensor, Tensor | None]:
    """``residual_norm_reference`` in one pass each way, with the decisions of ``keep_elements``.

    x, branch [...,C] of DTYPES, which may differ; weight, bias [C] of one dtype; pos broadcasts to x. The dtypes of
    (y, y + pos) are the reference's, also under autocast. What does not fit: ``why_not``.
    """
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32  # CUDA's autocast runs layer_norm in float32; the CPU's does not
    seed = seed if dropout_p > 0.0 else None
    out = _ResidualNorm.apply(x, branch, weight, bias, pos, seed, eps, dropout_p, dtype)
    return (out, None) if pos is None else out


def validate(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    pos: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple:
    """(y, y + pos) with y = LayerNorm(x + dropout(branch)); the second is None without ``pos``.

    x, branch [...,C], floating, of dtypes that may differ (float32 stream, bfloat16 branch); weight, bias [C]; pos
    broadcasts to x; seed int64[2] where dropout_p > 0. ``ValueError`` on arguments that do not fit.
    """
    op = "residual_norm"
    check_shape(op, "branch", branch, tuple(x.shape), "the shape of x")
    check_shape(op, "weight", weight, tuple(x.shape[-1:]), "[C]")
    check_shape(op, "bias", bias, tuple(x.shape[-1:]), "[C]")
    check_floating(op, x=x, branch=branch, weight=weight, bias=bias)
    if pos is not None and (
        pos.dim() > x.dim() or any(p not in (1, n) for p, n in zip(reversed(pos.shape), reversed(x.shape)))
    ):
        refuse(op, "pos", f"of shape {list(pos.shape)}", f"it must broadcast to x, {list(x.shape)}")
    check_one_device(op, x, branch=branch, weight=weight, bias=bias, pos=pos)
    check_dropout(op, dropout_p, seed)
    return x, branch, weight, bias, eps, dropout_p, pos, seed


RESIDUAL_NORM = Operator(
    name="residual_norm",
    validate=validate,
    reference=residual_norm_reference,
    cpu=residual_norm_cpu,
    fused=residual_norm_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, bool, bool]] = {
    "unit_encoder_800x1344": (2, 4201, 256, False, False),
    "unit_encoder_pos_800x1344": (2, 4201, 256, True, False),
    "unit_encoder_pos_autocast": (2, 4201, 256, True, True),
    "unit_decoder": (2, 100, 768, True, False),
    "unit_decoder_autocast": (2, 100, 768, True, True),
    "detr_r50_800x1344": (2, 1050, 256, True, False),
    "bert_base": (32, 128, 768, False, False),
    "bert_base_autocast": (32, 128, 768, False, True),
}
"""(B, S, C, with pos, x in float32 whatever the branch's dtype)."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``residual_norm_fused`` with dropout 0.1; branch of ``dtype``."""
    batch, length, width, with_pos, wide = shape
    stream = torch.float32 if wide else dtype
    x, branch, pos = (torch.randn(batch, length, width, dtype=d, device=device) for d in (stream, dtype, stream))
    return {
        "x": x,
        "branch": branch,
        "weight": torch.rand(width, device=device) + 0.5,
        "bias": torch.randn(width, device=device),
        "eps": 1e-5,
        "dropout_p": 0.1,
        "pos": pos if with_pos else None,
        "seed": torch.tensor([1234567890123, -42], device=device),
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    a = make(shape, dtype, device)
    out_dtype = torch.promote_types(a["x"].dtype, a["branch"].dtype)
    forward = (a["x"], a["branch"], a["weight"], a["bias"], a["pos"], a["seed"], a["eps"], a["dropout_p"], out_dtype)
    y, y_pos, mean, rstd = _fwd_outputs(a["x"], a["pos"], out_dtype)
    dy_pos = None if a["pos"] is None else y_pos
    backward = (y, dy_pos, a["x"], a["branch"], a["weight"], mean, rstd, a["seed"], a["dropout_p"])
    return [("residual_norm_fwd", forward), ("residual_norm_bwd", backward)]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    width = shape[2]
    block = power_of_two(width)
    tried = [("residual_norm_fwd", fwd_defaults(width))]
    tried += [
        ("residual_norm_fwd", {"rows": rows, "warps": warps})
        for warps in (1, 2, 4, 8)
        for rows in (1, 2, 4, 8, 16)
        if 4 <= rows * block // (32 * warps) <= 32
    ]
    tried += [("residual_norm_bwd", bwd_defaults(width))]
    tried += [
        ("residual_norm_bwd", {"rows": rows, "warps": warps, "programs": programs})
        for warps in (1, 4, 8, 16)
        for rows in (1, 2, 4, 8, 16)
        for programs in (1, 2, 3, 4, 8)
        if 4 <= rows * block // (32 * warps) <= 32 and programs * warps <= 32
    ]
    return [{"op": op, "bucket": f"width{block}", "parameters": parameters} for op, parameters in tried]


def loop_turns(kernel: str, constants: dict, shape: tuple) -> int | None:
    """How often the loop over blocks of rows turns, in all programs together."""
    return cdiv(shape[0] * shape[1], constants["R"]) if kernel == "_residual_norm_bwd_kernel" else None


def _sizes(shape: tuple, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Elements, bytes of an element of the branch, of the stream, and bytes of the statistics."""
    batch, length, width, _, wide = shape
    return batch * length * width, dtype.itemsize, 4 if wide else dtype.itemsize, 8 * batch * length


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: x, branch and pos read, y and y + pos written, row statistics."""
    elements, branch, stream, statistics = _sizes(shape, dtype)
    return elements * (branch + stream * (4 if shape[3] else 2)) + statistics + 8 * shape[2]


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: both gradients, x and branch read; the gradients of x and branch, of weight and bias written."""
    elements, branch, stream, statistics = _sizes(shape, dtype)
    return elements * (2 * branch + stream * (4 if shape[3] else 3)) + statistics + 12 * shape[2]


def flops(shape: tuple) -> int:
    """Forward, counted on the formula: 2 for the sum, 7 for the norm, 1 for pos."""
    return shape[0] * shape[1] * shape[2] * (10 if shape[3] else 9)


def flops_bwd(shape: tuple) -> int:
    """Backward: 2 for the sum, 2 normalise, 3 for weight and bias, 1, 3 and 5 for the gradient, 1 for dropout."""
    return shape[0] * shape[1] * shape[2] * (18 if shape[3] else 17)
