"""AdamW for all tensors of an optimiser at once: clip by the joint norm, a mask of what moves, a step count a tensor.

n parameters p with gradients g and moments m, v; ``used`` [n] says which took part in the step. norm = |g| over the
used ones, g <- g min(1, max_norm / (norm + 1e-6)), then for each parameter that moves

    t <- t + 1;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    ``hf``:    p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps);  p <- p - lr decay p
    ``torch``: p <- p - lr decay p;  p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

What does not move keeps p, m, v and t bit for bit. Which do (``unused``): ``skip``: used and max|g| > 0 after the
clipping; ``graph``: used; ``update_all``: used now or ever before (t > 0), with gradient zero while it is not used.
Nothing at all changes where the norm is not finite. Replaces ``clip_grad_norm_``, a host read a tensor for max|g|, and
``torch.optim.AdamW`` or a loop of a dozen passes over each tensor.

Fused: three launches for all tensors, nothing read on the host. (a) sums of squares and largest magnitudes by chunk;
(b) norm, clip factor, what moves, step counts, corrections, learning rates from a tensor on the device; (c) the update,
which leaves before any load where a tensor does not move. Bytes a moving element in float32: 4 (norm) + 16 read and 12
written, 4 more where the clipped gradient is written; eager takes about 100. FLOPs about 20. Limits of the kernels:
parameters in float32, dense in memory; gradients in one of float32, bfloat16, float16.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from unit_fast_kernels.adamw.cpu import adamw_cpu, adamw_cpu_unfit
from unit_fast_kernels.adamw.kernels import (
    CHUNK,
    SCALARS,
    _adamw_decide_kernel,
    _adamw_norms_kernel,
    _adamw_update_kernel,
)
from unit_fast_kernels.adamw.step import Stats, Step, adamw_reference, is_dense, same_layout
from unit_fast_kernels.adamw.tables import Tables
from unit_fast_kernels.shared import capture
from unit_fast_kernels.shared.operator import Operator
from unit_fast_kernels.shared.registration import DTYPES, register
from unit_fast_kernels.shared.triton import cdiv, tl
from unit_fast_kernels.shared.tuned import launch_parameters

# --- The operator ---------------------------------------------------------------------------------------------------


DEFAULTS = {
    "adamw_norms": {"block": 2048, "warps": 4},
    "adamw_decide": {"block": 1024, "warps": 4},
    "adamw_update": {"block": 1024, "warps": 8},
}
"""Elements that a program takes at a time, and its warps. Twice as many elements a thread spill in the update."""


GRADIENTS = dict(zip(DTYPES, (getattr(tl, str(d).removeprefix("torch."), None) for d in DTYPES)))


def _launch(
    params, grads, exp_avgs, exp_avg_sqs, copies, counts, grad_of, copy_of, used, lr, hyper, max_norm, grad_scale,
    found_inf, addresses, layout, chunks, grad_dtype, rule, unused, in_place,
):  # fmt: skip
    norm, nonfinite = outputs = _outputs(counts)
    device, n, pieces = counts.device, counts.numel(), chunks.shape[1]
    partials = torch.empty((2, pieces), dtype=torch.float32, device=device)
    actions = torch.empty(n, dtype=torch.int32, device=device)
    scalars = torch.empty((n, SCALARS), dtype=torch.float32, device=device)
    grad_type = GRADIENTS[grad_dtype]
    if pieces:
        tune = launch_parameters("adamw_norms", "any", DEFAULTS["adamw_norms"], device)
        _adamw_norms_kernel[(pieces,)](
            addresses,
            layout,
            chunks,
            used,
            partials,
            n,
            GRAD=grad_type,
            CHUNK=CHUNK,
            BLOCK=tune["block"],
            num_warps=tune["warps"],
            enable_fp_fusion=False,
        )
    tune = launch_parameters("adamw_decide", "any", DEFAULTS["adamw_decide"], device)
    _adamw_decide_kernel[(n,)](
        partials,
        addresses,
        layout,
        used,
        counts,
        lr,
        hyper,
        max_norm,
        grad_scale,
        found_inf,
        norm,
        nonfinite,
        actions,
        scalars,
        n,
        pieces,
        IN_PLACE=in_place,
        HF=rule == "hf",
        POLICY=unused,
        CHUNK=CHUNK,
        SCALARS=SCALARS,
        BLOCK=tune["block"],
        num_warps=tune["warps"],
        enable_fp_fusion=False,
    )
    if pieces:
        tune = launch_parameters("adamw_update", "any", DEFAULTS["adamw_update"], device)
        _adamw_update_kernel[(pieces,)](
            addresses,
            layout,
            chunks,
            actions,
            scalars,
            n,
            GRAD=grad_type,
            HF=rule == "hf",
            IN_PLACE=in_place,
            COPY=len(copies) > 0,
            CHUNK=CHUNK,
            SCALARS=SCALARS,
            BLOCK=tune["block"],
            num_warps=tune["warps"],
            enable_fp_fusion=False,
        )
    return outputs


def _outputs(counts: Tensor) -> Stats:
    """norm, nonfinite."""
    return (
        torch.empty((), dtype=torch.float32, device=counts.device),
        torch.empty((), dtype=torch.int32, device=counts.device),
    )


def _spread(tensors: Sequence[Tensor], where: Sequence[int], n: int) -> list[Tensor | None]:
    """A list of n with the tensors in their places."""
    found: list[Tensor | None] = [None] * n
    for i, tensor in zip(where, tensors, strict=True):
        found[i] = tensor
    return found


def _operator_reference(
    params, grads, exp_avgs, exp_avg_sqs, copies, counts, grad_of, copy_of, used, lr, hyper, max_norm, grad_scale,
    found_inf, addresses, layout, chunks, grad_dtype, rule, unused, in_place,
):  # fmt: skip
    n = len(params)
    step = Step(
        params=params, grads=_spread(grads, grad_of, n), moments=lambda i: (exp_avgs[i], exp_avg_sqs[i]),
        counts=counts, used=used, groups=layout[2].tolist(), lr=lr, hyper=hyper, rule=rule, unused=unused,
        max_norm=max_norm, grad_scale=grad_scale, found_inf=found_inf, in_place=in_place,
        copies=_spread(copies, copy_of, n),
    )  # fmt: skip
    return adamw_reference(step)


_operator = register(
    "adamw",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] copies, "
    "Tensor(f!) counts, int[] grad_of, int[] copy_of, Tensor? used, "
    "Tensor lr, Tensor hyper, Tensor? max_norm, Tensor? grad_scale, Tensor? found_inf, Tensor addresses, "
    "Tensor layout, Tensor chunks, ScalarType grad_dtype, str rule, str unused, bool in_place) "
    "-> (Tensor norm, Tensor nonfinite)",
    reference=_operator_reference,
    launch=_launch,
    fake=lambda params, grads, exp_avgs, exp_avg_sqs, copies, counts, *_: _outputs(counts),
)


# --- The fused implementation ---------------------------------------------------------------------------------------


def why_not(step: Step, *_) -> str | None:
    """Why the kernels cannot take this step, or None."""
    device = step.params[0].device
    for p in step.params:
        if p.dtype != torch.float32:
            return f"a parameter is {p.dtype}: keep it in float32"
        if p.device != device:
            return f"parameters are on {device} and {p.device}: put them on one device"
        if not is_dense(p):
            return f"a parameter of shape {list(p.shape)} is not contiguous in memory"
    dtypes = {g.dtype for g in step.grads if g is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"gradients are {', '.join(sorted(map(str, dtypes)))}: give them one dtype, of at most 32 bits"
    for p, t in zip(step.params, step.copies):
        if t is not None and (t.dtype != torch.bfloat16 or t.device != device or not same_layout(p, t)):
            return "a parameter's copy is not torch.bfloat16 on its device and laid out as it"
    return None


def _arguments(step: Step, grads: Sequence[Tensor | None], tables: Tables) -> tuple:
    """The operator's arguments; ``grads`` laid out as the parameters."""
    n, device = len(step.params), step.params[0].device
    copies = list(step.copies) or [None] * n
    exp_avgs, exp_avg_sqs = map(list, zip(*(step.moments(i) for i in range(n))))
    rows = (step.params, grads, exp_avgs, exp_avg_sqs, copies)
    used = step.used
    if used is not None:
        if used.device != device:
            capture.refuse(device, f"AdamW's mask of what was used, which is on {used.device}, would be copied")
        used = used.to(device, non_blocking=True).contiguous().view(torch.uint8)
    present = [[i for i, t in enumerate(row) if t is not None] for row in (grads, copies)]
    grad_dtype = grads[present[0][0]].dtype if present[0] else torch.float32
    return (
        list(step.params), [grads[i] for i in present[0]], exp_avgs, exp_avg_sqs, [copies[i] for i in present[1]],
        step.counts, *present, used, step.lr,
        tables.kept("hyper", [list(h) for h in step.hyper], torch.float64),
        None if step.max_norm is None else tables.kept("max_norm", step.max_norm, torch.float64), step.grad_scale,
        step.found_inf, tables.addresses(rows), tables.layout, tables.chunks, grad_dtype, step.rule, step.unused,
        step.in_place,
    )  # fmt: skip


