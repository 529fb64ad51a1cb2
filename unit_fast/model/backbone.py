"""Residual backbone (SPEC 1.3). The default is torchvision's ResNet-50 with a dilated last stage and frozen batch norm.

Blocks are torchvision's; only their forward is ours: a frozen batch norm is an affine map with constants, so it is
folded into the convolution before it, w' = w s, b' = beta - mu s with s = gamma / sqrt(var + eps), which saves a pass
over every activation in both directions; with the fused operators b' is added together with the residual and the ReLU.
State-dict names are torchvision's.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from unit_fast import ops
from unit_fast.config import BackboneConfig
from unit_fast.model.short import Short

LAYERS = {14: (1, 1, 1, 1), 18: (2, 2, 2, 2), 26: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


Constants = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Frozen batch norm -> (s, b'), each [channels]."""


def frozen_constants(modules: Iterable[nn.Module]) -> Constants:
    """The constants of every frozen batch norm among ``modules``, all at once: one by one they take five kernels each.

    They are computed in every pass, so that a captured step follows its buffers.
    """
    norms = [m for m in modules if isinstance(m, FrozenBatchNorm2d)]
    if not norms:
        return {}
    if torch.compiler.is_exporting():  # other formats have no operators over lists
        scales = [n.weight * torch.rsqrt(n.running_var + n.eps) for n in norms]
        return {n: (scale, n.bias - n.running_mean * scale) for n, scale in zip(norms, scales)}
    weights, biases, means, variances = zip(*((n.weight, n.bias, n.running_mean, n.running_var) for n in norms))
    scales = torch._foreach_mul(weights, torch._foreach_rsqrt(torch._foreach_add(variances, norms[0].eps)))
    shifts = torch._foreach_sub(biases, torch._foreach_mul(means, scales))
    return dict(zip(norms, zip(scales, shifts)))


def _convolve(conv: nn.Conv2d, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x convolved with the weight times scale."""
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor, constants: Constants) -> Tensor:
    """norm(conv(x)), a frozen batch norm folded into the convolution."""
    return _convolve(conv, x, *constants[norm]) if norm in constants else norm(conv(x))


def conv_norm_relu(
    conv: nn.Conv2d, norm: nn.Module, x: Tensor, constants: Constants, block: nn.Module | None = None, identity=None
) -> Tensor:
    """relu(norm(conv(x))), or relu(norm(conv(x)) + shortcut) with the shortcut of ``block`` from ``identity``.

    A frozen batch norm's scale is folded into the convolution. Its shift goes with it as a bias, which a CPU's
    convolution adds on the way; CUDA's adds it in a pass of its own, so there shift (the shortcut's too), sum and ReLU
    are one pass over the result.
    """
    if norm not in constants or not ops.fuses("frozen_bn_act", x):
        y = conv_norm(conv, norm, x, constants)
        return F.relu(y if block is None else y.add_(_shortcut(block, identity, constants)), inplace=True)
    scale, shift = constants[norm]
    if block is not None and block.downsample is not None:
        conv_down, norm_down = block.downsample
        scale_down, shift_down = constants[norm_down]
        identity, shift = _convolve(conv_down, identity, scale_down, None), shift + shift_down
    return ops.frozen_bn_act(_convolve(conv, x, scale, None), None, shift, identity)


def _shortcut(block: nn.Module, x: Tensor, constants: Constants) -> Tensor:
    return x if block.downsample is None else conv_norm(block.downsample[0], block.downsample[1], x, constants)


class FoldedBottleneck(Bottleneck):
    """torchvision's bottleneck (stride on the 3x3 convolution)."""

    def forward(self, x: Tensor, constants: Constants) -> Tensor:
        y = conv_norm_relu(self.conv1, self.bn1, x, constants)
        y = conv_norm_relu(self.conv2, self.bn2, y, constants)
        return conv_norm_relu(self.conv3, self.bn3, y, constants, self, x)


class FoldedBasicBlock(BasicBlock):
    """torchvision's basic block (ResNet-18 and -34)."""

    def forward(self, x: Tensor, constants: Constants) -> Tensor:
        y = conv_norm_relu(self.conv1, self.bn1, x, constants)
        return conv_norm_relu(self.conv2, self.bn2, y, constants, self, x)


def _norm_layer(config: BackboneConfig):
    if config.norm == "frozen":
        return functools.partial(FrozenBatchNorm2d, eps=config.norm_eps)
    return lambda channels: nn.GroupNorm(
        math.gcd(32, max(1, channels // config.group_channels)), channels, eps=config.norm_eps
    )


class Backbone(Short, nn.Module):
    """image [B,3,H,W] -> feature map [B,out_channels,ceil(H/stride),ceil(W/stride)]."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        basic = config.depth in (18, 34)
        block = FoldedBasicBlock if basic else FoldedBottleneck
        norm = _norm_layer(config)
        self.config = config
        self.conv1 = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(config.width)
        channels, dilation, stride = config.width, 1, 4
        for stage, count in enumerate(LAYERS[config.depth], start=1):
            planes = config.width * 2 ** (stage - 1)
            step, inner = (1 if stage == 1 else 2), dilation
            if stride * step > config.stride:  # dilate instead of striding, as DC5 does
                dilation, step = dilation * step, 1
            stride *= step
            blocks = []
            for i in range(count):
                shortcut = None
                if i == 0 and (step != 1 or channels != planes * block.expansion):
                    out = planes * block.expansion
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=step, bias=False), norm(out))
                # The first block of a dilated stage keeps the dilation of the stage before it.
                settings = {"stride": step, "dilation": inner} if i == 0 else {"dilation": dilation}
                blocks.append(block(channels, planes, downsample=shortcut, norm_layer=norm, **settings))
                channels = planes * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._freeze()

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory: channels last, but for group norm, which torch's CPU kernel does
        several times faster channel by channel."""
        return torch.channels_last if self.config.norm == "frozen" else torch.contiguous_format

    def _freeze(self) -> None:
        """Stages before ``first_trained_stage`` never get gradients; stage 0 is the stem."""
        stages = [[self.conv1, self.bn1], *([getattr(self, f"layer{i}")] for i in range(1, 5))]
        for modules in stages[: self.config.first_trained_stage]:
            for module in modules:
                module.requires_grad_(False)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x = image_B3HW.contiguous(memory_format=self.memory_format)
        constants = frozen_constants(self.modules())
        x = conv_norm_relu(self.conv1, self.bn1, x, constants)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x, constants)
        return x
