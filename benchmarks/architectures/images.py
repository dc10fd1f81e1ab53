"""Networks for images, written by hand as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture, Inputs


def images(examples: int, length: int) -> Inputs:
    """Pictures of 16 pixels."""
    return (torch.randn(examples, 3, 16, 16),)


class PlainCNN(nn.Module):
    """Two convolutions, pooling, and a classifier on the flattened rest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.fc1, self.fc2, self.drop = nn.Linear(24 * 4 * 4, 48), nn.Linear(48, 10), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 24 * 4 * 4)
        return F.log_softmax(self.fc2(self.drop(F.relu(self.fc1(x)))), dim=1)


def vgg() -> nn.Module:
    """Blocks of convolution, BatchNorm and ReLU, from a list as torchvision's."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, "pool", 24, 24, "pool", 32, "pool"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 4, 48), nn.ReLU(True), nn.Dropout(), nn.Linear(48, 10)
    )


class BasicBlock(nn.Module):
    """ResNet's block, with the shortcut of option B."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """The ResNet for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 32, 2))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.norm(self.stem(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Bottleneck(nn.Module):
    """Pre-activation bottleneck with grouped convolution (ResNeXt)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DenseNet(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(16 + i * growth), nn.ReLU(), nn.Conv2d(16 + i * growth, growth, 3, padding=1)
            )
            for i in range(3)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.transition(torch.cat(features, dim=1)).mean((2, 3)))


class Inception(nn.Module):
    """Branches of several kernel sizes side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 8, 1))
        self.aux, self.head = nn.Linear(40, 10), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], 1).relu()
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return (self.head(pooled), self.aux(pooled)) if self.training else self.head(pooled)


class UNet(nn.Module):
    """Down, up, and skip connections that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.block(3, 8), self.block(8, 16), self.block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.left2, self.left1, self.head = self.block(32, 16), self.block(16, 8), nn.Conv2d(8, 4, 1)

    @staticmethod
    def block(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU(),
            nn.Conv2d(outer, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.bottom(F.max_pool2d(two, 2)))
        x = self.left2(torch.cat([two, x], dim=1))
        return self.head(self.left1(torch.cat([one, self.up1(x)], dim=1)))


class InvertedResidual(nn.Module):
    """MobileNet's block: wide, one channel at a time, narrow; with squeeze and excitation as in version 3."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        hidden = inner * 3
        self.same = stride == 1 and inner == outer
        self.expand = nn.Sequential(
            nn.Conv2d(inner, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, hidden, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outer, 1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.same else y


def mobilenet() -> nn.Module:
    """Three inverted residuals and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), InvertedResidual(8, 8, 1),
        InvertedResidual(8, 16, 2), InvertedResidual(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: half of the channels pass, the rest is convolved, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, 1, 1, groups=half),
            nn.BatchNorm2d(half), nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), dim=1)
        examples, channels, height, width = out.size()
        out = out.view(examples, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return out.view(examples, -1, height, width)


class SEBlock(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = x.mean((2, 3)).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


class CBAM(nn.Module):
    """Attention over channels and over places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * weight[:, :, None, None]
        place = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(place))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt's block: channels last for the norm and the MLP, and a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.narrow(F.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over channels that come first, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def convnext() -> nn.Module:
    """Patches, two blocks, a norm between."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), ChannelsFirstNorm(16), ConvNeXtBlock(16), ChannelsFirstNorm(16),
        nn.Conv2d(16, 24, 2, 2), ConvNeXtBlock(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(24),
        nn.Linear(24, 10),
    )  # fmt: skip


def resnext() -> nn.Module:
    """Grouped convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), Bottleneck(24, 4), Bottleneck(24, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip


def shufflenet() -> nn.Module:
    """Two units that shuffle."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), ShuffleUnit(16), ShuffleUnit(16), nn.Conv2d(16, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def attended(block: nn.Module) -> nn.Module:
    """A convolution whose channels are weighted by a block."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), block, nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


def _image(name: str, style: str, model: Any) -> Architecture:
    return Architecture(name, "hand-written", style, model, images)


IMAGES = [
    _image("cnn", "the tutorial's network: view(-1, ...), log_softmax", PlainCNN),
    _image("vgg", "Sequential from a list, BatchNorm, in-place ReLU", vgg),
    _image("cifar-resnet", "residuals added in place, shortcuts", ResNet),
    _image("resnext", "grouped convolutions, pre-activation", resnext),
    _image("densenet", "growing concatenation", DenseNet),
    _image("inception", "branches side by side, an auxiliary head in training", Inception),
    _image("u-net", "skip connections, GroupNorm, transposed convolutions", UNet),
    _image("mobilenet", "depthwise convolutions, inverted residuals", mobilenet),
    _image("shufflenet", "channel split and shuffle", shufflenet),
    _image("squeeze-excite", "channel attention with view and expand_as", lambda: attended(SEBlock(16))),
    _image("cbam", "attention over channels and places", lambda: attended(CBAM(16))),
    _image("convnext-by-hand", "channels last, a norm by hand, layer scale", convnext),
]
