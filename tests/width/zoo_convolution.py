"""Convolutional networks of the zoo, written the way their authors write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import Entry, images


def conv_norm(inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation."""
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, norm: str = "batch") -> None:
        super().__init__()
        normalise = nn.BatchNorm2d if norm == "batch" else lambda width: nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = normalise(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = normalise(outside)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), normalise(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        out += shortcut
        return F.relu(out)


class ResNet18(nn.Module):
    """The CIFAR shape of ResNet-18: 3x3 stem, four stages of two basic blocks."""

    def __init__(
        self, widths: tuple[int, ...] = (8, 12, 16, 20), classes: int = 10, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0]) if norm == "batch" else nn.GroupNorm(4, widths[0])
        stages, inside = [], widths[0]
        for stage, width in enumerate(widths):
            first = BasicBlock(inside, width, 1 if stage == 0 else 2, norm)
            stages.append(nn.Sequential(first, BasicBlock(width, width, 1, norm)))
            inside = width
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        outside = width * 4
        self.reduce = conv_norm(inside, width, 1)
        self.spatial = conv_norm(width, width, 3, stride, groups)
        self.expand = conv_norm(width, outside, 1)
        self.shortcut = (
            conv_norm(inside, outside, 1, stride) if inside != outside or stride != 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.spatial(F.relu(self.reduce(x)).contiguous())
        return F.relu(self.expand(F.relu(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """Bottleneck blocks behind the ImageNet stem; with groups, a ResNeXt."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 12), groups: int = 1, classes: int = 11) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 16, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        blocks, inside = [], 16
        for stage, width in enumerate(widths):
            blocks += [
                Bottleneck(inside, width, 1 + (stage > 0), groups),
                Bottleneck(width * 4, width, 1, groups),
            ]
            inside = width * 4
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(x, 1))


class OptionABlock(nn.Module):
    """The first CIFAR ResNet's shortcut without parameters: every second pixel, channels padded by zeros."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.one = conv_norm(inside, outside, 3, 2 if inside != outside else 1)
        self.two = conv_norm(outside, outside)
        self.pad = (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(self.two(F.relu(self.one(x))) + shortcut)


class ResNetOptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.blocks = nn.Sequential(OptionABlock(8, 8), OptionABlock(8, 16), OptionABlock(16, 32))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = F.avg_pool2d(x, x.size()[3])
        return self.fc(x.view(x.size(0), -1))


class VGG(nn.Module):
    """VGG with batch normalisation: the classifier reads the flattened feature map."""

    def __init__(self, plan: tuple[int | str, ...] = (8, "M", 12, 14, "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width in plan:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
                inside = width
        self.features = nn.Sequential(*layers)
        hidden = nn.Linear(inside * 16, 30), nn.ReLU(True), nn.Dropout(), nn.Linear(30, 26), nn.ReLU(True)
        self.classifier = nn.Sequential(nn.Dropout(), *hidden, nn.Dropout(), nn.Linear(26, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(scale))))


class InvertedResidual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inside * expansion
        self.use_shortcut = stride == 1 and inside == outside
        expand = [conv_norm(inside, hidden, 1), nn.Hardswish()] if expansion != 1 else []
        depthwise = [
            conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, 6),
        ]
        self.conv = nn.Sequential(*expand, *depthwise, conv_norm(hidden, outside, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNet(nn.Module):
    """MobileNet V2's inverted residuals with V3's squeeze-excite and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        plan = ((8, 1, 1), (12, 2, 3), (12, 1, 3))
        blocks, inside = [], 10
        for outside, stride, expansion in plan:
            blocks.append(InvertedResidual(inside, outside, stride, expansion))
            inside = outside
        self.features = nn.Sequential(
            conv_norm(3, 10, 3, 2), nn.Hardswish(), *blocks, conv_norm(inside, 40, 1)
        )
        self.classifier = nn.Sequential(nn.Linear(40, 30), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(30, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu6(self.features(x)).mean([2, 3]))


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all earlier ones."""

    def __init__(self, growth: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.first = nn.ModuleList(DenseLayer(10 + i * growth, growth) for i in range(layers))
        inside = 10 + layers * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 14, 1), nn.AvgPool2d(2)
        )
        self.second = nn.ModuleList(DenseLayer(14 + i * growth, growth) for i in range(layers))
        self.norm = nn.BatchNorm2d(14 + layers * growth)
        self.classifier = nn.Linear(14 + layers * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.first:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.second:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


def resnet18_groupnorm() -> nn.Module:
    return ResNet18(norm="group")


def resnet_short() -> nn.Module:
    return ResNet18((8, 12))


def resnext() -> nn.Module:
    return ResNet50((8,), groups=4)


CONVOLUTION = (
    Entry("resnet18", ResNet18, images(3, 16), 0.99, whole=(3, 10), ablates=True),
    Entry("resnet_short", resnet_short, images(3, 16), 0.98, whole=(3, 10), ablates=True),
    Entry("resnet18_groupnorm", resnet18_groupnorm, images(3, 16), 0.99, whole=(3, 10), ablates=True),
    Entry("resnet50", ResNet50, images(3, 32), 0.99, whole=(3, 11), ablates=True),
    Entry("resnext", resnext, images(3, 32), 0.99, whole=(3, 11), ablates=True),
    Entry("resnet_option_a", ResNetOptionA, images(3, 16), 0.3, whole=(3, 10), ablates=True),
    Entry("vgg_bn", VGG, images(3, 16), 0.99, whole=(3, 10), ablates=True),
    Entry("mobilenet_se", MobileNet, images(3, 16), 0.99, whole=(3,), ablates=True),
    Entry("densenet", DenseNet, images(3, 16), 0.99, whole=(3,), ablates=True),
)