def prepare(step: Step, tables: Tables) -> None:
    """Make and copy all that ``adamw_fused`` keeps from one call to the next, so that a step can be captured."""
    with capture.graph_memory():  # as a captured step: gradients are not here yet, and each step has its own
        _arguments(step, [None] * len(step.params), tables)


@torch.no_grad()
def adamw_fused(step: Step, tables: Callable[[], Tables]) -> Stats:
    """``adamw_reference`` in three launches, for what ``why_not`` has nothing against; every parameter gets moments.

    ``tables()`` belongs to the same parameters in the same order, and makes ``step.lr`` a float64 tensor on the device.
    """
    grads = list(step.grads)
    moved = [i for i, g in enumerate(grads) if g is not None and not same_layout(step.params[i], g)]
    for i in moved:  # elements are paired by their place in memory
        grads[i] = torch.empty_like(step.params[i], dtype=grads[i].dtype).copy_(grads[i])
    stats = _operator(*_arguments(step, grads, tables()))
    if step.in_place:
        for i in moved:
            step.grads[i].copy_(grads[i])
    return stats


def validate(step: Step, tables: Callable[[], Tables]) -> tuple[Step, Callable[[], Tables]]:
    """One step of AdamW over the tensors of ``step``, in place: (norm before clipping, int32 1 if nothing was changed).

    ``tables`` gives what the kernels know of the tensors, and makes ``step.lr`` a tensor on the device; it is called
    only where they run. ``unit_fast.MaskedAdamW`` is the optimiser around it. ``ValueError`` as every operator where
    the mode is fused and the kernels cannot take the step.
    """
    return step, tables


