"""Frozen batch norm with residual and ReLU: the reference is the layers it replaces; the fused path against float64.

Under ``TRITON_INTERPRET=1`` the kernels run; else the references that are registered for the CPU."""

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d
from unit_fast_kernels import frozen_bn_act as module
from unit_fast_kernels.frozen_bn_act import frozen_bn_act_fused, frozen_bn_act_reference
from unit_fast_kernels.shared import tuned as _tuned
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.common import (
    assert_as_good_as_eager,
    assert_fake_is_real,
    guarded,
    poison_new_memory,
    values_and_gradients,
)
from unit_fast import ops
from unit_fast.config import BackboneConfig
from unit_fast.model.backbone import Backbone

SIZES = {
    "pixel": (1, 8, 1, 1),
    "odd": (3, 5, 7, 3),
    "tail": (2, 300, 3, 5),
    "many": (2, 64, 9, 11),
    "one_channel": (2, 1, 4, 4),
    "empty": (0, 8, 3, 3),
    "no_pixels": (2, 8, 0, 3),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _inputs(shape, seed=3):
    """x, residual, upstream (channels last), scale and shift, exact in bf16; the first values add to zero."""
    rng = torch.Generator().manual_seed(seed)
    sizes = (shape, shape, shape, shape[1:2], shape[1:2])
    x, residual, upstream, scale, shift = (
        torch.randn(s, generator=rng, dtype=torch.float64).bfloat16().double() for s in sizes
    )
    x[:1], residual[:1], shift[:1] = 0.0, 0.0, 0.0  # at zero ReLU passes no gradient
    maps = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual, upstream)]
    return *maps, scale, shift


def _op(function, scale, shift, relu):
    return lambda x, residual=None: function(x, scale, shift, residual, relu)


def _check(inputs, low, upstream, scale, shift, relu, *dtypes):
    exact = values_and_gradients(_op(frozen_bn_act_reference, scale, shift, relu), inputs, upstream)
    single = [None if t is None else t.float() for t in (scale, shift)]
    eager = values_and_gradients(_op(frozen_bn_act_reference, *single, relu), low, upstream)
    ours = values_and_gradients(_op(frozen_bn_act_fused, *single, relu), low, upstream)
    assert_as_good_as_eager(ours, eager, exact, *dtypes)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_is_as_good_as_eager(name, with_residual, with_scale, relu, dtype):
    x, residual, upstream, scale, shift = _inputs(SIZES[name])
    inputs = [x, residual] if with_residual else [x]
    low = [t.to(dtype) for t in inputs]
    y = _check(inputs, low, upstream, scale if with_scale else None, shift, relu, dtype)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_is_torchvisions_norm_with_residual_and_relu():
    x, residual, _, scale, shift = _inputs(SIZES["many"])
    norm = FrozenBatchNorm2d(64).double()
    norm.weight, norm.bias = scale, shift
    norm.running_mean, norm.running_var = shift * 0.5, scale.abs() + 0.1
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    y = ops.frozen_bn_act(x, factor, norm.bias - norm.running_mean * factor, residual)
    torch.testing.assert_close(y, torch.relu(norm(x) + residual))
    plain = ops.frozen_bn_act(x, factor, norm.bias - norm.running_mean * factor, relu=False)
    torch.testing.assert_close(plain, norm(x))


