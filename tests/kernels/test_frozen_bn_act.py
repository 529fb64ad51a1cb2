"""Frozen batch norm with residual and ReLU: its cases, the layers it replaces, layouts, the backbone."""

import itertools

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d
from unit_fast_kernels.frozen_bn_act import frozen_bn_act_fused
from unit_fast_kernels.shared.triton import INTERPRETING

from tests.kernels.cases import Call, Cases, Problem, as_it_is, exact, launched
from tests.kernels.common import assert_equal
from unit_fast import ops
from unit_fast.config import BackboneConfig
from unit_fast.model.backbone import Backbone


def make(shape, residual=True, scale=True, relu=True, **dtypes):
    """Channels last; the first values add to zero, where ReLU passes no gradient."""
    rng = torch.Generator().manual_seed(3)
    maps = [exact(*shape, rng=rng) for _ in "xr"]
    vectors = [exact(shape[1], rng=rng) for _ in "ss"]
    for t in (*maps, vectors[1]):
        t[:1] = 0.0
    inputs = {n: t.contiguous(memory_format=torch.channels_last) for n, t in zip(("x", "residual"), maps)}
    others = {"scale": vectors[0] if scale else None, "shift": vectors[1], "relu": relu}
    if not residual:
        others["residual"] = None
        del inputs["residual"]
    return Problem(inputs, others, {k.removesuffix("_dtype"): v for k, v in dtypes.items()})


def also(arguments, found):
    assert found[0].is_contiguous(memory_format=torch.channels_last)


X, C = torch.ones(2, 4, 3, 3), torch.ones(4)
FORMS = {
    "_".join(n for n, given in zip(("plain", "residual", "scale", "relu"), (True, *form)) if given): dict(
        zip(("residual", "scale", "relu"), form)
    )
    for form in itertools.product((False, True), repeat=3)
}
MIXED = {
    "float32_residual": {"scale": False, "residual_dtype": torch.float32},
    "bfloat16_residual": {"scale": False, "residual_dtype": torch.bfloat16},
}
CASES = Cases(
    op="frozen_bn_act",
    sizes={
        "row": (1, 8, 1, 1), "odd": (3, 5, 7, 3), "tail": (2, 300, 3, 5), "many": (2, 64, 9, 11),
        "one_channel": (2, 1, 4, 4), "empty": (0, 8, 3, 3), "no_pixels": (2, 8, 0, 3),
    },
    make=make,
    settings=FORMS | MIXED,
    main=("plain_residual_scale_relu", "plain_residual_relu", "plain_scale", "bfloat16_residual"),
    skip=lambda way, size, setting, dtype: setting in MIXED and (size != "odd" or dtype == torch.float16),
    also=also,
    memory=("odd", "tail", "many", "empty"),
    card={"resnet50_dc5_layer4_block": (2, 2048, 50, 84)},
    valid=lambda: {"x": X, "scale": C, "shift": C, "residual": X},
    refusals=[
        ({"x": X[0]}, r"x is of shape \[4, 3, 3\]; it must be \[B,C,H,W\]"),
        ({"x": X.int()}, "x is torch.int32; it must be floating point"),
        ({"scale": C[:3]}, r"scale is of shape \[3\]; it must be \[C\] = \[4\]"),
        ({"shift": C[:3]}, r"shift is of shape \[3\]; it must be \[C\] = \[4\]"),
        ({"shift": C.int()}, "shift is torch.int32; it must be floating point"),
        (
            {"scale": C.clone().requires_grad_()},
            "scale is a tensor that requires a gradient; it gets none here: detach",
        ),
        ({"residual": X[:1]}, r"residual is of shape \[1, 4, 3, 3\]; it must be the shape of x"),
        ({"residual": X.int()}, "residual is torch.int32; it must be floating point"),
    ],
    unfit=[
        ({"x": X.double()}, "a tensor is torch.float64: convert it to float32, bfloat16 or float16"),
        (
            {"x": torch.ones(1).expand(2, 1, 2**15, 2**15), "scale": None, "shift": C[:1], "residual": None},
            r"x has 2\^31 pixels or more: split the batch",
        ),
    ],
)  # fmt: skip


def test_is_torchvisions_norm_with_residual_and_relu():
    problem = make((2, 64, 9, 11))
    x, residual = problem.inputs.values()
    scale, shift, _ = problem.others.values()
    norm = FrozenBatchNorm2d(64).double()
    norm.weight, norm.bias = scale, shift
    norm.running_mean, norm.running_var = shift * 0.5, scale.abs() + 0.1
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    y = ops.frozen_bn_act(x, factor, norm.bias - norm.running_mean * factor, residual)
    torch.testing.assert_close(y, torch.relu(norm(x) + residual))
    plain = ops.frozen_bn_act(x, factor, norm.bias - norm.running_mean * factor, relu=False)
    torch.testing.assert_close(plain, norm(x))


def test_not_a_number_stays_one():
    x = torch.tensor([float("nan"), 1.0, -1.0, float("inf")] * 2).view(1, 8, 1, 1).requires_grad_()
    y = frozen_bn_act_fused(x, None, torch.zeros(8))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.flatten().isnan().tolist() == [True, False, False, False] * 2
    assert grad.flatten().tolist() == [1.0, 1.0, 0.0, 1.0] * 2  # as eager's


@pytest.mark.parametrize("setting", ["plain_residual_relu", "plain_residual_scale_relu"])
def test_neither_layouts_nor_launch_parameters_change_bits(setting):
    problem, results = CASES.problem("tail", setting), []
    for wrap, way in (
        (lambda x: x, as_it_is),
        (torch.Tensor.contiguous, as_it_is),
        (lambda x: x.mT.contiguous().mT if x.dim() == 4 else torch.stack((x, x), 1)[:, 0], as_it_is),
        (lambda x: x, launched(columns=64, rows=4, warps=1)),
    ):
        with way("tail"):
            results.append(Call(CASES, problem, torch.float32, wrap)(frozen_bn_act_fused))
    for other in results[1:]:
        assert_equal(other, results[0])


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