ADAMW = Operator(
    name="adamw",
    validate=validate,
    reference=adamw_reference,
    cpu=adamw_cpu,
    fused=adamw_fused,
    why_not=why_not,
    why_not_cpu=adamw_cpu_unfit,
    tensor=lambda step, *_: step.params[0],
)


# --- For benchmarks and assembly ------------------------------------------------------------------------------------

UNIT_TENSORS = (
    (23440896, 1, 0), (2403072, 1, 0), (2359296, 27, 3), (2097152, 1, 1), (1769472, 12, 12), (1572864, 12, 12),
    (1230336, 1, 0), (1048576, 5, 5), (589824, 79, 20), (524288, 16, 15), (410112, 1, 0), (393216, 1, 0),
    (262144, 11, 11), (205312, 1, 0), (196608, 9, 8), (147456, 4, 4), (131072, 2, 2), (76800, 2, 1), (70656, 1, 1),
    (65536, 14, 14), (32768, 1, 1), (19200, 6, 0), (3129, 1, 0), (3072, 14, 1), (2304, 14, 12), (2048, 12, 12),
    (1602, 1, 0), (1536, 4, 0), (768, 199, 66), (512, 1, 0), (401, 1, 0), (256, 37, 37), (92, 1, 1), (4, 2, 1),
    (3, 2, 0), (2, 3, 0),
)  # fmt: skip
"""UniT's trained parameters with eight tasks: (elements, tensors of that size, of them used on COCO)."""