@pytest.mark.parametrize(("x", "residual"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_residual_of_another_dtype(x, residual):
    a, b, upstream, _, shift = _inputs(SIZES["odd"])
    _check([a, b], [a.to(x), b.to(residual)], upstream, None, shift, True, torch.float32, x, residual)


def test_not_a_number_stays_one():
    x = torch.tensor([float("nan"), 1.0, -1.0, float("inf")] * 2).view(1, 8, 1, 1).requires_grad_()
    y = frozen_bn_act_fused(x, None, torch.zeros(8))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.flatten().isnan().tolist() == [True, False, False, False] * 2
    assert grad.flatten().tolist() == [1.0, 1.0, 0.0, 1.0] * 2  # as eager's


@pytest.mark.gpu
def test_block_of_resnet50_on_a_gpu():
    a = module.make(module.SHAPES["resnet50_dc5_layer4_block"], torch.bfloat16, "cuda")
    inputs = [a["x"].double(), a["residual"].double()]
    upstream = torch.randn_like(inputs[0])
    low = [a["x"], a["residual"]]
    runs = [_check(inputs, low, upstream, None, a["shift"].double(), True, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


# --- Memory -----------------------------------------------------------------------------------------------------------


def _last(x):
    """A copy between bands of NaN, channels last."""
    return guarded(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("name", ["odd", "tail", "many", "empty"])
def test_reads_inside_and_writes_everything(name, with_scale, monkeypatch):
    x, residual, upstream, scale, shift = (t.float() for t in _inputs(SIZES[name]))
    scale = scale if with_scale else None
    plain = values_and_gradients(_op(frozen_bn_act_fused, scale, shift, True), [x, residual], upstream)
    poison_new_memory(monkeypatch)
    leaves = [_last(t).requires_grad_() for t in (x, residual)]
    before = [t.detach().clone() for t in leaves]
    out = frozen_bn_act_fused(leaves[0], guarded(scale), guarded(shift), leaves[1])
    poisoned = [out, *torch.autograd.grad(out, leaves, _last(upstream))]
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("with_scale", [False, True])
def test_other_layouts_are_copied(with_scale):
    x, residual, upstream, scale, shift = (t.float() for t in _inputs((2, 16, 5, 6)))
    constants = [torch.stack((t, t), 1)[:, 0] for t in (scale, shift)]
    constants[0] = constants[0] if with_scale else None
    function = _op(frozen_bn_act_fused, *constants, True)
    last = values_and_gradients(function, [x, residual], upstream)
    first = values_and_gradients(function, [x.contiguous(), residual.mT.contiguous().mT], upstream.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(last, first, strict=True))


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(
    ("with_scale", "residual", "relu"),
    [(False, torch.float32, True), (True, torch.float32, True), (True, None, False), (False, torch.bfloat16, True)],
)
def test_registration(with_scale, residual, relu, layout):
    x, other, upstream, scale, shift = (t.float() for t in _inputs((2, 16, 3, 5)))
    if layout == "first":
        x, other, upstream = (t.contiguous() for t in (x, other, upstream))
    scale, other = scale if with_scale else None, None if residual is None else other.to(residual)
    forward = (x, scale, shift, other, relu)
    y = module._forward(*forward)
    backward = (upstream, y if relu else None, scale, torch.float32, residual)
    for op, arguments in ((module._forward, forward), (module._backward, backward)):
        torch.library.opcheck(op, arguments)
        assert_fake_is_real(op, *arguments)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's launches are what the registration runs")
@pytest.mark.parametrize("with_scale", [False, True])
def test_compiles_whole(with_scale):
    def function(x, residual, scale, shift):
        return frozen_bn_act_fused(x, scale if with_scale else None, shift, residual)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for height in (6, 11) if dynamic else (6,):
            x, residual, upstream, *constants = (t.float() for t in _inputs((2, 16, height, 5)))
            results = [
                values_and_gradients(lambda *t, f=f, c=constants: f(*t, *c), [x, residual], upstream)
                for f in (function, compiled)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_launch_parameters_do_not_change_bits(monkeypatch):
    x, residual, upstream, scale, shift = (t.float() for t in _inputs(SIZES["tail"]))
    function = _op(frozen_bn_act_fused, scale, shift, True)
    first = values_and_gradients(function, [x, residual], upstream)
    other = {"width512": {"columns": 64, "rows": 4, "warps": 1}}
    monkeypatch.setattr(_tuned, "table", lambda card: {"frozen_bn_act_fwd": other, "frozen_bn_act_bwd": other})
    second = values_and_gradients(function, [x, residual], upstream)
    third = values_and_gradients(function, [x, residual], upstream)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))


# --- The backbone -----------------------------------------------------------------------------------------------------


def _features(backbone, image):
    y = backbone(image)
    gradients = torch.autograd.grad(y.square().mean(), [p for p in backbone.parameters() if p.requires_grad])
    return [y.detach(), *gradients]


@pytest.mark.parametrize(("depth", "stride"), [(14, 16), (18, 32)])
def test_backbone_with_the_shift_in_the_epilogue(depth, stride, monkeypatch):
    """The same features and gradients whether the convolution adds the shift or the pass after it does."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(depth=depth, width=8, stride=stride, first_trained_stage=0)).double()
    for name, buffer in backbone.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name or "weight" in name else buffer.uniform_(-0.5, 0.5)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with_bias = _features(backbone, image)
    monkeypatch.setattr(ops, "fuses", lambda op, x: True)
    in_epilogue = _features(backbone, image)
    for a, b in zip(with_bias, in_epilogue, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 + 1e-9 * float(a.abs().max()))


def test_backbone_chooses_by_mode():
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(depth=14, width=8, stride=32))
    image = torch.randn(1, 3, 32, 48)
    plain = _features(backbone, image)
    assert not ops.fuses("frozen_bn_act", image)
    with ops.kernels("fused"):
        if not INTERPRETING:
            with pytest.raises(ValueError, match="^frozen_bn_act: the mode is fused, but tensors are on cpu"):
                backbone(image)
            return
        assert ops.fuses("frozen_bn_act", image)
        for a, b in zip(plain, _features(backbone, image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-7)


# --- What does not fit ------------------------------------------------------------------------------------------------

X, C = torch.ones(2, 4, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X[0], None, C), r"x is of shape \[4, 3, 3\]; it must be \[B,C,H,W\]"),
        ((X.int(), None, C), "x is torch.int32; it must be floating point"),
        ((X, C[:3], C), r"scale is of shape \[3\]; it must be \[C\] = \[4\]"),
        ((X, None, C[:3]), r"shift is of shape \[3\]; it must be \[C\] = \[4\]"),
        ((X, None, C.int()), "shift is torch.int32; it must be floating point"),
        ((X, C.clone().requires_grad_(), C), "scale is a tensor that requires a gradient; it gets none here: detach"),
        ((X, None, C, X[:1]), r"residual is of shape \[1, 4, 3, 3\]; it must be the shape of x"),
        ((X, None, C, X.int()), "residual is torch.int32; it must be floating point"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=f"^frozen_bn_act: {text}"):
        ops.frozen_bn_act(*arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X.double(), None, C), "a tensor is torch.float64: convert it to float32, bfloat16 or float16"),
        ((torch.ones(1).expand(2, 1, 2**15, 2**15), None, C[:1]), r"x has 2\^31 pixels or more: split the batch"),
    ],
)
def test_unfit_arguments_are_told(arguments, text):
    with ops.kernels("fused"), pytest.raises(ValueError, match=f"^frozen_bn_act: the mode is fused, but {text}"):
        ops.frozen_bn_act(*arguments)
