"""Frozen batch norm, residual and ReLU in one pass: y = relu(x * scale + shift + residual).

Shapes: x, residual, y [B,C,H,W], channels last; scale, shift [C], constants (no gradient); N = B H W rows of C. scale
None is 1: folded into the convolution before, which is cheaper than a scale here (the gradients of x and residual are
then one tensor). Replaces a convolution's bias pass, ``x.add_(residual)`` and ``F.relu(x)``; y alone is saved, which
the next convolution saves anyway: it says where the gradient flows.

Fused, one kernel each way. Bytes an element of size s: forward 2 s (3 s with a residual) against eager's 4 s (7 s)
with a bias in the convolution, backward 3 s (and s more for a residual beside a scale) as eager's. FLOPs: 1 to 4 an
element; memory-bound. Limits of the fused path: float32, bfloat16, float16; another layout is copied to channels last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import DTYPES, register
from unit_fast_kernels.shared.triton import cdiv, jit, power_of_two, tl, vector
from unit_fast_kernels.shared.tuned import candidates_of, launch_parameters
from unit_fast_kernels.shared.validation import check_floating, check_one_device, check_shape, refuse


def frozen_bn_act_reference(x, scale, shift, residual=None, relu=True) -> Tensor:
    """The specification. x, residual [B,C,H,W]; scale (or None for 1), shift [C], taken in the dtype of x."""
    if scale is not None:
        x = x * scale.to(x.dtype)[:, None, None]
    y = x + shift.to(x.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


# --- Kernels --------------------------------------------------------------------------------------------------------


@jit
def _frozen_bn_act_fwd_kernel(
    x_ptr,  # [N,C]
    scale_ptr,  # [C], or None
    shift_ptr,  # [C]
    residual_ptr,  # [N,C], or None
    y_ptr,  # [N,C]
    rows,  # N
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    RELU: tl.constexpr,
):
    number = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (number < rows)[:, None] & (column < C)[None, :]
    offset = number.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        value *= vector(scale_ptr, column, R, C, BLOCK)
    value += vector(shift_ptr, column, R, C, BLOCK)
    if residual_ptr is not None:
        value += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value <= 0.0, 0.0, value)  # a NaN stays
    tl.store(y_ptr + offset, value.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _frozen_bn_act_bwd_kernel(
    dy_ptr,  # [N,C]
    y_ptr,  # [N,C], or None without ReLU
    scale_ptr,  # [C], or None
    dx_ptr,  # [N,C]
    dresidual_ptr,  # [N,C], or None
    rows,  # N
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (number < rows)[:, None] & (column < C)[None, :]
    offset = number.to(tl.int64)[:, None] * C + column[None, :]
    grad = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(y <= 0.0, 0.0, grad)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offset, grad.to(dresidual_ptr.dtype.element_ty), mask=inside)
    if scale_ptr is not None:
        grad *= vector(scale_ptr, column, R, C, BLOCK)
    tl.store(dx_ptr + offset, grad.to(dx_ptr.dtype.element_ty), mask=inside)


# --- Launchers, their references and fakes --------------------------------------------------------------------------


def defaults(width: int) -> dict[str, int]:
    """Columns and rows of a program, warps: 16 elements to a thread."""
    block = min(256, power_of_two(width))
    return {"columns": block, "rows": 2048 // block, "warps": 4}


def _launch_parameters(op: str, x: Tensor) -> dict[str, int]:
    width = x.shape[1]
    return launch_parameters(op, f"width{power_of_two(width)}", defaults(width), x.device)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _fwd_launch(x, scale, shift, residual, relu):
    y = _like(x, _dtype(x, residual))
    if y.numel() == 0:
        return y
    batch, width, height, length = x.shape
    rows = batch * height * length
    tune = _launch_parameters("frozen_bn_act_fwd", x)
    _frozen_bn_act_fwd_kernel[(cdiv(rows, tune["rows"]), cdiv(width, tune["columns"]))](
        _rows(x),
        _vector(scale),
        _vector(shift),
        _rows(residual),
        y,
        rows,
        C=width,
        R=tune["rows"],
        BLOCK=tune["columns"],
        RELU=relu,
        num_warps=tune["warps"],
    )
    return y


def _fwd_reference(x, scale, shift, residual, relu):
    wide = [None if t is None else t.float() for t in (x, scale, shift, residual)]
    return _like(x, _dtype(x, residual)).copy_(frozen_bn_act_reference(*wide, relu))


def _bwd_outputs(dy, scale, dtype, residual_dtype) -> tuple[Tensor, Tensor]:
    """dx, and the gradient of the residual: empty where there is no residual or where it is dx."""
    dx = _like(dy, dtype)
    if residual_dtype is None or (scale is None and residual_dtype == dtype):
        return dx, torch.empty(0, dtype=dtype, device=dy.device)
    return dx, _like(dy, residual_dtype)


def _bwd_launch(dy, y, scale, dtype, residual_dtype):
    dx, dresidual = outputs = _bwd_outputs(dy, scale, dtype, residual_dtype)
    if dx.numel() == 0:
        return outputs
    batch, width, height, length = dy.shape
    rows = batch * height * length
    tune = _launch_parameters("frozen_bn_act_bwd", dy)
    _frozen_bn_act_bwd_kernel[(cdiv(rows, tune["rows"]), cdiv(width, tune["columns"]))](
        _rows(dy),
        _rows(y),
        _vector(scale),
        dx,
        dresidual if dresidual.numel() else None,
        rows,
        C=width,
        R=tune["rows"],
        BLOCK=tune["columns"],
        num_warps=tune["warps"],
    )
    return outputs


def _bwd_reference(dy, y, scale, dtype, residual_dtype):
    dx, dresidual = _bwd_outputs(dy, scale, dtype, residual_dtype)
    grad = dy.float() if y is None else torch.where(y <= 0.0, 0.0, dy.float())
    if dresidual.shape == dy.shape:
        dresidual.copy_(grad)
    return dx.copy_(grad if scale is None else grad * scale.float()[:, None, None]), dresidual


_forward = register(
    "frozen_bn_act_fwd",
    "(Tensor x, Tensor? scale, Tensor shift, Tensor? residual, bool relu) -> Tensor",
    reference=_fwd_reference,
    launch=_fwd_launch,
    fake=lambda x, scale, shift, residual, relu: _like(x, _dtype(x, residual)),
)
_backward = register(
    "frozen_bn_act_bwd",
    "(Tensor dy, Tensor? y, Tensor? scale, ScalarType dtype, ScalarType? residual_dtype) "
    "-> (Tensor dx, Tensor dresidual)",
    reference=_bwd_reference,
    launch=_bwd_launch,
    fake=lambda dy, y, scale, dtype, residual_dtype: _bwd_outputs(dy, scale, dtype, residual_dtype),
)


# --- The fused operator ---------------------------------------------------------------------------------------------


class _FrozenBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, residual, relu):
        y = _forward(x, scale, shift, residual, relu)
        ctx.save_for_backward(y if relu else None, scale)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, scale = ctx.saved_tensors
        residual_dtype = ctx.dtypes[1] if ctx.needs_input_grad[3] else None
        dx, dresidual = _backward(dy, y, scale, ctx.dtypes[0], residual_dtype)
        if residual_dtype is None:
            dresidual = None
        elif dresidual.shape != dy.shape:
            dresidual = dx
        return dx, None, None, dresidual, None


def why_not(x: Tensor, scale=None, shift=None, residual=None, relu=True) -> str | None:
    """Why the kernels cannot take x and the other tensors, or None."""
    for tensor in (x, scale, shift, residual):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}: convert it to float32, bfloat16 or float16"
    if x.shape[:1].numel() * x.shape[2:].numel() >= 2**31:
        return "x has 2^31 pixels or more: split the batch"
    return None


def frozen_bn_act_fused(x, scale, shift, residual=None, relu=True) -> Tensor:
    """``frozen_bn_act_reference`` in one pass each way; the result is channels last.

    x, residual [B,C,H,W] and scale, shift [C] of DTYPES; the result has the wider dtype of x and residual. scale and
    shift get no gradient. What does not fit: ``why_not``.
    """
    return _FrozenBnAct.apply(x, scale, shift, residual, relu)


def validate(
    x: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None = None, relu: bool = True
) -> tuple:
    """relu(x * scale + shift + residual): a frozen batch norm with what follows it, one pass over a feature map.

    x, residual [B,C,H,W], floating, channels last where it shall be fast; scale (None: 1), shift [C] constants that get
    no gradient. The result has the wider dtype of x and residual. ``ValueError`` on arguments that do not fit.
    """
    op = "frozen_bn_act"
    check_shape(op, "x", x, (None,) * 4, "[B,C,H,W]")
    check_floating(op, x=x)
    for argument, constant in (("scale", scale), ("shift", shift)):
        if constant is not None:
            check_shape(op, argument, constant, (x.shape[1],), "[C]")
            check_floating(op, **{argument: constant})
            if constant.requires_grad:
                refuse(op, argument, "a tensor that requires a gradient", "it gets none here: detach it")
    if residual is not None:
        check_shape(op, "residual", residual, tuple(x.shape), "the shape of x")
        check_floating(op, residual=residual)
    check_one_device(op, x, scale=scale, shift=shift, residual=residual)
    return x, scale, shift, residual, relu


FROZEN_BN_ACT = Operator(
    name="frozen_bn_act",
    validate=validate,
    reference=frozen_bn_act_reference,
    fused=frozen_bn_act_fused,
    why_not=why_not,
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, int, int, bool, bool]] = {
    "resnet50_stem_800x1344": (2, 64, 400, 672, False, False),
    "resnet50_layer1_inner": (2, 64, 200, 336, False, False),
    "resnet50_layer1_block": (2, 256, 200, 336, True, False),
    "resnet50_layer2_block": (2, 512, 100, 168, True, False),
    "resnet50_layer3_block": (2, 1024, 50, 84, True, False),
    "resnet50_dc5_layer4_inner": (2, 512, 50, 84, False, False),
    "resnet50_dc5_layer4_block": (2, 2048, 50, 84, True, False),
    "resnet50_dc5_layer4_block_scaled": (2, 2048, 50, 84, True, True),
}
"""(B, C, H, W, with residual, with scale)."""


def make(shape: tuple, dtype: torch.dtype, device) -> dict:
    """Arguments of ``frozen_bn_act_fused``; constants are float32."""
    *size, with_residual, with_scale = shape
    x, residual = (torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    return {
        "x": x,
        "scale": torch.rand(size[1], device=device) + 0.5 if with_scale else None,
        "shift": torch.randn(size[1], device=device),
        "residual": residual if with_residual else None,
        "relu": True,
    }


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operators of a forward and a backward pass, with arguments."""
    a = make(shape, dtype, device)
    residual_dtype = None if a["residual"] is None else dtype
    backward = (a["x"], a["x"], a["scale"], dtype, residual_dtype)
    return [("frozen_bn_act_fwd", tuple(a.values())), ("frozen_bn_act_bwd", backward)]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    width = shape[1]
    tiles = [defaults(width)]
    tiles += [
        {"columns": columns, "rows": rows, "warps": warps}
        for columns in (64, 128, 256, 512, 1024)
        for rows in (1, 2, 4, 8, 16, 32)
        for warps in (2, 4, 8)
        if columns < 2 * width and 8 <= rows * columns // (32 * warps) <= 32
    ]
    return candidates_of(["frozen_bn_act_fwd", "frozen_bn_act_bwd"], f"width{power_of_two(width)}", tiles)


def _elements(shape: tuple) -> int:
    return shape[0] * shape[1] * shape[2] * shape[3]


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """Forward: x and residual read, y written; the constants."""
    return _elements(shape) * dtype.itemsize * (2 + shape[4]) + 4 * shape[1] * (1 + shape[5])


def bytes_moved_bwd(shape: tuple, dtype: torch.dtype) -> int:
    """Backward: the gradient and y read, the gradient of x written, and that of a residual beside a scale."""
    return _elements(shape) * dtype.itemsize * (3 + (shape[4] and shape[5])) + 4 * shape[1] * shape[5]


def flops(shape: tuple) -> int:
    """Forward: shift and ReLU, 1 each for residual and scale."""
    return _elements(shape) * (2 + shape[4] + shape[5])


def flops_bwd(shape: tuple) -> int:
    """Backward: ReLU, 1 for the scale."""
    return _elements(shape) * (1 + shape[5])