BERT_LAYER = ((2359296, 2, 0), (589824, 4, 0), (3072, 1, 0), (768, 9, 0))
"""The tensors of one layer of BERT-base, likewise."""

SHAPES: dict[str, tuple] = {
    "unit_201m": (UNIT_TENSORS, False, "hf", "skip", False, False),
    "unit_vision": (UNIT_TENSORS, True, "hf", "skip", False, False),
    "bert_layer_in_place": (BERT_LAYER, False, "hf", "graph", True, False),
    "bert_layer_copy": (BERT_LAYER, False, "hf", "update_all", False, True),
    "bert_layer_torch": (BERT_LAYER, False, "torch", "skip", False, False),
}
"""(tensors, only those of COCO used, rule, policy, clipped gradients written, bfloat16 copies)."""


def make(shape: tuple, dtype: torch.dtype, device) -> tuple[Step, Tables]:
    """A step with gradients of ``dtype``, all of them of length 1 together or less: the clipping changes nothing, so
    that a step after another finds the same norm."""
    tensors, vision, rule, unused, in_place, copied = shape
    sizes = [size for size, count, _ in tensors for _ in range(count)]
    flags = [int(not vision or i < used) for _, count, used in tensors for i in range(count)]
    padded = [cdiv(size, 64) * 64 for size in sizes]  # one buffer, and every tensor at an aligned place in it

    def cut(buffer: Tensor) -> list[Tensor]:
        return [t if len(t) == size else t[:size] for t, size in zip(buffer.split(padded), sizes)]

    params, m, v = (cut(torch.zeros(sum(padded), device=device)) for _ in range(3))
    grads = cut(torch.randn(sum(padded), dtype=dtype, device=device) * sum(padded) ** -0.5)
    step = Step(
        params=params, grads=grads, moments=lambda i: (m[i], v[i]),
        counts=torch.zeros(len(sizes), dtype=torch.int32, device=device),
        used=torch.tensor(flags, dtype=torch.uint8, device=device), groups=[0] * len(sizes),
        lr=torch.full((1,), 5e-5, dtype=torch.float64, device=device), hyper=[(0.9, 0.999, 1e-8, 1e-4)], rule=rule,
        unused=unused, max_norm=10.0, in_place=in_place,
        copies=cut(torch.zeros(sum(padded), dtype=torch.bfloat16, device=device)) if copied else (),
    )  # fmt: skip
    return step, Tables(sizes, step.groups, torch.device(device))


def launches(shape: tuple, dtype: torch.dtype, device) -> list[tuple[str, tuple]]:
    """The registered operator with arguments."""
    step, tables = make(shape, dtype, device)
    return [("adamw", _arguments(step, step.grads, tables))]


def candidates(shape: tuple) -> list[dict]:
    """Launch parameters worth trying: {"op", "bucket", "parameters"}, the defaults first."""
    tried = list(DEFAULTS.items())
    tried += [
        (op, {"block": block, "warps": warps})
        for op, least, most in (("adamw_norms", 4, 16), ("adamw_decide", 1, 16), ("adamw_update", 4, 8))
        for block in (512, 1024, 2048, 4096)
        for warps in (1, 2, 4, 8, 16)
        if least <= block // (32 * warps) <= most
    ]
    return [{"op": op, "bucket": "any", "parameters": parameters} for op, parameters in tried]


def _used(shape: tuple) -> int:
    """Elements of the tensors that move."""
    return sum(size * (used if shape[1] else count) for size, count, used in shape[0])


def bytes_moved(shape: tuple, dtype: torch.dtype) -> int:
    """A used element: its gradient read twice (norm, update), perhaps written; p, m and v read and written; perhaps its
    copy written."""
    in_place, copied = shape[4:]
    return _used(shape) * (24 + dtype.itemsize * (3 if in_place else 2) + (2 if copied else 0))


def flops(shape: tuple) -> int:
    """Counted on the formulas: 2 for the norm, 1 clip, 3 for m, 4 for v, 7 for p (square root and division as one)."""
    return _used(shape) * 17
