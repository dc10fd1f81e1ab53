"""Models as people write them, for ordinary.toml: nothing in them is made for being narrowed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OrdinaryCnn(nn.Module):
    """Three convolutions with BatchNorm, and two linear layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.MaxPool2d(2))

        self.features = nn.Sequential(block(3, 32), block(32, 64), block(64, 128))
        self.dropout = nn.Dropout(0.2)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[examples, classes], of images [examples, 3, 32, 32]."""
        x = self.features(x).flatten(1)
        out: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x))))
        return out


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Sequential()
        if stride != 1 or before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.short(x))


class ResNet18(nn.Module):
    """The shape of ResNet-18 (eight residual blocks), for small images and a quarter as wide."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        sizes = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        before = [width, *sizes[:-1]]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.layers = nn.Sequential(*map(_Residual, before, sizes, strides))
        self.fc = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[examples, classes], of images [examples, 3, 32, 32]."""
        out: Tensor = self.fc(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return out


class ViT(nn.Module):
    """A transformer over patches of 4 x 4 pixels."""

    def __init__(self, classes: int, features: int = 128, heads: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, features, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, features))
        layer = nn.TransformerEncoderLayer(
            features, heads, 2 * features, 0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.fc = nn.LayerNorm(features), nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[examples, classes], of images [examples, 3, 32, 32]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        out: Tensor = self.fc(self.norm(self.encoder(tokens)).mean(1))
        return out


class Lstm(nn.Module):
    """A text classifier: embeddings, an LSTM, a linear layer."""

    def __init__(self, vocabulary: int, classes: int, features: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features, padding_idx=0)
        self.lstm = nn.LSTM(features, features, batch_first=True)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[examples, classes], of token ids [examples, time]."""
        out: Tensor = self.fc(self.lstm(self.embedding(x))[0].amax(1))
        return out


def cnn() -> nn.Module:
    """For ten classes of images."""
    return OrdinaryCnn(10)


def resnet18() -> nn.Module:
    """For ten classes of images."""
    return ResNet18(10)


def vit() -> nn.Module:
    """For ten classes of images."""
    return ViT(10)


def lstm() -> nn.Module:
    """For four classes of texts, in 4,096 words."""
    return Lstm(4096, 4)
